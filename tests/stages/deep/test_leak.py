"""The client of Triton over thousands of calls: its memory stays, and late calls do not kill the server.

gRPC clients are known to grow where calls are made one at a time, which is how this one makes them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import psutil
import pytest

from cascade.errors import DeepStageError
from stages.deep import batch_call as module
from stages.deep.batch_call import ABANDONED_MAX
from stages.deep.local_triton import LocalTriton
from stages.deep.triton import TritonDeepStage
from tests.conftest import TinyDeepModel

pytestmark = [pytest.mark.triton]

WARM_UP, CALLS, SAMPLE_EVERY = 500, 3_000, 100
# Two per cent of the process is what a soak may grow by. A leak of one request a call (4 kB) would be 12 MB here.
GROWTH_SHARE_MAX = 0.02


def growth(call: Callable[[], object]) -> float:
    """By what share the resident memory of this process grows over CALLS calls after WARM_UP ones.

    Medians of the samples of the first and of the last quarter: single ones swing by what was just freed.
    """
    process = psutil.Process()
    for _ in range(WARM_UP):
        call()
    samples = []
    for number in range(CALLS):
        call()
        if number % SAMPLE_EVERY == 0:
            samples.append(process.memory_info().rss)
    quarter = len(samples) // 4
    before, after = statistics.median(samples[:quarter]), statistics.median(samples[-quarter:])
    print(f"{before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    return after / before - 1


@pytest.mark.long
def test_calls_that_are_answered_leave_nothing_behind(stage: TritonDeepStage, tiny_deep_model: TinyDeepModel) -> None:
    inputs = tiny_deep_model.inputs(4)
    assert growth(lambda: stage.submit(inputs, 10).result()) < GROWTH_SHARE_MAX
    assert len(stage._requests.abandoned) == 0


@pytest.mark.long
def test_calls_that_are_late_leave_nothing_behind_and_the_server_alive(
    triton: LocalTriton, stage: TritonDeepStage, tiny_deep_model: TinyDeepModel
) -> None:
    inputs = tiny_deep_model.inputs(4)
    chance = random.Random(3)
    usual_s = 0.01
    causes: list[str] = []

    def call() -> None:
        # about the time at which the answer goes out, which the machine's other load may change: half are late
        nonlocal usual_s
        error = stage.submit(inputs, usual_s * chance.uniform(0.5, 1.5)).exception(10)
        causes.append(error.cause if isinstance(error, DeepStageError) else str(error or ""))
        usual_s *= 0.98 if error is None else 1.02

    pid = triton.pid
    assert growth(call) < GROWTH_SHARE_MAX
    assert set(causes) <= {"", "deadline"}
    assert causes.count("deadline") > 500
    assert stage.late_answers > 200
    assert pid is not None
    assert (triton.pid, psutil.pid_exists(pid)) == (pid, True)
    assert len(stage.submit(inputs, 10).result()) == 4


def test_calls_that_a_frozen_server_leaves_are_bounded_in_number_and_time(
    triton: LocalTriton, stage: TritonDeepStage, tiny_deep_model: TinyDeepModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # longer than the machine may stand still between the end of a call's time and the look at what is left
    left_s = 10.0
    monkeypatch.setattr(module, "ABANDONED_S_MAX", left_s)
    inputs = tiny_deep_model.inputs(1)
    left: list[int] = []
    triton.freeze()
    try:
        futures = [stage.submit(inputs, 5.0) for _ in range(ABANDONED_MAX + 100)]
        for future in futures:
            future.add_done_callback(lambda _: left.append(len(stage._requests.abandoned)))
        errors = [future.exception(60) for future in futures]
        give_up_s = time.monotonic() + left_s + 20
        while stage._requests.abandoned and time.monotonic() < give_up_s:
            time.sleep(0.05)
        left_later = len(stage._requests.abandoned)
    finally:
        # it has cancelled calls: a Triton of 2.51 that thaws then may crash (decision 3)
        triton.kill()
        triton.start()
    assert {error.cause for error in errors if isinstance(error, DeepStageError)} == {"deadline"}
    assert len(errors) == ABANDONED_MAX + 100
    assert max(left) == ABANDONED_MAX
    assert left_later == 0
    stage.wait_ready(20)
    assert len(stage.submit(inputs, 10).result()) == 1
