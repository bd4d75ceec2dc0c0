"""The deep stage on a Triton server, over gRPC."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cascade.columns import Float64
from cascade.errors import DeepStageError, ModelServerError
from cascade.protocols import DeepInputs
from stages.deep.answers import checked_scores, probe_inputs
from stages.deep.loop_thread import LoopThread
from stages.deep.signature import BATCH_ROWS_MAX, MODEL_NAME, DeepSignature

_MESSAGE_BYTES_MAX = 64 * 1024 * 1024
# gRPC's default is two minutes, for which a restarted Triton would stay unused.
_RECONNECT_MS_FIRST, _RECONNECT_MS_MAX = 100, 2_000
# Time limit for connecting, which gRPC names the minimum backoff (issue 33423 of grpc/grpc). A refused connection fails
# at once.
_CONNECT_MS_MAX = 2_000
_RETRY_S_FIRST, _RETRY_S_MAX = 0.05, 1.0
_PROBE_TIMEOUT_S = 5.0
# The stage does not cancel a call for which nobody waits any more, but abandons it: the request may run on for so long.
# Triton 2.51 crashes (signal 11, within a thousand late calls) if a client cancels a request while the server sends the
# answer: issues 7368 and 8034 of triton-inference-server/server, which name releases up to 25.01. One also crashed
# when it thawed with cancelled requests, so the time is longer than a server usually hangs. The request's own timeout
# still removes late requests from the server's queue, and the breaker bounds how many are sent.
_ABANDONED_S_MAX = 30.0
# Abandoned calls at a time. At more the stage cancels the oldest, since the server then hangs or is gone.
_ABANDONED_MAX = 256
# How long the end of the stage, or of a probe at the start, waits for late answers before it cancels them.
_CLOSE_S_MAX = 1.0
# Triton answers both with UNAVAILABLE, as gRPC reports a server that is gone. Only the text distinguishes them.
_QUEUE_FULL_TEXTS = ("maximum queue size", "queue is full")
_QUEUE_TIMEOUT_TEXTS = ("timeout expired",)


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """TLS and keep-alive of the connections to Triton.

    - `ssl`, `root_certificates`: whether to use TLS, and the authority that signed the server's certificate (PEM).
    - `private_key`, `certificate_chain`: the client's own certificate (PEM), for mutual TLS.
    - `keepalive_s`: seconds between pings on an idle connection.
    - `keepalive_timeout_s`: seconds without an answer to a ping after which the connection counts as dead.
    """

    ssl: bool = False
    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    # Servers refuse clients that ping an idle connection more often than every five minutes.
    keepalive_s: float = 300.0
    keepalive_timeout_s: float = 10.0

    def channel_arguments(self) -> list[tuple[str, int]]:
        """The options under gRPC's names."""
        return [
            ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS_FIRST),
            ("grpc.min_reconnect_backoff_ms", _CONNECT_MS_MAX),
            ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS_MAX),
            ("grpc.use_local_subchannel_pool", 1),
        ]


