"""The deep stage without a model server: ONNX Runtime on the CPU or a GPU, in a thread of the worker."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from cascade.columns import Float64
from cascade.errors import BundleError, DeepStageError, ModelServerError, SettingError
from cascade.protocols import DeepInputs
from stages.deep.answers import checked_scores, probe_inputs
from stages.deep.loop_thread import LoopThread
from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature

# Calls that may wait for the thread. For further calls the screener decides at once; their answers would be late.
QUEUE_CALLS_MAX = 64

Device = Literal["cpu", "cuda"]
_PROVIDERS: Final[dict[Device, str]] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# The model was trained in FP32, and the CPU computes in it; TF32 would round the factors to 10 bits of mantissa.
_OPTIONS: Final[dict[Device, dict[str, str]]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


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
        self._places = threading.BoundedSemaphore(1 + queue_calls_max)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="deep model")
        self._loop = LoopThread("the deep stage")

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """See the protocol."""
        return self._loop.submit(self._score(inputs, time.monotonic() + timeout_s))

    def probe(self, timeout_s: float) -> Future[Float64]:
        """See the protocol."""
        return self.submit(probe_inputs(self._signature), timeout_s)

    async def _score(self, inputs: DeepInputs, deadline: float) -> Float64:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeepStageError("deadline", "the deadline had passed before the call began")
        if not self._places.acquire(blocking=False):
            raise DeepStageError("queue-full", "too many calls wait for the deep model")
        call = self._executor.submit(self._run, inputs, deadline)
        # A call that timed out occupies its place until the thread is done with it.
        call.add_done_callback(lambda _: self._places.release())
        try:
            async with asyncio.timeout(remaining_s):
                return await asyncio.wrap_future(call)
        except TimeoutError:
            raise DeepStageError("deadline", "the deep model did not answer in time") from None

    def _run(self, inputs: DeepInputs, deadline: float) -> Float64:
        scores = [np.zeros(0, np.float64)]
        for start in range(0, len(inputs), BATCH_ROWS_MAX):
            if time.monotonic() >= deadline:
                raise DeepStageError("deadline", "the deadline had passed before the deep model could begin")
            stop = min(start + BATCH_ROWS_MAX, len(inputs))
            feeds = {
                self._signature.sequence_input: np.ascontiguousarray(inputs.sequence[start:stop], np.float32),
                self._signature.features_input: np.ascontiguousarray(inputs.features[start:stop], np.float32),
            }
            try:
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
        """See the protocol."""
        self._loop.close()
        self._executor.shutdown(wait=True, cancel_futures=True)


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
