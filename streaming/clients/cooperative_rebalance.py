"""Corrects the cooperative rebalance (KIP-429) of kafka-python 3.0's coordinator.

- Owned partitions: each JoinGroup request lists the partitions that the member owns, and the leader leaves them to it.
  kafka-python lists the last assignment, even after the member was expelled and its partitions went to others, so that
  two members own one partition. The corrected assignor lists what the member owns now.
- Expulsion during a join: kafka-python calls no listener, so the member goes on with partitions that others own, and
  its commits are accepted. The corrected coordinator prepares the next join anew, which calls `on_lost`.
- Fetching during a join: kafka-python's `poll` waits for the other members and returns nothing. The corrected `poll`
  returns records of the partitions that the member still owns.
- Commit and leave during a join: the broker answers the requests of a connection in order, and JoinGroup is not
  answered yet. kafka-python therefore cannot commit or leave, and a worker that stops (in a rolling restart, for
  instance) loses its commit and delays the group. The corrected coordinator sends these requests over another
  connection. Between the end of the join and the leader's SyncGroup the broker refuses commits; this error can be
  retried, and the member stays in the group.
- Fenced static member: kafka-python stops the heartbeats and polls without end. The corrected `poll` raises.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.base import Generation
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.errors import FencedInstanceIdError, IllegalGenerationError, RebalanceInProgressError
from kafka.structs import MemberState

# During a join `poll` waits for records in slices of this length, and drives the join between them.
_JOIN_POLL_S = 0.02
_UNKNOWN_MEMBER_ID = ""
# kafka-python names its connection to the coordinator with this prefix and the broker's id.
_COORDINATOR_PREFIX = "coordinator-"


class OwnedPartitionsAssignor(CooperativeStickyAssignor):  # type: ignore[misc]  # the vendor has no types
    """Lists the partitions that `subscription`, the consumer's own state, has assigned at the moment of the join."""

    def __init__(self) -> None:
        super().__init__()
        self.subscription: Any = None

    def metadata(self, topics: Any) -> Any:
        """Returns the metadata of the JoinGroup request, with the owned partitions corrected."""
        self.member_assignment = list(self.subscription.assigned_partitions())
        return super().metadata(topics)


def fix_cooperative_rebalance(coordinator: ConsumerCoordinator) -> None:
    """Applies all corrections of this module; each assignor must be an OwnedPartitionsAssignor."""
    for assignor in coordinator._assignors.values():
        assignor.subscription = coordinator._subscription
    _lose_partitions_after_expulsion(coordinator)
    _fetch_during_join(coordinator)
    _commit_during_join(coordinator)
    _raise_when_fenced(coordinator)


def _lose_partitions_after_expulsion(coordinator: ConsumerCoordinator) -> None:
    reset = coordinator.reset_generation

    def reset_generation(member_id: str = _UNKNOWN_MEMBER_ID) -> None:
        reset(member_id)
        # kafka-python prepares a join once; after an expulsion it must prepare it again
        coordinator.rejoining = False

    coordinator.reset_generation = reset_generation


def _fetch_during_join(coordinator: ConsumerCoordinator) -> None:
    poll, time_to_next_poll = coordinator.poll, coordinator.time_to_next_poll

    def joins_with_partitions() -> bool:
        return bool(coordinator._subscription.assigned_partitions()) and coordinator.need_rejoin()

    def poll_without_blocking(timeout_ms: float | None = None) -> bool:
        if not joins_with_partitions():
            return bool(poll(timeout_ms=timeout_ms))
        poll(timeout_ms=0)
        return True

    def time_to_next_join_poll() -> float:
        # no heartbeats are sent during a join, so an overdue one would make kafka-python not wait at all
        return _JOIN_POLL_S if joins_with_partitions() else float(time_to_next_poll())

    coordinator.poll, coordinator.time_to_next_poll = poll_without_blocking, time_to_next_join_poll


def leave_during_join(coordinator: ConsumerCoordinator) -> None:
    """Lets `close` leave the group over another connection while a join is under way; call it before `close`."""
    coordinator.coordinator_id = coordinator.coordinator()


def _commit_during_join(coordinator: ConsumerCoordinator) -> None:
    find_coordinator, handle = coordinator.coordinator, coordinator._handle_offset_commit_response

    def coordinator_during_join() -> str | int | None:
        node: str | int | None = find_coordinator()
        if node is None or coordinator.state is not MemberState.REBALANCING:
            return node
        broker_id = int(str(node).removeprefix(_COORDINATOR_PREFIX))
        return broker_id if coordinator._cluster.broker_metadata(broker_id) is not None else node

    def generation_unless_lost() -> Generation | None:
        generation = coordinator._generation
        return None if generation.is_lost() else generation

    def handle_offset_commit_response(offsets: Any, send_time: float, response: Any) -> None:
        if coordinator.state is MemberState.REBALANCING:
            codes = {code for _, partitions in response.topics for _, code in partitions}
            if codes & {IllegalGenerationError.errno, RebalanceInProgressError.errno}:
                raise RebalanceInProgressError("the group is rebalancing; the commit can be tried again")
        handle(offsets, send_time, response)

    coordinator.coordinator = coordinator_during_join
    coordinator.generation_if_stable = generation_unless_lost
    coordinator._handle_offset_commit_response = handle_offset_commit_response


def _raise_when_fenced(coordinator: ConsumerCoordinator) -> None:
    send, poll = coordinator._send_heartbeat_request, coordinator.poll
    fenced: list[FencedInstanceIdError] = []

    async def send_heartbeat_request() -> Any:
        try:
            return await send()
        except FencedInstanceIdError as error:
            fenced.append(error)
            raise

    def poll_unless_fenced(timeout_ms: float | None = None) -> bool:
        if fenced:
            raise FencedInstanceIdError("another member with the name of kafka.instance has joined the group")
        return bool(poll(timeout_ms=timeout_ms))

    coordinator._send_heartbeat_request, coordinator.poll = send_heartbeat_request, poll_unless_fenced