class TritonDeepStage:
    """A deep stage (see `cascade.protocols.DeepStage`) that calls a Triton server.

    It uses one long-lived connection, on an asyncio loop in a thread of its own. Create it in the process that uses it:
    after a fork every call fails. Raises ModelServerError if the TLS files of `options` cannot be read.

    - `url`: `host:port` of Triton's gRPC.
    - `signature`: the tensors of the bundle's model.
    - `model`: its name on the server.
    - `hedge_ms`: a call that has no answer after so long is sent a second time, and the first answer counts; 0: never.

    The second call uses a connection of its own: the first connection may be the problem, and a load balancer may
    choose another server. It is additional work for a server that is slow because of its load, so choose a delay that
    few calls exceed. Source: Dean, Barroso, "The Tail at Scale", CACM 2013.

    A call fails at its deadline, but its request may run on for half a minute: see `_ABANDONED_S_MAX`.

    Memory is bounded: connections, stubs and the loop are created once, the caller bounds the calls in flight, and
    `_ABANDONED_MAX` bounds the abandoned ones.
    """

    def __init__(
        self,
        url: str,
        signature: DeepSignature,
        model: str = MODEL_NAME,
        options: GrpcOptions | None = None,
        hedge_ms: float = 0.0,
    ) -> None:
        self.url = url
        self.model = model
        self._signature = signature
        self._options = options or GrpcOptions()
        self._hedge_s = hedge_ms / 1e3
        self.hedged = 0
        self.late_answers = 0
        self._abandoned: dict[asyncio.Task[Float64], None] = {}
        self._loop = LoopThread(f"the client of Triton at {url}")
        try:
            self._client = self._loop.submit(self._connect()).result()
            # the channels share no pool of connections: see `channel_arguments`
            self._hedge_client = self._loop.submit(self._connect()).result() if self._hedge_s else None
        except OSError as error:
            self._loop.close()
            raise ModelServerError(f"{error.filename}: {error.strerror}; check the TLS files of [deep]") from error
        except BaseException:
            self._loop.close()
            raise

    async def _connect(self) -> Any:
        from tritonclient.grpc.aio import InferenceServerClient

        options = self._options
        return InferenceServerClient(
            self.url,
            ssl=options.ssl,
            root_certificates=options.root_certificates,
            private_key=options.private_key,
            certificate_chain=options.certificate_chain,
            channel_args=options.channel_arguments(),
        )

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """See the protocol. More than 256 rows are sent as several concurrent requests."""
        return self._loop.submit(self._score(inputs, time.monotonic() + timeout_s))

    def probe(self, timeout_s: float) -> Future[Float64]:
        """See the protocol."""
        return self.submit(probe_inputs(self._signature), timeout_s)

    async def _score(self, inputs: DeepInputs, deadline: float) -> Float64:
        starts = range(0, len(inputs), BATCH_ROWS_MAX)
        parts = [asyncio.create_task(self._score_batch(_rows(inputs, start), deadline)) for start in starts]
        try:
            return np.concatenate([np.zeros(0, np.float64), *await asyncio.gather(*parts)])
        finally:
            for part in parts:
                part.cancel()

    async def _score_batch(self, inputs: DeepInputs, deadline: float) -> Float64:
        if time.monotonic() >= deadline:
            raise DeepStageError("deadline", "the deadline had passed before the call began")
        calls = [self._call(self._client, inputs, deadline)]
        late = False
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                if self._hedge_client is not None:
                    await asyncio.wait(calls, timeout=self._hedge_s)
                    if not calls[0].done():
                        self.hedged += 1
                        calls.append(self._call(self._hedge_client, inputs, deadline))
                return await _first_answer(calls)
        except TimeoutError:
            late = True
            raise DeepStageError("deadline", f"Triton at {self.url} did not answer in time") from None
        finally:
            for call in calls:
                self._abandon(call, late)

    def _call(self, client: Any, inputs: DeepInputs, deadline: float) -> asyncio.Task[Float64]:
        remaining_s = max(deadline - time.monotonic(), 0.0)
        return asyncio.create_task(self._infer(client, inputs, remaining_s, remaining_s + _ABANDONED_S_MAX))

    def _abandon(self, call: asyncio.Task[Float64], late: bool) -> None:
        """Let a call end for which nobody waits any more. `late`: whether that is because of its deadline."""
        limit = asyncio.get_running_loop().call_later(_ABANDONED_S_MAX, call.cancel)

        def ended(call: asyncio.Task[Float64]) -> None:
            limit.cancel()
            self._abandoned.pop(call, None)
            if not call.cancelled() and call.exception() is None and late:
                self.late_answers += 1

        if call.done():
            ended(call)
            return
        self._abandoned[call] = None
        call.add_done_callback(ended)
        if len(self._abandoned) > _ABANDONED_MAX:
            oldest = next(iter(self._abandoned))
            # here and not in `ended`, which runs one turn of the loop later: this turn may abandon more calls
            del self._abandoned[oldest]
            oldest.cancel()

    async def _infer(self, client: Any, inputs: DeepInputs, remaining_s: float, cancel_s: float) -> Float64:
        """Scores of one request, which may wait `remaining_s` in the server's queue; cancelled after `cancel_s`."""
        from tritonclient.grpc import InferRequestedOutput

        try:
            answer = await client.infer(
                self.model,
                [
                    _tensor(self._signature.sequence_input, inputs.sequence),
                    _tensor(self._signature.features_input, inputs.features),
                ],
                outputs=[InferRequestedOutput(self._signature.output)],
                # for the server's queue, in microseconds: it refuses requests for which nobody waits any more
                timeout=max(int(remaining_s * 1e6), 1),
                client_timeout=cancel_s,
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise self._stage_error(error) from error
        return checked_scores(answer.as_numpy(self._signature.output), len(inputs))

    def _stage_error(self, error: Exception) -> DeepStageError:
        status, text = _status_and_text(error)
        lowered = text.lower()
        cause = "error"
        if status == "DEADLINE_EXCEEDED" or any(part in lowered for part in _QUEUE_TIMEOUT_TEXTS):
            cause = "deadline"
        elif status == "RESOURCE_EXHAUSTED" or any(part in lowered for part in _QUEUE_FULL_TEXTS):
            cause = "queue-full"
        return DeepStageError(cause, f"Triton at {self.url}: {status}: {text}")

    def wait_ready(self, timeout_s: float) -> None:
        """See the protocol."""
        try:
            self._loop.submit(self._wait_ready(time.monotonic() + timeout_s, timeout_s)).result()
        except DeepStageError as error:
            raise ModelServerError(f"the model {self.model} is ready but does not answer: {error}") from error

    async def _wait_ready(self, deadline: float, timeout_s: float) -> None:
        pause_s, problem = _RETRY_S_FIRST, "no answer"
        while True:
            remaining_s = max(deadline - time.monotonic(), 0.0)
            try:
                if await self._client.is_model_ready(self.model, client_timeout=min(remaining_s, _PROBE_TIMEOUT_S)):
                    break
                problem = "the model is not ready"
            except asyncio.CancelledError:
                raise
            except Exception as error:
                problem = ": ".join(_status_and_text(error))
            # jitter, so that workers that start together do not ask at the same moments
            pause = pause_s * random.SystemRandom().uniform(0.5, 1.0)
            if time.monotonic() + pause >= deadline:
                raise ModelServerError(
                    f"Triton at {self.url} did not serve the model {self.model} within {timeout_s:g} s ({problem}); "
                    "start it, or correct deep.url, deep.model and deep.tls with its files"
                )
            await asyncio.sleep(pause)
            pause_s = min(2 * pause_s, _RETRY_S_MAX)
        await self._check_model()
        probe_deadline = max(deadline, time.monotonic() + _PROBE_TIMEOUT_S)
        for client in self._clients():
            await self._probe_until(client, probe_deadline)

    async def _probe_until(self, client: Any, deadline: float) -> None:
        """Score one row. Repeats the call if the queue refuses it, since a model is slow at first, or busy."""
        while True:
            try:
                remaining_s = deadline - time.monotonic()
                await self._infer(client, probe_inputs(self._signature), remaining_s, remaining_s + _CLOSE_S_MAX)
                return
            except DeepStageError as error:
                if error.cause not in ("deadline", "queue-full") or time.monotonic() + _RETRY_S_MAX >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S_MAX * random.SystemRandom().uniform(0.5, 1.0))

    async def _check_model(self) -> None:
        """Compare names, types and shapes of the served model's tensors, and its batch size, with the bundle's."""
        try:
            metadata = await self._client.get_model_metadata(self.model, client_timeout=_PROBE_TIMEOUT_S)
            answer = await self._client.get_model_config(self.model, client_timeout=_PROBE_TIMEOUT_S)
        except Exception as error:
            raise ModelServerError(f"Triton at {self.url}: {': '.join(_status_and_text(error))}") from error
        tensors = (*metadata.inputs, *metadata.outputs)
        actual = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in tensors}
        shapes = self._signature.input_shapes | self._signature.output_shapes
        expected = {name: ("FP32", [-1, *shape]) for name, shape in shapes.items()}
        for name in sorted(actual.keys() | expected.keys()):
            if actual.get(name) != expected.get(name):
                raise ModelServerError(
                    f"Triton at {self.url} serves another {self.model}: tensor {name} is {_shown(actual.get(name))}, in"
                    f" the bundle {_shown(expected.get(name))}; serve the bundle's model, or set bundle.path to the"
                    " bundle of the served model"
                )
        if answer.config.max_batch_size < BATCH_ROWS_MAX:
            raise ModelServerError(
                f"Triton at {self.url} serves {self.model} with max_batch_size {answer.config.max_batch_size}; "
                f"set it to {BATCH_ROWS_MAX}"
            )

    def close(self) -> None:
        """See the protocol. Waits for abandoned calls, at most a second."""
        if self._abandoned:
            with suppress(DeepStageError):
                self._loop.submit(self._wait_for_abandoned()).result()
        self._loop.close(last=self._disconnect)

    async def _wait_for_abandoned(self) -> None:
        if self._abandoned:
            await asyncio.wait(list(self._abandoned), timeout=_CLOSE_S_MAX)

    def _clients(self) -> list[Any]:
        return [self._client] if self._hedge_client is None else [self._client, self._hedge_client]

    async def _disconnect(self) -> None:
        for client in self._clients():
            await client.close()


async def _first_answer(calls: Iterable[asyncio.Task[Float64]]) -> Float64:
    """The scores of the first call that succeeds. If all fail, raises the error of the last."""
    waiting = set(calls)
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        failures = [call.exception() for call in done]
        for call, failure in zip(done, failures, strict=True):
            if failure is None:
                return call.result()
        if not waiting:
            raise next(failure for failure in failures if failure is not None)


def _rows(inputs: DeepInputs, start: int) -> DeepInputs:
    stop = start + BATCH_ROWS_MAX
    return DeepInputs(inputs.sequence[start:stop], inputs.features[start:stop])


def _tensor(name: str, values: Any) -> Any:
    from tritonclient.grpc import InferInput

    tensor = InferInput(name, list(values.shape), "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(values, np.float32))
    return tensor


def _status_and_text(error: Exception) -> tuple[str, str]:
    """Name of the gRPC status, such as `UNAVAILABLE`, and the message as one line."""
    from tritonclient.utils import InferenceServerException

    if not isinstance(error, InferenceServerException):
        return type(error).__name__, " ".join(str(error).split())
    return str(error.status() or "error").removeprefix("StatusCode."), " ".join(str(error.message()).split())


def _shown(tensor: tuple[str, list[int]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {tensor[1]}"
