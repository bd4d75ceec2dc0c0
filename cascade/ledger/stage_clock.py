"""The wall time and the CPU time of the stages of a batch."""

from __future__ import annotations

from time import perf_counter, thread_time
from typing import Any, Final, Literal, get_args

import numpy as np

Stage = Literal["queue", "decode", "features", "screener", "deep", "decide", "produce"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
STAGE_NUMBERS: Final = {stage: number for number, stage in enumerate(STAGES)}


class StageLaps:
    """Times the consecutive stages of a batch: `begin`, then `end` for each stage as it ends.

    A stamp is taken once between two stages. It costs about half a microsecond, most of it for the CPU time of the
    thread, which is a system call. One thread uses an object, for a batch at a time.

    `wall_s`, `cpu_s` (float64 [stages]), `rows` (int64 [stages]): of each stage of STAGES since `begin`; a stage that
    has not ended has no rows, and its seconds do not count. `cpu_s` is of the calling thread. It does not include the
    threads of libraries; the CPU meter of the process does.

    >>> laps = StageLaps()
    >>> laps.begin()
    >>> messages = [b"{}"] * 20
    >>> laps.end("decode", rows=20)
    >>> total = sum(range(1_000))
    >>> laps.skip()
    >>> laps.end("features", rows=20)
    >>> laps.rows.tolist(), laps.wall_ms("decode") > 0.0
    ([0, 20, 20, 0, 0, 0, 0], True)
    """

    __slots__ = ("_cpu_set", "_cpu_start", "_rows_set", "_wall_set", "_wall_start", "cpu_s", "rows", "wall_s")

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = np.zeros(len(STAGES)), np.zeros(len(STAGES))
        self.rows = np.zeros(len(STAGES), np.int64)
        # a number is stored through these in two thirds of the time that the arrays take
        self._wall_set: Any = self.wall_s.data
        self._cpu_set: Any = self.cpu_s.data
        self._rows_set: Any = self.rows.data
        self._wall_start = self._cpu_start = 0.0

    def begin(self) -> None:
        """Begins a batch: forgets the last one."""
        self.rows.fill(0)
        self.skip()

    def skip(self) -> None:
        """Begins the next stage now: the time since the last stamp belongs to none."""
        self._wall_start, self._cpu_start = perf_counter(), thread_time()

    def end(self, stage: Stage, rows: int) -> None:
        """Ends a stage that has worked on `rows` rows since the last stamp, and begins the next one."""
        wall_s, cpu_s = perf_counter(), thread_time()
        number = STAGE_NUMBERS[stage]
        self._wall_set[number] = wall_s - self._wall_start
        self._cpu_set[number] = cpu_s - self._cpu_start
        self._rows_set[number] = rows
        self._wall_start, self._cpu_start = wall_s, cpu_s

    def wall_ms(self, stage: Stage) -> float:
        """The wall time of a stage that has ended, ms."""
        return float(self._wall_set[STAGE_NUMBERS[stage]] * 1e3)
