"""Joining a group across short polls, which kafka-python 3.0 does not manage.

The vendor starts to join inside `poll` and goes on in the background when the poll's time is up. If the join
finishes before the next poll, that poll throws the result away and joins again, so that a worker with short polls
and something to do in between never gets a partition, and keeps the rest of its group rebalancing. Here the next
poll takes up the finished join.
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
    join = coordinator.join_group_async

    async def join_group_async(timeout_ms: float | None = None) -> Any:
        task = coordinator._join_task
        if task is not None and task.is_done:
            coordinator._join_task = _Finished(task)
        return await join(timeout_ms=timeout_ms)

    coordinator.join_group_async = join_group_async
