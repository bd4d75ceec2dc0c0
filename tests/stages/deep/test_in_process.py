"""The deep stage in process: same answers, same causes of failure, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from cascade.errors import BundleError, DeepStageError, SettingError
from stages.deep.in_process import OnnxDeepStage
from tests.conftest import TinyDeepModel


@pytest.fixture
def stage(tiny_deep_model: TinyDeepModel) -> Iterator[OnnxDeepStage]:
    made = OnnxDeepStage(tiny_deep_model.path, tiny_deep_model.signature)
    made.wait_ready(10)
    yield made
    made.close()


@pytest.mark.parametrize("rows", [0, 1, 7, 256, 600])
def test_answers_equal_a_plain_session(stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel, rows: int) -> None:
    inputs = tiny_deep_model.inputs(rows, seed=rows)
    session = onnxruntime.InferenceSession(str(tiny_deep_model.path))
    (logit,) = session.run(["logit"], {"sequence": inputs.sequence, "features": inputs.features})
    np.testing.assert_allclose(stage.submit(inputs, 5).result(), logit[:, 0], atol=1e-6, rtol=0)


def test_a_call_that_still_runs_at_its_deadline_fails_then(slow_deep_model: TinyDeepModel) -> None:
    stage = OnnxDeepStage(slow_deep_model.path, slow_deep_model.signature)
    started = time.monotonic()
    stage.wait_ready(30)
    full_s = time.monotonic() - started
    started = time.monotonic()
    running, waiting = (stage.submit(slow_deep_model.inputs(1), full_s / 10) for _ in range(2))
    for future in (running, waiting):
        error = future.exception(timeout=5)
        assert isinstance(error, DeepStageError)
        assert error.cause == "deadline"
    assert time.monotonic() - started < full_s / 2
    stage.close()


def test_a_full_queue_refuses_and_frees_its_places_again(slow_deep_model: TinyDeepModel) -> None:
    stage = OnnxDeepStage(slow_deep_model.path, slow_deep_model.signature, queue_calls_max=1)
    futures = [stage.submit(slow_deep_model.inputs(1), 10) for _ in range(4)]
    causes = [getattr(future.exception(timeout=20), "cause", "") for future in futures]
    assert causes == ["", "", "queue-full", "queue-full"]
    assert len(stage.submit(slow_deep_model.inputs(1), 10).result()) == 1
    stage.close()


def test_rows_of_another_shape_are_an_error_of_that_call_only(
    stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel
) -> None:
    good = tiny_deep_model.inputs(2)
    bad = type(good)(good.sequence, np.zeros((2, 99), np.float32))
    error = stage.submit(bad, 5).exception()
    assert isinstance(error, DeepStageError)
    assert error.cause == "error"
    assert len(stage.submit(good, 5).result()) == 2


def test_scores_that_are_not_finite_are_an_error(stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel) -> None:
    inputs = tiny_deep_model.inputs(2)
    inputs.features[1, 0] = np.nan
    assert "not finite" in str(stage.submit(inputs, 5).exception())


def test_a_file_that_is_not_the_promised_model_is_refused(tiny_deep_model: TinyDeepModel, tmp_path: Path) -> None:
    other = msgspec.structs.replace(tiny_deep_model.signature, sequence_length=6)
    with pytest.raises(BundleError, match=r"export it again"):
        OnnxDeepStage(tiny_deep_model.path, other)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(BundleError, match=r"broken.onnx"):
        OnnxDeepStage(broken, tiny_deep_model.signature)


def test_close_leaves_no_thread(tiny_deep_model: TinyDeepModel) -> None:
    before = set(threading.enumerate())
    stage = OnnxDeepStage(tiny_deep_model.path, tiny_deep_model.signature)
    stage.wait_ready(10)
    stage.close()
    stage.close()
    error = stage.submit(tiny_deep_model.inputs(1), 1).exception()
    assert isinstance(error, DeepStageError)
    assert set(threading.enumerate()) - before == set()


def test_a_device_that_is_not_there_is_said_in_a_line(tiny_deep_model: TinyDeepModel) -> None:
    with pytest.raises(SettingError, match=r"^configuration: deep.device = 'cuda': .*; .*$"):
        OnnxDeepStage(tiny_deep_model.path, tiny_deep_model.signature, device="cuda")
