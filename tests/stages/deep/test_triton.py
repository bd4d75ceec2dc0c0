"""The deep stage on a real Triton: equal to ONNX Runtime, in time, and clear about what went wrong."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from cascade.columns import Float64
from cascade.errors import DeepStageError, ModelServerError
from cascade.protocols import DeepInputs
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import ServingLimits, write_repository
from stages.deep.triton import TritonDeepStage
from stages.deep.triton_connection import GrpcOptions, TritonConnection
from tests.conftest import TinyDeepModel
from tests.proxy import Proxy
from tests.stages.deep.conftest import failure
from tests.timing import wait_within

pytestmark = pytest.mark.triton


def reference(model: TinyDeepModel, inputs: DeepInputs) -> Float64:
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    (logit,) = session.run(["logit"], {**inputs.sequences, "features": inputs.features})
    scores: Float64 = logit[:, 0].astype(np.float64)
    return scores


@pytest.fixture(scope="module")
def own_triton(
    triton_parts: Path, tiny_deep_model: TinyDeepModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalTriton]:
    """A Triton for tests that end it."""
    out = tmp_path_factory.mktemp("own_triton") / "models"
    repository = write_repository(tiny_deep_model.path, tiny_deep_model.signature, out, "cpu")
    with LocalTriton(repository, parts_dir=triton_parts) as running:
        yield running


@pytest.mark.parametrize("rows", [1, 7, 256, 300])
def test_answers_equal_onnxruntime_in_process(
    stage: TritonDeepStage, tiny_deep_model: TinyDeepModel, rows: int
) -> None:
    inputs = tiny_deep_model.inputs(rows, seed=rows)
    scores = stage.submit(inputs, 10).result()
    assert scores.shape == (rows,)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, reference(tiny_deep_model, inputs), atol=1e-5, rtol=0)


def test_no_rows_are_no_scores(stage: TritonDeepStage, tiny_deep_model: TinyDeepModel) -> None:
    assert stage.submit(tiny_deep_model.inputs(0), 1).result().shape == (0,)


def test_concurrent_calls_get_their_own_answers_and_none_is_forgotten(
    stage: TritonDeepStage, tiny_deep_model: TinyDeepModel
) -> None:
    sizes = [1, 5, 200, 256, 64, 8] * 100
    asked = {size: tiny_deep_model.inputs(size, seed=size) for size in set(sizes)}
    expected = {size: reference(tiny_deep_model, inputs) for size, inputs in asked.items()}
    limit = threading.BoundedSemaphore(16)

    def submit(size: int) -> Future[Float64]:
        limit.acquire()
        future = stage.submit(asked[size], 60)
        future.add_done_callback(lambda _: limit.release())
        return future

    for size, future in [(size, submit(size)) for size in sizes]:
        np.testing.assert_allclose(future.result(), expected[size], atol=1e-5, rtol=0)


def test_a_deadline_that_passes_fails_the_call_as_deadline(
    triton: LocalTriton, stage: TritonDeepStage, tiny_deep_model: TinyDeepModel
) -> None:
    assert failure(stage.submit(tiny_deep_model.inputs(256), 0.0)).cause == "deadline"
    triton.freeze()
    try:
        assert failure(stage.submit(tiny_deep_model.inputs(256), 0.05)).cause == "deadline"
    finally:
        triton.thaw()
    assert len(stage.submit(tiny_deep_model.inputs(3), 5).result()) == 3


def test_after_a_fork_calls_are_refused_instead_of_waiting_for_ever(
    stage: TritonDeepStage, tiny_deep_model: TinyDeepModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as forked:
        forked.setattr("stages.deep.loop_thread.os.getpid", lambda: -1)
        assert "fork" in str(failure(stage.submit(tiny_deep_model.inputs(1), 1)))


def test_a_model_of_another_shape_is_named_at_once(triton: LocalTriton, tiny_deep_model: TinyDeepModel) -> None:
    promised = msgspec.structs.replace(tiny_deep_model.signature, features=9)
    stage = TritonDeepStage(triton.grpc_url, promised)
    with pytest.raises(ModelServerError, match=r"tensor features is FP32 \[-1, 4\], in the bundle FP32 \[-1, 9\]"):
        # the timeout has another message
        stage.wait_ready(60)
    stage.close()


def test_only_the_model_of_the_own_bundle_is_called(triton: LocalTriton, tiny_deep_model: TinyDeepModel) -> None:
    digests = {"own": hashlib.sha256(tiny_deep_model.path.read_bytes()).hexdigest(), "other": "0" * 64}
    stages = {
        name: TritonDeepStage(triton.grpc_url, tiny_deep_model.signature, digest=digest)
        for name, digest in digests.items()
    }
    try:
        stages["own"].wait_ready(20)
        assert len(stages["own"].submit(tiny_deep_model.inputs(3), 10).result()) == 3
        with pytest.raises(ModelServerError, match=r"another bundle's fraud_deep \(SHA-256"):
            stages["other"].wait_ready(1)
        assert "another bundle's" in str(failure(stages["other"].submit(tiny_deep_model.inputs(3), 10)))
        assert [state.calls for state in stages["other"].replicas()] == [0]
    finally:
        for stage in stages.values():
            stage.close()


def test_a_model_that_is_not_served_is_named_after_the_timeout(
    triton: LocalTriton, tiny_deep_model: TinyDeepModel
) -> None:
    stage = TritonDeepStage(triton.grpc_url, tiny_deep_model.signature, model="absent")
    with pytest.raises(ModelServerError, match=r"did not serve the model absent within 0.3 s .*deep.model") as caught:
        stage.wait_ready(0.3)
    assert "\n" not in str(caught.value)
    stage.close()


def test_a_certificate_file_that_is_missing_is_named(tiny_deep_model: TinyDeepModel, tmp_path: Path) -> None:
    options = GrpcOptions(ssl=True, root_certificates=tmp_path / "absent.pem")
    with pytest.raises(ModelServerError, match=r"absent\.pem"):
        TritonDeepStage("127.0.0.1:1", tiny_deep_model.signature, options=options)


def test_a_server_that_stops_is_an_error_and_is_used_again_when_it_is_back(
    own_triton: LocalTriton, tiny_deep_model: TinyDeepModel
) -> None:
    server = own_triton
    with closing(TritonDeepStage(server.grpc_url, tiny_deep_model.signature)) as stage:
        stage.wait_ready(10)
        server.kill()
        assert failure(stage.submit(tiny_deep_model.inputs(1), 2)).cause == "error"
        with pytest.raises(ModelServerError, match=r"did not serve the model fraud_deep within 0.5 s"):
            stage.wait_ready(0.5)
        server.start()
        stage.wait_ready(10)
        assert len(stage.submit(tiny_deep_model.inputs(2), 5).result()) == 2


def test_close_leaves_no_thread_and_fails_what_waits(own_triton: LocalTriton, tiny_deep_model: TinyDeepModel) -> None:
    # Calls that end with their connection can crash Triton 2.51 (decision 3): this is its last test.
    before = set(threading.enumerate())
    stage = TritonDeepStage(own_triton.grpc_url, tiny_deep_model.signature)
    stage.wait_ready(10)
    waiting = [stage.submit(tiny_deep_model.inputs(256), 10) for _ in range(50)]
    stage.close()
    stage.close()
    assert all(future.done() for future in waiting)
    assert failure(stage.submit(tiny_deep_model.inputs(1), 1)).cause == "error"

    # gRPC has one thread for all connections of a process, which ends when the last of them is garbage; the thread of a
    # connection ends soon after the connection
    def left() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - before if "_poll_wrapper" not in thread.name]

    wait_within(10.0, lambda: not left(), "threads of the connections end")


def test_a_connection_that_takes_its_time_is_not_given_up(triton: LocalTriton, tiny_deep_model: TinyDeepModel) -> None:
    host, _, port = triton.grpc_url.partition(":")
    with Proxy(host, int(port)) as far:
        far.delay(0.3)
        with closing(TritonDeepStage(f"127.0.0.1:{far.port}", tiny_deep_model.signature)) as stage:
            stage.wait_ready(30)
            assert far.made == 1


def test_a_model_that_is_busy_at_the_start_is_asked_again(
    triton_parts: Path, slow_deep_model: TinyDeepModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ServingLimits(queue_requests_max=1, queue_timeout_us=500_000)
    repository = write_repository(slow_deep_model.path, slow_deep_model.signature, tmp_path / "models", "cpu", limits)
    refused = refused_probes(monkeypatch)
    with (
        LocalTriton(repository, parts_dir=triton_parts) as server,
        closing(TritonDeepStage(server.grpc_url, slow_deep_model.signature)) as first,
        ThreadPoolExecutor(1) as starting,
    ):
        first.wait_ready(30)
        busy: list[Future[Float64]] = []
        give_up_s = time.monotonic() + 60
        while not refused and time.monotonic() < give_up_s:
            # where the second stage finds a gap, another one starts
            with closing(TritonDeepStage(server.grpc_url, slow_deep_model.signature)) as second:
                ready = starting.submit(second.wait_ready, 60)
                while not refused and not ready.done() and time.monotonic() < give_up_s:
                    busy = [future for future in busy if not future.done()]
                    busy += [first.submit(slow_deep_model.inputs(256), 8) for _ in range(3 - len(busy))]
                    time.sleep(0.01)
                ready.result()
    assert refused


def refused_probes(monkeypatch: pytest.MonkeyPatch) -> list[DeepStageError]:
    """What is refused of the calls with one row from now on."""
    refused: list[DeepStageError] = []
    infer = TritonConnection.infer

    async def listen(connection: TritonConnection, inputs: DeepInputs, *limits: Any) -> Float64:
        try:
            return await infer(connection, inputs, *limits)
        except DeepStageError as error:
            if len(inputs) == 1:
                refused.append(error)
            raise

    monkeypatch.setattr(TritonConnection, "infer", listen)
    return refused


def test_a_full_queue_is_queue_full_and_a_request_that_waits_too_long_is_deadline(
    triton_parts: Path, slow_deep_model: TinyDeepModel, tmp_path: Path
) -> None:
    limits = ServingLimits(queue_requests_max=2, queue_timeout_us=20_000)
    repository = write_repository(slow_deep_model.path, slow_deep_model.signature, tmp_path / "models", "cpu", limits)
    causes: set[str] = set()
    with (
        LocalTriton(repository, parts_dir=triton_parts) as server,
        closing(TritonDeepStage(server.grpc_url, slow_deep_model.signature)) as stage,
    ):
        stage.wait_ready(30)
        # More than once: with a queue policy this Triton's batcher sleeps at times (decision 0003), and all time out.
        for _ in range(10):
            # Full batches do not merge: each takes the model for itself.
            futures = [stage.submit(slow_deep_model.inputs(256), 8) for _ in range(10)]
            errors = [future.exception(20) for future in futures]
            causes |= {error.cause if isinstance(error, DeepStageError) else str(error) for error in errors}
            if len(causes) == 3:
                break
    assert causes == {"None", "queue-full", "deadline"}
