"""The deep stage in process: equal to a plain session, with a cause for each failure, and no threads after its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from cascade.errors import BundleError, SettingError
from stages.deep.in_process import OnnxDeepStage
from tests.conftest import TinyDeepModel
from tests.stages.deep.conftest import failure
from tests.timing import wait_until


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
    (logit,) = session.run(["logit"], {**inputs.sequences, "features": inputs.features})
    np.testing.assert_allclose(stage.submit(inputs, 5).result(), logit[:, 0], atol=1e-6, rtol=0)


class BlockedSession:
    """An ONNX session whose runs wait until `released`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.waits, self.released = threading.Event(), threading.Event()

    def run(self, *arguments: Any) -> Any:
        self.waits.set()
        assert self.released.wait(60)
        return self._session.run(*arguments)


def blocked(stage: OnnxDeepStage) -> BlockedSession:
    stage._session = BlockedSession(stage._session)
    return stage._session


def test_calls_fail_at_their_deadline_while_one_still_runs(
    stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel
) -> None:
    session = blocked(stage)
    running, waiting = (stage.submit(tiny_deep_model.inputs(1), 0.2) for _ in range(2))
    assert failure(running).cause == failure(waiting).cause == "deadline"
    session.released.set()
    assert len(stage.submit(tiny_deep_model.inputs(1), 20).result()) == 1
    # of the two, the one that ran was answered too late; the other had no time left to begin
    assert stage.late_answers == 1


def test_after_a_fork_calls_are_refused_instead_of_waiting_for_ever(
    stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as forked:
        forked.setattr("stages.deep.in_process.os.getpid", lambda: -1)
        assert "fork" in str(failure(stage.submit(tiny_deep_model.inputs(1), 1)))


def test_calls_that_wait_at_the_end_fail_and_the_one_that_runs_is_answered(tiny_deep_model: TinyDeepModel) -> None:
    stage = OnnxDeepStage(tiny_deep_model.path, tiny_deep_model.signature)
    session = blocked(stage)
    running, waiting = (stage.submit(tiny_deep_model.inputs(1), 60) for _ in range(2))
    wait_until(session.waits.is_set)
    ending = threading.Thread(target=stage.close)
    ending.start()
    wait_until(lambda: stage._closed)
    session.released.set()
    ending.join()
    assert len(running.result(0)) == 1
    assert failure(waiting).cause == "error"


def test_a_full_queue_refuses_and_frees_its_places_again(tiny_deep_model: TinyDeepModel) -> None:
    stage = OnnxDeepStage(tiny_deep_model.path, tiny_deep_model.signature, queue_calls_max=1)
    session = blocked(stage)
    running, waiting, *refused = (stage.submit(tiny_deep_model.inputs(1), 60) for _ in range(4))
    assert [failure(future).cause for future in refused] == ["queue-full"] * 2
    session.released.set()
    assert len(running.result()) == len(waiting.result()) == 1
    assert len(stage.submit(tiny_deep_model.inputs(1), 20).result()) == 1
    stage.close()


def test_rows_of_another_shape_are_an_error_of_that_call_only(
    stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel
) -> None:
    good = tiny_deep_model.inputs(2)
    bad = type(good)(good.sequences, np.zeros((2, 99), np.float32))
    assert failure(stage.submit(bad, 5)).cause == "error"
    assert len(stage.submit(good, 5).result()) == 2


def test_scores_that_are_not_finite_are_an_error(stage: OnnxDeepStage, tiny_deep_model: TinyDeepModel) -> None:
    inputs = tiny_deep_model.inputs(2)
    inputs.features[1, 0] = np.nan
    assert "not finite" in str(stage.submit(inputs, 5).exception())


def test_a_file_that_is_not_the_bundles_model_is_refused(tiny_deep_model: TinyDeepModel, tmp_path: Path) -> None:
    other = msgspec.structs.replace(
        tiny_deep_model.signature, sequences={"card_sequence": (6, 3), "terminal_sequence": (2, 6)}
    )
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
    assert failure(stage.submit(tiny_deep_model.inputs(1), 1)).cause == "error"
    assert set(threading.enumerate()) - before == set()


def test_an_absent_device_is_reported_in_one_line(tiny_deep_model: TinyDeepModel) -> None:
    with pytest.raises(SettingError, match=r"^configuration: deep.device = 'cuda': .*; .*$"):
        OnnxDeepStage(tiny_deep_model.path, tiny_deep_model.signature, device="cuda")
