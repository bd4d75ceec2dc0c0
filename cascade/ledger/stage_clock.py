"""What a stage takes of the wall and of the processor, a batch at a time."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Literal, Self, get_args

Stage = Literal["queue", "decode", "features", "screener", "deep", "decide", "produce"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


class StageClock:
    """Times a block: `wall_s`, and `cpu_s` of the calling thread; usable again and again, not nested in itself.

    Work that a library does on threads of its own is outside `cpu_s`; the process-wide meter has it.

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cpu_s = time.thread_time() - self._cpu_start
        self.wall_s = time.perf_counter() - self._wall_start
