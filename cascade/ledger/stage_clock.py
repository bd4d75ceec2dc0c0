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

    A stamp is taken once between two stages. CPU time is taken for the whole batch, and a stage counts with its share
    of the wall time: the clock of a thread's CPU time is a system call, and a call for each stage took a seventh of
    the time of a batch of one row. One thread uses an object, for a batch at a time.

    `wall_s` (float64 [stages]), `rows` (int64 [stages]): of each stage of STAGES since `begin`; a stage that has not
    ended has no rows, and its seconds do not count.

    >>> laps = StageLaps()
    >>> laps.begin()
    >>> messages = [b"{}"] * 20
    >>> laps.end("decode", rows=20)
    >>> total = sum(range(1_000))
    >>> laps.skip()
    >>> laps.end("features", rows=20)
    >>> laps.rows.tolist(), laps.wall_ms("decode") > 0.0, 0.0 < laps.cpu_share() < 2.0
    ([0, 20, 20, 0, 0, 0, 0], True, True)
    """

    __slots__ = ("_batch_cpu_s", "_batch_s", "_rows_set", "_start_s", "_wall_set", "rows", "wall_s")

    def __init__(self) -> None:
        self.wall_s, self.rows = np.zeros(len(STAGES)), np.zeros(len(STAGES), np.int64)
        # a number is stored through these in two thirds of the time that the arrays take
        self._wall_set: Any = self.wall_s.data
        self._rows_set: Any = self.rows.data
        self._start_s = self._batch_s = self._batch_cpu_s = 0.0

    def begin(self) -> None:
        """Begins a batch: forgets the last one."""
        self.rows.fill(0)
        self._batch_cpu_s = thread_time()
        self._start_s = self._batch_s = perf_counter()

    def skip(self) -> None:
        """Begins the next stage now: the time since the last stamp belongs to none."""
        self._start_s = perf_counter()

    def end(self, stage: Stage, rows: int) -> None:
        """Ends a stage that has worked on `rows` rows since the last stamp, and begins the next one."""
        now_s, number = perf_counter(), STAGE_NUMBERS[stage]
        self._wall_set[number] = now_s - self._start_s
        self._rows_set[number] = rows
        self._start_s = now_s

    def cpu_share(self) -> float:
        """The CPU time of the calling thread since `begin`, as a share of the wall time.

        It does not include the threads of libraries; the CPU meter of the process does.
        """
        return (thread_time() - self._batch_cpu_s) / (perf_counter() - self._batch_s)

    def wall_ms(self, stage: Stage) -> float:
        """The wall time of a stage that has ended, ms."""
        return float(self._wall_set[STAGE_NUMBERS[stage]] * 1e3)
