"""Hedging: a call without an answer is sent again over another connection, and the first answer counts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from stages.deep import batch_call as module
from stages.deep.local_triton import LocalTriton
from stages.deep.triton import TritonDeepStage
from tests.conftest import TinyDeepModel
from tests.proxy import Proxy
from tests.stages.deep.conftest import StageMaker, failure

HEDGE_MS = 100.0


@pytest.fixture
def proxy(triton: LocalTriton) -> Iterator[Proxy]:
    host, _, port = triton.grpc_url.partition(":")
    with Proxy(host, int(port)) as between:
        yield between


def calls_under_way(stage: TritonDeepStage) -> int:
    """Number of calls that run on after the abandoned ones had time to end."""
    give_up_s = time.monotonic() + 20
    while (calls := len(stage._requests.abandoned)) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    return calls


@pytest.mark.triton
def test_a_clogged_connection_is_passed_by(
    proxy: Proxy,
    new_stage: StageMaker,
    tiny_deep_model: TinyDeepModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the abandoned calls get no answer
    monkeypatch.setattr(module, "ABANDONED_S_MAX", 1.0)
    stage = new_stage(f"127.0.0.1:{proxy.port}", hedge_ms=HEDGE_MS)
    inputs = tiny_deep_model.inputs(3)
    expected = stage.submit(inputs, 5).result()
    assert stage.hedged == 0
    proxy.pause(connections=1)
    for call in range(3):
        started = time.monotonic()
        np.testing.assert_array_equal(stage.submit(inputs, 10).result(), expected)
        assert HEDGE_MS / 1e3 <= time.monotonic() - started < 8
        assert stage.hedged == call + 1
    assert calls_under_way(stage) == 0


@pytest.mark.triton
def test_without_hedging_a_clogged_connection_is_the_end_of_the_call(
    proxy: Proxy, new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(f"127.0.0.1:{proxy.port}", hedge_ms=0.0)
    proxy.pause(connections=1)
    assert failure(stage.submit(tiny_deep_model.inputs(3), 0.5)).cause == "deadline"
    assert stage.hedged == 0


@pytest.mark.triton
def test_what_is_answered_in_time_is_asked_once(
    triton: LocalTriton, new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(triton.grpc_url, hedge_ms=5_000.0)
    assert all(len(stage.submit(tiny_deep_model.inputs(2), 5).result()) == 2 for _ in range(20))
    assert stage.hedged == 0


@pytest.mark.triton
def test_a_frozen_server_ends_both_calls_at_the_deadline(
    triton: LocalTriton, new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(triton.grpc_url, hedge_ms=HEDGE_MS)
    triton.freeze()
    try:
        started = time.monotonic()
        error = failure(stage.submit(tiny_deep_model.inputs(3), 2.0))
        passed_s = time.monotonic() - started
    finally:
        triton.thaw()
    assert (error.cause, stage.hedged) == ("deadline", 1)
    assert 1.99 < passed_s < 20.0
    assert calls_under_way(stage) == 0
    assert len(stage.submit(tiny_deep_model.inputs(3), 10).result()) == 3
