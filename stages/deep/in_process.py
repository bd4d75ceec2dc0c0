"""The deep stage without a model server: ONNX Runtime on the CPU or a GPU, in a thread of the worker."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from cascade.columns import Float64
from cascade.errors import BundleError, DeepStageError, ModelServerError, SettingError
from cascade.protocols import DeepInputs
from stages.deep.answers import checked_scores, probe_inputs
from stages.deep.deadlines import Deadlines, complete
from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature

# Calls that may wait for the thread. For further calls the screener decides at once; their answers would be late.
QUEUE_CALLS_MAX = 64

Device = Literal["cpu", "cuda"]
_PROVIDERS: Final[dict[Device, str]] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# The model was trained in FP32, and the CPU computes in it; TF32 would round the factors to 10 bits of mantissa.
_OPTIONS: Final[dict[Device, dict[str, str]]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


class _Call(NamedTuple):
    inputs: DeepInputs
    deadline_s: float
    future: Future[Float64]


class OnnxDeepStage:
    """A deep stage (see `cascade.protocols.DeepStage`) that runs the ONNX file in this process, one call at a time.

    - `threads`: CPU threads of a run.
    - `queue_calls_max`: calls that may wait; further calls fail with cause `queue-full`.
    - `device`: `cuda` is the first visible GPU, and needs onnxruntime-gpu.

    Raises BundleError if the file is not the model that `signature` describes, SettingError if the device cannot be
    used.
    """

    def __init__(
        self,
        onnx_path: Path,
        signature: DeepSignature,
        threads: int = 1,
        queue_calls_max: int = QUEUE_CALLS_MAX,
        device: Device = "cpu",
    ) -> None:
        self.hedged = 0
        self.late_answers = 0
        self._signature = signature
        self._session = _open_session(Path(onnx_path), threads, device)
        _check_session(self._session, signature, Path(onnx_path))
        self._owner_pid = os.getpid()
        self._closed = False
        # a call that timed out occupies its place until the thread is done with it
        self._places = threading.BoundedSemaphore(1 + queue_calls_max)
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._deadlines = Deadlines("the deep model did not answer in time")
        self._thread = threading.Thread(target=self._work, name="deep model", daemon=True)
        self._thread.start()

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """See the protocol."""
        call = _Call(inputs, time.monotonic() + timeout_s, Future())
        refusal = self._refusal(timeout_s)
        if refusal is not None:
            call.future.set_exception(refusal)
        else:
            self._deadlines.add(call.future, call.deadline_s)
            self._calls.put(call)
        return call.future

    def probe(self, timeout_s: float) -> Future[Float64]:
        """See the protocol."""
        return self.submit(probe_inputs(self._signature), timeout_s)

    def _refusal(self, timeout_s: float) -> DeepStageError | None:
        """Why a call is not taken; None if it has a place now."""
        if os.getpid() != self._owner_pid:
            return DeepStageError("error", "the deep stage was created before a fork; create it in this process")
        if self._closed:
            return DeepStageError("error", "the deep stage is closed")
        if timeout_s <= 0:
            return DeepStageError("deadline", "the deadline had passed before the call began")
        if not self._places.acquire(blocking=False):
            return DeepStageError("queue-full", "too many calls wait for the deep model")
        return None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            outcome = DeepStageError("error", "the deep stage was closed") if self._closed else self._outcome(call)
            # before the caller knows, who may send the next call
            self._places.release()
            if not complete(call.future, outcome) and not isinstance(outcome, DeepStageError):
                self.late_answers += 1

    def _outcome(self, call: _Call) -> Float64 | DeepStageError:
        try:
            return self._run(call.inputs, call.deadline_s)
        except DeepStageError as error:
            return error

    def _run(self, inputs: DeepInputs, deadline_s: float) -> Float64:
        scores = [np.zeros(0, np.float64)]
        for start in range(0, len(inputs), BATCH_ROWS_MAX):
            if time.monotonic() >= deadline_s:
                raise DeepStageError("deadline", "the deadline had passed before the deep model could begin")
            stop = min(start + BATCH_ROWS_MAX, len(inputs))
            try:
                feeds = self._signature.tensors(inputs.take(slice(start, stop)))
                output = self._session.run([self._signature.output], feeds)[0]
            except Exception as error:  # ONNX Runtime's exceptions have no other common base
                raise DeepStageError("error", f"ONNX Runtime failed: {' '.join(str(error).split())}") from error
            scores.append(checked_scores(output, stop - start))
        return np.concatenate(scores)

    def wait_ready(self, timeout_s: float) -> None:
        """See the protocol."""
        try:
            self.probe(timeout_s).result()
        except DeepStageError as error:
            raise ModelServerError(f"the deep model in this process does not answer: {error}") from error

    def close(self) -> None:
        """See the protocol. Waits for the call that runs."""
        if self._closed or os.getpid() != self._owner_pid:
            return
        self._closed = True
        self._calls.put(None)
        self._thread.join()
        self._deadlines.close()


def _open_session(path: Path, threads: int, device: Device) -> Any:
    import onnxruntime

    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        remedy = "install onnxruntime-gpu in place of onnxruntime, or use cpu"
        raise SettingError("configuration", "deep.device", device, f"this ONNX Runtime has no {provider}", remedy)
    if device == "cuda":
        # loads CUDA and cuDNN from NVIDIA's Python packages if they are installed; the loader finds the system's itself
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # a thread that spins while it waits would consume the energy that the service saves
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, _OPTIONS[device])])
    except Exception as error:
        raise BundleError(f"{path}: cannot be loaded as an ONNX model ({' '.join(str(error).split())})") from error
    if provider not in session.get_providers():  # ONNX Runtime fell back to the CPU with a warning
        remedy = "check nvidia-smi, and that CUDA and cuDNN have the versions that this onnxruntime-gpu needs"
        raise SettingError("configuration", "deep.device", device, f"{provider} does not start", remedy)
    return session


def _check_session(session: Any, signature: DeepSignature, path: Path) -> None:
    tensors = [*session.get_inputs(), *session.get_outputs()]
    actual = {tensor.name: (tensor.type, tuple(tensor.shape[1:])) for tensor in tensors}
    shapes = signature.input_shapes | signature.output_shapes
    expected = {name: ("tensor(float)", shape) for name, shape in shapes.items()}
    if actual != expected:
        raise BundleError(f"{path}: the model has the tensors {actual}, its bundle {expected}; export it again")
