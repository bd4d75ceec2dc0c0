"""What an open-loop load shows: shares and latencies by path, and what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from bench.load import LoadReport
from bench.observer import DEEP, DEGRADED, SCREENED
from bench.open_loop import OpenLoop

LOAD = LoadReport(sent=12, seconds=1.0, behind_ms_p99=0.1, behind_ms_max=0.2)


def seen(latency_ms: list[float], path: list[int]) -> OpenLoop[float]:
    return OpenLoop(12, np.array(latency_ms) / 1e3, np.array(path, np.int64), 1.0, 2.0, LOAD)


def test_shares_are_of_the_decisions_and_the_rest_is_missing() -> None:
    run = seen([1.0] * 10, [SCREENED] * 7 + [DEEP] * 2 + [DEGRADED])
    assert run.missing == 2
    assert run.share_of("degraded") == 0.1
    assert run.share_of("escalated", "degraded") == pytest.approx(0.3)


def test_latencies_are_by_path_and_a_path_that_nobody_took_is_absent() -> None:
    paths = seen([1.0, 3.0, 2.0, 40.0], [SCREENED] * 3 + [DEEP]).path_latencies()
    assert paths.keys() == {"screened", "escalated"}
    assert paths["screened"].count == 3
    assert paths["screened"].p50_ms == pytest.approx(2.0, rel=0.01)
    assert paths["escalated"].p99_ms == pytest.approx(40.0, rel=0.01)


def test_without_a_decision_all_is_missing_and_no_share_is_a_division_by_zero() -> None:
    run = seen([], [])
    assert (run.missing, run.share_of("degraded"), run.path_latencies()) == (12, 0.0, {})
