"""Waits for the brokers, and checks and creates topics."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, TopicMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.access_errors import is_access_error
from streaming.kafka.admin import ATTEMPT_TIMEOUT_S, admin_client
from streaming.kafka.protocol import TopicSpec
from streaming.kafka.tokens import TokenRefusedError, make_token_provider

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 5.0
# Share of a pause that is random, so that workers that lost the same broker do not reconnect at the same moment.
JITTER_SHARE = 0.5
PROBE_TIMEOUT_S = 2.0
REQUEST_S = limits.REQUEST_TIMEOUT_MS / 1_000
LEADERS_PAUSE_S = 0.05


def wait_for_broker(
    kafka: KafkaSettings,
    timeout_s: float,
    report: Callable[[str], None],
    *,
    sleep: Callable[[float], object] = time.sleep,
    chance: Callable[[], float] = random.random,
) -> None:
    """Waits for a broker.

    kafka: addresses and security. timeout_s: the limit. report: called before each pause with the reason to wait.
    sleep: pauses, in seconds. chance: random numbers in [0, 1). Raises BrokerError after `timeout_s`, and at once for
    refused credentials or certificates.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = BACKOFF_FIRST_S
    while True:
        problem = _problem(kafka, max(deadline_s - time.monotonic(), 0.1))
        if problem is None:
            return
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise BrokerError(
                f"no Kafka broker at {kafka.bootstrap} after {timeout_s:g} s ({problem}); "
                "start it, or set kafka.bootstrap or KAFKA_BOOTSTRAP to a running broker"
            )
        report(f"waiting for Kafka at {kafka.bootstrap}: {problem}")
        sleep(min(pause_s * (1 - JITTER_SHARE * chance()), left_s))
        pause_s = min(2 * pause_s, BACKOFF_MAX_S)


def ensure_topics(kafka: KafkaSettings, topics: Sequence[TopicSpec]) -> list[str]:
    """Creates missing topics and waits until they have leaders; returns the names of the new topics."""
    missing = set(missing_topics(kafka, [topic.name for topic in topics]))
    if not missing:
        return []
    wanted = [
        NewTopic(topic.name, topic.partitions, topic.replication, config=dict(topic.settings or {}))
        for topic in topics
        if topic.name in missing
    ]
    with admin_client(kafka, "asking about topics", ATTEMPT_TIMEOUT_S) as admin:
        for made in admin.create_topics(wanted, request_timeout=REQUEST_S).values():
            try:
                made.result()
            except KafkaException as error:
                # another worker may have created it meanwhile
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
        _wait_for_leaders(admin, missing)
    return sorted(missing)


def wait_for_leaders(kafka: KafkaSettings, names: Sequence[str]) -> None:
    """Waits until each partition of these topics has a leader; raises BrokerError after the request timeout."""
    with admin_client(kafka, "waiting for the topics' leaders") as admin:
        _wait_for_leaders(admin, names)


def describe_topics(kafka: KafkaSettings, names: Sequence[str]) -> dict[str, TopicSpec]:
    """Returns partitions, replication factor and settings of existing topics, by name.

    `settings`: all of those in effect, the broker's defaults too; empty if this user may not read them.
    """
    resources = {name: ConfigResource(ConfigResource.Type.TOPIC, name) for name in names}
    with admin_client(kafka, "asking about topics") as admin:
        known = admin.list_topics(timeout=REQUEST_S).topics
        answers = admin.describe_configs(list(resources.values()), request_timeout=REQUEST_S)
        return {
            name: TopicSpec(
                name,
                len(known[name].partitions),
                min((len(partition.replicas) for partition in known[name].partitions.values()), default=0),
                _settings(answers[resource]),
            )
            for name, resource in resources.items()
        }


def missing_topics(kafka: KafkaSettings, names: Sequence[str]) -> list[str]:
    """Returns the names that are not a topic, in the same order; raises BrokerError if no broker answers."""
    with admin_client(kafka, "asking about topics", ATTEMPT_TIMEOUT_S) as admin:
        known = admin.list_topics(timeout=REQUEST_S).topics
    return [name for name in names if name not in known]


def _settings(answer: Future[Any]) -> dict[str, str]:
    try:
        return {key: entry.value for key, entry in answer.result().items()}
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise
        return {}


def _wait_for_leaders(admin: AdminClient, names: Iterable[str]) -> None:
    give_up_s = time.monotonic() + REQUEST_S
    while True:
        known = admin.list_topics(timeout=REQUEST_S).topics
        missing = [name for name in names if not _has_leaders(known.get(name))]
        if not missing:
            return
        if time.monotonic() > give_up_s:
            text = f"{', '.join(sorted(missing))}: no leader within {REQUEST_S:g} s"
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE, text))
        time.sleep(LEADERS_PAUSE_S)


def _has_leaders(topic: TopicMetadata | None) -> bool:
    partitions = [] if topic is None else list(topic.partitions.values())
    return bool(partitions) and all(partition.leader >= 0 for partition in partitions)


def _problem(kafka: KafkaSettings, timeout_s: float) -> str | None:
    """Why no broker answers, or None; tries a plain connection first, since its error explains more."""
    problems = [_connection_problem(server, min(PROBE_TIMEOUT_S, timeout_s)) for server in kafka.servers]
    if all(problem is not None for problem in problems):
        return problems[0]
    try:
        if kafka.security.uses_tokens:
            make_token_provider(kafka.security).token()
    except TokenRefusedError:
        raise
    except BrokerError as error:
        return str(error)
    try:
        with admin_client(kafka, "asking about topics", min(ATTEMPT_TIMEOUT_S, timeout_s)) as admin:
            admin.list_topics(timeout=REQUEST_S)
    except BrokerError as error:
        if is_access_error(error.__cause__):
            raise
        return "it accepts connections, but does not answer the Kafka protocol with these kafka.security settings"
    return None


def _connection_problem(server: str, timeout_s: float) -> str | None:
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return None
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
