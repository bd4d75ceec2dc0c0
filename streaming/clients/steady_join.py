"""Joining a group across short polls, which kafka-python 3.0 does not manage.

The vendor starts to join inside `poll` and goes on in the background when the poll's time is up. If the join
finishes before the next poll, that poll throws the result away and joins again, so that a worker with short polls
and something to do in between never gets a partition, and keeps the rest of its group rebalancing. Here the next
poll takes up the finished join.

The vendor also asks at each poll whether there is still a reason to join. Where the join itself ended the reason (the
leader has seen that a topic has changed, and assigned it), nobody takes up the join that is over: the member sends no
heartbeats any more, is thrown out, and goes on with partitions that are another's by then. Here a join that was begun
is reason enough until it is taken up.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.future import Future


class _Finished(Future):  # type: ignore[misc]  # the vendor has no types
    """Looks unfinished until someone waits for it, then has the result of `task`."""

    __slots__ = ("_task",)

    def __init__(self, task: Future) -> None:
        super().__init__()
        self._task = task

    def add_errback(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        # the vendor adds the callback first: with the errback, both are there
        added = super().add_errback(f, *args, **kwargs)
        if not self.is_done:
            self._task.chain(self)
        return added


def keep_finished_joins(coordinator: ConsumerCoordinator) -> None:
    """Make this coordinator take up a join that finished between two polls."""
    join, need_rejoin = coordinator.join_group_async, coordinator.need_rejoin

    async def join_group_async(timeout_ms: float | None = None) -> Any:
        task = coordinator._join_task
        if task is not None and task.is_done:
            coordinator._join_task = _Finished(task)
        return await join(timeout_ms=timeout_ms)

    coordinator.join_group_async = join_group_async
    coordinator.need_rejoin = lambda: coordinator.rejoining or bool(need_rejoin())
