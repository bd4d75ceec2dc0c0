"""Removes a static member from an unfinished rebalance before it joins again.

A cooperative rebalance takes two rounds: after the first, members give up partitions and join again; the second assigns
these partitions. A static member that is killed between the rounds and restarted gets its assignment of the first round
without a rebalance (KIP-345). Then no member owns the partitions, and no member joins again, until the group changes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any

import structlog
from kafka import KafkaAdminClient
from kafka.admin import MemberToRemove

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.kafka_errors import translated
from streaming.kafka.protocol import Partition
from streaming.kafka.settings import connection_settings

log = structlog.get_logger()
# The first coordinator creates its topic, and a coordinator that moves to another node is away for a while.
COORDINATOR_S_MAX, COORDINATOR_PAUSE_S = 10.0, 0.2


def end_unfinished_membership(kafka: KafkaSettings, group: str | None, wanted: Collection[Partition]) -> None:
    """Removes this instance from a group that is not stable, or in which no member owns some `wanted` partitions.

    The next join is then a rebalance. Does nothing without `kafka.instance`. Raises BrokerError if the group's
    coordinator does not answer.
    """
    if group is None or not kafka.instance:
        return
    give_up_s = time.monotonic() + COORDINATOR_S_MAX
    while True:
        try:
            _end_unfinished(kafka, group, wanted)
            return
        except BrokerError as error:
            if not getattr(error.__cause__, "retriable", False) or time.monotonic() > give_up_s:
                raise
        time.sleep(COORDINATOR_PAUSE_S)


def _end_unfinished(kafka: KafkaSettings, group: str, wanted: Collection[Partition]) -> None:
    with (
        translated(f"describing the group {group}", kafka.bootstrap),
        # librdkafka cannot remove a member
        closing(
            KafkaAdminClient(
                **connection_settings(kafka, "cascade-members"),
                bootstrap_timeout_ms=int(limits.BOOTSTRAP_TIMEOUT_S * 1_000),
                request_timeout_ms=limits.REQUEST_TIMEOUT_MS,
            )
        ) as admin,
    ):
        found = admin.describe_groups([group])[group]
        members = found["members"]
        if all(member["group_instance_id"] != kafka.instance for member in members):
            return
        if found["group_state"] == "Stable" and set(wanted) <= _assigned(members):
            return
        log.info("unfinished rebalance: removing this instance before it joins", group=group, instance=kafka.instance)
        # an instance that is not a member any more is not an error
        admin.remove_group_members(group, [MemberToRemove(group_instance_id=kafka.instance)])


def _assigned(members: Collection[Mapping[str, Any]]) -> set[Partition]:
    return {
        (topic["topic"], partition_id)
        for member in members
        for topic in (member["member_assignment"] or {}).get("assigned_partitions", [])
        for partition_id in topic["partitions"]
    }
