"""What a static member does before it joins: it has the group begin anew where a partition would be left to nobody.

A cooperative rebalance takes two rounds: who must give a partition up does so after the first, and joins again for the
second, which hands it on. A static member that is killed between them and comes back is given its assignment of the
first round without any rebalance (KIP-345). Then nobody has the partition, and nobody joins again, until some member
comes or goes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import structlog
from kafka.admin import MemberToRemove

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.clients.admin import admin_client
from streaming.clients.protocol import Partition

log = structlog.get_logger()
# A group's first coordinator makes its topic, and one that moves to another node is away for a while.
COORDINATOR_S_MAX, COORDINATOR_PAUSE_S = 10.0, 0.2


def end_unfinished_membership(kafka: KafkaSettings, group: str | None, wanted: Collection[Partition]) -> None:
    """Take our instance out of a group that has not settled, or left out some of the `wanted` partitions.

    Joining is then a rebalance. Does nothing without `kafka.instance`. Raises BrokerError where the group's coordinator
    does not answer.
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
    with admin_client(kafka, f"looking at the group {group}") as admin:
        found = admin.describe_groups([group])[group]
        members = found["members"]
        if all(member["group_instance_id"] != kafka.instance for member in members):
            return
        if found["group_state"] == "Stable" and set(wanted) <= _assigned(members):
            return
        log.info("the group has not settled: joining it anew", group=group, instance=kafka.instance)
        # an instance that was removed by another in the meantime is an answer like any other
        admin.remove_group_members(group, [MemberToRemove(group_instance_id=kafka.instance)])


def _assigned(members: Collection[Mapping[str, Any]]) -> set[Partition]:
    return {
        (topic["topic"], number)
        for member in members
        for topic in (member["member_assignment"] or {}).get("assigned_partitions", [])
        for number in topic["partitions"]
    }
