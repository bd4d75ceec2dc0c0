"""Lets `poll` complete a join that finished between two polls: kafka-python 3.0 discards it.

kafka-python starts to join inside `poll` and continues in the background after the poll's timeout. If the join
finishes before the next poll, that poll discards the result and joins again. A worker with short polls then never gets
a partition, and its group rebalances without end. With this correction the next poll completes the finished join.

At each poll kafka-python also checks whether a join is still needed. If the join itself removed the need (the leader
has assigned a changed topic), no poll completes it: the member sends no heartbeats, is expelled, and goes on with
partitions that others own. With this correction a join that was started stays needed until a poll completes it.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.future import Future


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


def resume_finished_joins(coordinator: ConsumerCoordinator) -> None:
    """Makes this coordinator complete, at the next poll, a join that finished between two polls."""
    join, need_rejoin = coordinator.join_group_async, coordinator.need_rejoin

    async def join_group_async(timeout_ms: float | None = None) -> Any:
        task = coordinator._join_task
        if task is not None and task.is_done:
            coordinator._join_task = _Finished(task)
        return await join(timeout_ms=timeout_ms)

    coordinator.join_group_async = join_group_async
    coordinator.need_rejoin = lambda: coordinator.rejoining or bool(need_rejoin())
