"""Cooperative rebalances in which a member claims what it has, and goes on with what it keeps; kafka-python 3.0 does
neither in full.

- A member says at each join which partitions it has, and the leader leaves them to it. The vendor says what it was
  assigned last, also after it was thrown out of the group and its partitions went to others: two members then have
  one partition. Here it says what it has now.
- A member that is thrown out while it joins is not told that its partitions are lost: it goes on with them beside
  their new owner, and its commits are accepted. Here the next attempt begins by giving them up (`on_lost`).
- While a join waits for the other members, the vendor's `poll` waits too and returns nothing. Here what is kept is
  fetched meanwhile.
- While a join is under way, the vendor refuses to commit, and cannot leave either: the broker answers the requests of a
  connection one after the other, and the join is not answered yet. A worker that is told to stop (in a rolling restart,
  say) would leave its commit undone, and be missed late. Here other requests go over another connection. The broker
  takes commits until the join is over, and again once the leader has spoken; in between its no is no reason to leave.
- A static member whose name was taken by another stops its heartbeats, and polls on without end. Here `poll` raises.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.base import Generation
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.errors import FencedInstanceIdError, IllegalGenerationError, RebalanceInProgressError
from kafka.structs import MemberState

# The wait for records, cut into pieces, between which the join is looked after.
_JOIN_LOOK_S = 0.02
_UNKNOWN_MEMBER_ID = ""
# The vendor's name for its connection to the coordinator: this, and the broker's number.
_COORDINATOR_CONNECTION = "coordinator-"


class HonestAssignor(CooperativeStickyAssignor):  # type: ignore[misc]  # the vendor has no types
    """Claims the partitions that `subscription`, the consumer's own state, has at the moment of the join."""

    def __init__(self) -> None:
        super().__init__()
        self.subscription: Any = None

    def metadata(self, topics: Any) -> Any:
        """The vendor's message to the leader, with the claim corrected."""
        self.member_assignment = list(self.subscription.assigned_partitions())
        return super().metadata(topics)


def rebalance_honestly(coordinator: ConsumerCoordinator) -> None:
    """Mend this coordinator; its assignor must be an HonestAssignor."""
    for assignor in coordinator._assignors.values():
        assignor.subscription = coordinator._subscription
    _give_up_what_is_lost_while_joining(coordinator)
    _fetch_while_joining(coordinator)
    _commit_while_joining(coordinator)
    _raise_where_the_name_is_taken(coordinator)


def _give_up_what_is_lost_while_joining(coordinator: ConsumerCoordinator) -> None:
    reset = coordinator.reset_generation

    def reset_generation(member_id: str = _UNKNOWN_MEMBER_ID) -> None:
        reset(member_id)
        # the vendor prepares a join once, and here what was prepared is void
        coordinator.rejoining = False

    coordinator.reset_generation = reset_generation


def _fetch_while_joining(coordinator: ConsumerCoordinator) -> None:
    poll, time_to_next_poll = coordinator.poll, coordinator.time_to_next_poll

    def joins_with_partitions() -> bool:
        return bool(coordinator._subscription.assigned_partitions()) and coordinator.need_rejoin()

    def poll_beside_fetching(timeout_ms: float | None = None) -> bool:
        if not joins_with_partitions():
            return bool(poll(timeout_ms=timeout_ms))
        poll(timeout_ms=0)
        return True

    def time_to_next_look() -> float:
        # heartbeats rest during a join, and the vendor would not wait at all for one that is overdue
        return _JOIN_LOOK_S if joins_with_partitions() else float(time_to_next_poll())

    coordinator.poll, coordinator.time_to_next_poll = poll_beside_fetching, time_to_next_look


def leave_promptly(coordinator: ConsumerCoordinator) -> None:
    """To be called before the consumer is closed: where a join is under way, leave over another connection."""
    coordinator.coordinator_id = coordinator.coordinator()


def _commit_while_joining(coordinator: ConsumerCoordinator) -> None:
    known, handle = coordinator.coordinator, coordinator._handle_offset_commit_response

    def coordinator_beside_the_join() -> str | int | None:
        node: str | int | None = known()
        if node is None or coordinator.state is not MemberState.REBALANCING:
            return node
        number = int(str(node).removeprefix(_COORDINATOR_CONNECTION))
        return number if coordinator._cluster.broker_metadata(number) is not None else node

    def generation_unless_lost() -> Generation | None:
        generation = coordinator._generation
        return None if generation.is_lost() else generation

    def handle_offset_commit_response(offsets: Any, send_time: float, response: Any) -> None:
        if coordinator.state is MemberState.REBALANCING:
            codes = {code for _, partitions in response.topics for _, code in partitions}
            if codes & {IllegalGenerationError.errno, RebalanceInProgressError.errno}:
                raise RebalanceInProgressError("the group is rebalancing; the commit can be tried again")
        handle(offsets, send_time, response)

    coordinator.coordinator = coordinator_beside_the_join
    coordinator.generation_if_stable = generation_unless_lost
    coordinator._handle_offset_commit_response = handle_offset_commit_response


def _raise_where_the_name_is_taken(coordinator: ConsumerCoordinator) -> None:
    send, poll = coordinator._send_heartbeat_request, coordinator.poll
    taken: list[FencedInstanceIdError] = []

    async def send_heartbeat_request() -> Any:
        try:
            return await send()
        except FencedInstanceIdError as error:
            taken.append(error)
            raise

    def poll_while_the_name_is_ours(timeout_ms: float | None = None) -> bool:
        if taken:
            raise FencedInstanceIdError("another member with the name of kafka.instance has joined the group")
        return bool(poll(timeout_ms=timeout_ms))

    coordinator._send_heartbeat_request, coordinator.poll = send_heartbeat_request, poll_while_the_name_is_ours
