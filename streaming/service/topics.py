"""The topics of a configuration: what they must be, and creating, checking and comparing them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import structlog

from cascade.config import Config
from cascade.errors import BrokerError, MissingTopicsError
from streaming.kafka import TopicSpec, admin
from streaming.kafka.topics import ensure_topics, missing_topics
from streaming.pipeline.dead_letters import OVERHEAD_BYTES_MAX

log = structlog.get_logger()
# Kafka's default of max.message.bytes; a dead letter is larger than its message by its headers.
KAFKA_MESSAGE_BYTES = 1_048_588
# The longest window and label delay that feature files have in practice, twice.
SUMMARIES_RETENTION_MS = 90 * 86_400_000
TOPICS_S_MAX, TOPICS_PAUSE_S = 30.0, 1.0


def topic_specs(config: Config, partitions: int, replication: int = -1) -> list[TopicSpec]:
    """The topics of a configuration; the broker sets the timestamps, since deadlines count from the append.

    partitions: of the topics that workers share. replication: copies of each record; -1: the broker's default.
    """
    names, bytes_max = config.kafka.topics, config.worker.message_bytes_max
    stamped = {"message.timestamp.type": "LogAppendTime"}
    letter_bytes_max = max(KAFKA_MESSAGE_BYTES, bytes_max + OVERHEAD_BYTES_MAX)
    letters = stamped | {"max.message.bytes": str(letter_bytes_max)}
    specs = [
        TopicSpec(names.transactions, partitions, replication, stamped),
        TopicSpec(names.labels, 1, replication, stamped),
        TopicSpec(names.decisions, partitions, replication, stamped),
        TopicSpec(names.dead_letters, 1, replication, letters),
    ]
    if config.terminals.share:
        # the newest total of each terminal and bucket, as long as a window may need it
        compacted = {"cleanup.policy": "compact,delete", "retention.ms": str(SUMMARIES_RETENTION_MS)}
        specs.append(TopicSpec(names.summaries, partitions, replication, stamped | compacted))
    return specs


def check_topics(config: Config, create_partitions: int) -> None:
    """Creates missing topics with this many partitions; if it is 0, raises a MissingTopicsError that names them.

    Retries errors that Kafka calls retriable for TOPICS_S_MAX, since a node may restart meanwhile.
    """
    give_up_s = time.monotonic() + TOPICS_S_MAX
    while True:
        try:
            check_topics_once(config, create_partitions)
            return
        except BrokerError as error:
            if not is_retriable(error) or time.monotonic() > give_up_s:
                raise
            log.warning("checking the topics again", reason=str(error))
            time.sleep(TOPICS_PAUSE_S)


def check_topics_once(config: Config, create_partitions: int) -> None:
    """Does what check_topics does, once: it raises every error at once."""
    specs = topic_specs(config, max(create_partitions, 1))
    if create_partitions:
        ensure_topics(config.kafka, specs)
        return
    missing = missing_topics(config.kafka, [spec.name for spec in specs])
    if missing:
        raise MissingTopicsError(
            f"Kafka at {config.kafka.bootstrap} has no topic {', '.join(missing)}; create the missing topics with"
            " `cascade topics --partitions N`, or pass --create-topics N"
        )


def is_retriable(error: BrokerError) -> bool:
    """Whether the same request may succeed later: the error's cause is a broker that is away."""
    return admin.is_retriable(error.__cause__)


def differences(config: Config, wanted: Sequence[TopicSpec], found: Mapping[str, TopicSpec]) -> list[str]:
    """Returns how the topics differ from those that `cascade topics` would create: a line with the remedy for each.

    wanted: by `topic_specs`. found: the topics of the broker, by name; a setting that the broker does not show to this
    user is not compared. Each worker reads all labels, and few dead letters are written, so that these topics may have
    any number of partitions.
    """
    lines = []
    any_number = (config.kafka.topics.labels, config.kafka.topics.dead_letters)
    for spec in wanted:
        topic = found[spec.name]
        if topic.partitions < spec.partitions:
            lines.append(
                f"{spec.name}: has {topic.partitions} partitions, not {spec.partitions}; `kafka-topics.sh --alter"
                f" --topic {spec.name} --partitions {spec.partitions}` adds them, but a card's partition depends on"
                " their number: add them while the topic is empty"
            )
        elif topic.partitions > spec.partitions and spec.name not in any_number:
            lines.append(
                f"{spec.name}: has {topic.partitions} partitions, not {spec.partitions}; partitions cannot be removed:"
                f" pass --partitions {topic.partitions}, or name a new topic"
            )
        if spec.replication not in (-1, topic.replication):
            lines.append(
                f"{spec.name}: has replication factor {topic.replication}, not {spec.replication};"
                " `kafka-reassign-partitions.sh` changes it"
            )
        shown = topic.settings or {}
        for key, value in (spec.settings or {}).items():
            if key in shown and set(shown[key].split(",")) != set(value.split(",")):
                lines.append(
                    f"{spec.name}: {key} is {shown[key]}, not {value}; `kafka-configs.sh --alter --topic {spec.name}"
                    f" --add-config {key}=[{value}]` sets it"
                )
    return lines
