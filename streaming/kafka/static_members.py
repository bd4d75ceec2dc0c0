"""Removes a static member from an unfinished rebalance before it joins again.

A cooperative rebalance takes two rounds: after the first, members give up partitions and join again; the second assigns
these partitions. A static member that is killed between the rounds and restarted gets its assignment of the first round
without a rebalance (KIP-345). Then no member owns the partitions, and no member joins again, until the group changes.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing

import structlog
from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.protocol import Partition
from streaming.kafka.rdkafka_settings import Connection, vendor_error

log = structlog.get_logger()
REQUEST_S = limits.REQUEST_TIMEOUT_MS / 1_000
# The first coordinator creates its topic, and a coordinator that moves to another node is away for a while.
COORDINATOR_S_MAX, COORDINATOR_PAUSE_S = 10.0, 0.2

_COORDINATOR_MOVES = (
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._WAIT_COORD,
)


def end_unfinished_membership(
    kafka: KafkaSettings, connection: Connection, admin: AdminClient, group: str, wanted: Collection[Partition]
) -> None:
    """Removes this instance from a group that is not stable, or in which no member owns some `wanted` partitions.

    The next join is then a rebalance. Does nothing without `kafka.instance`. `admin` and `connection`: of the consumer
    that will join. Raises BrokerError if the group's coordinator does not answer.
    """
    if not kafka.instance:
        return
    give_up_s = time.monotonic() + COORDINATOR_S_MAX
    while True:
        try:
            with connection.translated(f"describing the group {group}"):
                unfinished = _is_unfinished(kafka.instance, admin, group, set(wanted))
            if unfinished:
                log.info(
                    "unfinished rebalance: removing this instance before it joins", group=group, instance=kafka.instance
                )
                remove_members(kafka, group, [kafka.instance])
            return
        except BrokerError as error:
            if not _is_retriable(error) or time.monotonic() > give_up_s:
                raise
        time.sleep(COORDINATOR_PAUSE_S)


def _is_unfinished(instance: str, admin: AdminClient, group: str, wanted: set[Partition]) -> bool:
    """Whether this instance is a member that would come back to an assignment which is not the last one."""
    (asked,) = admin.describe_consumer_groups([group], request_timeout=REQUEST_S).values()
    try:
        found = asked.result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
            return False
        raise
    if all(member.group_instance_id != instance for member in found.members):
        return False
    assigned = {
        (partition.topic, partition.partition)
        for member in found.members
        for partition in member.assignment.topic_partitions
    }
    return found.state != ConsumerGroupState.STABLE or not wanted <= assigned


def remove_members(
    kafka: KafkaSettings, group: str, instances: Collection[str], timeout_s: float = limits.BOOTSTRAP_TIMEOUT_S
) -> None:
    """Removes static members from a group, which need not be members any more; raises BrokerError.

    `timeout_s`: for a connection, and for each request.
    """
    # librdkafka cannot remove a member. The import takes longer than all else here, and is seldom needed.
    from kafka import KafkaAdminClient
    from kafka.admin import MemberToRemove

    from streaming.kafka.kafka_errors import translated
    from streaming.kafka.settings import connection_settings

    with (
        translated(f"removing an instance from the group {group}", kafka.bootstrap),
        closing(
            KafkaAdminClient(
                **connection_settings(kafka, "cascade-members"),
                bootstrap_timeout_ms=int(timeout_s * 1_000),
                request_timeout_ms=min(limits.REQUEST_TIMEOUT_MS, int(timeout_s * 1_000)),
            )
        ) as admin,
    ):
        # an instance that is not a member any more is not an error
        admin.remove_group_members(group, [MemberToRemove(group_instance_id=instance) for instance in instances])


def _is_retriable(error: BrokerError) -> bool:
    answer = vendor_error(error)
    if answer is not None:
        return answer.code() in _COORDINATOR_MOVES
    return bool(getattr(error.__cause__, "retriable", False))
