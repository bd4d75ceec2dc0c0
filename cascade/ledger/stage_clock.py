"""The wall time and the CPU time of a stage, for a batch."""

from __future__ import annotations

import time
from typing import Final, Literal, Self, get_args

Stage = Literal["queue", "decode", "features", "screener", "deep", "decide", "produce"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


class StageClock:
    """Times a `with` block: `wall_s`, and `cpu_s` of the calling thread. It may be used repeatedly, but not nested.

    `cpu_s` does not include the threads of libraries; the CPU meter of the process does.

    >>> clock = StageClock()
    >>> with clock:
    ...     total = sum(range(1_000))
    >>> clock.wall_s > 0.0 and clock.cpu_s >= 0.0
    True
    """

    __slots__ = ("_cpu_start", "_wall_start", "cpu_s", "wall_s")

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cpu_s = 0.0

    def __enter__(self) -> Self:
        self._wall_start = time.perf_counter()
        self._cpu_start = time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = time.thread_time() - self._cpu_start
        self.wall_s = time.perf_counter() - self._wall_start
