"""Corrects the cooperative rebalance (KIP-429) of kafka-python 3.0's coordinator.

- Owned partitions: each JoinGroup request lists the partitions that the member owns, and the leader leaves them to it.
  kafka-python lists the last assignment, even after the member was expelled and its partitions went to others, so that
  two members own one partition. The corrected assignor lists what the member owns now.
- Expulsion during a join: kafka-python calls no listener, so the member goes on with partitions that others own, and
  its commits are accepted. The corrected coordinator prepares the next join anew, which calls `on_lost`.
- Join that ends between two polls: kafka-python discards it and joins again, so that a worker with short polls never
  gets a partition, and its group rebalances without end. The next poll of the corrected coordinator completes it.
- Join that itself removes its reason (the leader has assigned a changed topic): no poll completes it. The member sends
  no heartbeats, is expelled, and goes on with partitions that others own. Here a join stays needed until a poll
  completes it.
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
from kafka.future import Future
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


class _Finished(Future):  # type: ignore[misc]  # the vendor has no types
    """Appears unfinished until a caller waits for it; then it gets the result of `task`."""

    __slots__ = ("_task",)

    def __init__(self, task: Future) -> None:
        super().__init__()
        self._task = task

    def add_errback(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        # kafka-python adds the callback first, so with the errback both are present
        added = super().add_errback(f, *args, **kwargs)
        if not self.is_done:
            self._task.chain(self)
        return added


class _CorrectedCoordinator(ConsumerCoordinator):  # type: ignore[misc]  # the vendor has no types
    _join_task: Any
    _fenced = False

    def reset_generation(self, member_id: str = _UNKNOWN_MEMBER_ID) -> None:
        super().reset_generation(member_id)
        # kafka-python prepares a join once; after an expulsion it must prepare it again
        self.rejoining = False

    async def join_group_async(self, timeout_ms: float | None = None) -> Any:
        task = self._join_task
        if task is not None and task.is_done:
            self._join_task = _Finished(task)
        return await super().join_group_async(timeout_ms=timeout_ms)

    def need_rejoin(self) -> bool:
        return self.rejoining or bool(super().need_rejoin())

    def _joins_with_partitions(self) -> bool:
        return bool(self._subscription.assigned_partitions()) and self.need_rejoin()

    def poll(self, timeout_ms: float | None = None) -> bool:
        if self._fenced:
            raise FencedInstanceIdError("another member with the name of kafka.instance has joined the group")
        if not self._joins_with_partitions():
            return bool(super().poll(timeout_ms=timeout_ms))
        super().poll(timeout_ms=0)
        return True

    def time_to_next_poll(self) -> float:
        # no heartbeats are sent during a join, so an overdue one would make kafka-python not wait at all
        return _JOIN_POLL_S if self._joins_with_partitions() else float(super().time_to_next_poll())

    async def _send_heartbeat_request(self) -> Any:
        try:
            return await super()._send_heartbeat_request()
        except FencedInstanceIdError:
            self._fenced = True
            raise

    def coordinator(self) -> str | int | None:
        node: str | int | None = super().coordinator()
        if node is None or self.state is not MemberState.REBALANCING:
            return node
        broker_id = int(str(node).removeprefix(_COORDINATOR_PREFIX))
        return broker_id if self._cluster.broker_metadata(broker_id) is not None else node

    def generation_if_stable(self) -> Generation | None:
        generation = self._generation
        return None if generation.is_lost() else generation

    def _handle_offset_commit_response(self, offsets: Any, send_time: float, response: Any) -> None:
        if self.state is MemberState.REBALANCING:
            codes = {code for _, partitions in response.topics for _, code in partitions}
            if codes & {IllegalGenerationError.errno, RebalanceInProgressError.errno}:
                raise RebalanceInProgressError("the group is rebalancing; the commit can be tried again")
        super()._handle_offset_commit_response(offsets, send_time, response)


def fix_cooperative_rebalance(coordinator: ConsumerCoordinator) -> None:
    """Applies all corrections of this module; each assignor must be an OwnedPartitionsAssignor."""
    for assignor in coordinator._assignors.values():
        assignor.subscription = coordinator._subscription
    coordinator.__class__ = _CorrectedCoordinator


def leave_during_join(coordinator: ConsumerCoordinator) -> None:
    """Lets `close` leave the group over another connection while a join is under way; call it before `close`."""
    coordinator.coordinator_id = coordinator.coordinator()
