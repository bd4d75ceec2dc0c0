"""The deep stage on Triton, over gRPC."""

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
# gRPC's own limit is two minutes: a Triton that is back would stay unused that long.
_RECONNECT_MS_FIRST, _RECONNECT_MS_MAX = 100, 2_000
# How long a connection may take; gRPC calls it the least pause (issue 33423 of grpc/grpc). A refused one tells at once.
_CONNECT_MS_MAX = 2_000
_RETRY_S_FIRST, _RETRY_S_MAX = 0.05, 1.0
_PROBE_TIMEOUT_S = 5.0
# A call that nobody waits for any more is not cancelled, but left to end by itself for so long. Cancelling it as its
# answer goes out is a race that Triton 2.51 loses: seen, it died of signal 11 within a thousand late calls (issues 7368
# and 8034 of triton-inference-server/server, which name releases up to 25.01). The server drops what is late from its
# queue by the request's own timeout all the same.
_LEFT_S = 1.0
# Calls left to themselves; beyond it the one left first is cancelled: by then the server hangs, or is gone.
_LEFT_MAX = 256
# Triton answers both with UNAVAILABLE, which is also what a server that is gone looks like: the text tells.
_QUEUE_FULL_TEXTS = ("maximum queue size", "queue is full")
_QUEUE_TIMEOUT_TEXTS = ("timeout expired",)


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """How to reach Triton.

    `ssl` with `root_certificates` (the authority), and for mutual TLS `private_key` and `certificate_chain`: PEM
    files. `keepalive_s`: seconds between pings on a quiet connection, `keepalive_timeout_s`: seconds without an
    answer after which the connection counts as dead.
    """

    ssl: bool = False
    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    # Servers refuse clients that ping more often than every five minutes without a call.
    keepalive_s: float = 300.0
    keepalive_timeout_s: float = 10.0

    def channel_arguments(self) -> list[tuple[str, int]]:
        """The options as gRPC names them."""
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
    """A deep stage (see `cascade.protocols.DeepStage`) that asks Triton at `url` (`host:port` of gRPC).

    One long-lived connection on one loop in one thread. Make it in the process that uses it: after a fork every call
    fails. Raises ModelServerError where the TLS files of `options` cannot be read.

    With `hedge_ms` above 0, what has no answer after so long is asked a second time, and the first answer counts. The
    second goes over a connection of its own, since the first may be what is clogged, and behind a load balancer may
    reach another server. It is work twice over for a server that is slow from load: choose a delay that few calls
    exceed. Source: Dean, Barroso, "The Tail at Scale", CACM 2013.

    A call whose time is up fails at once, but its request is left to end by itself, at most a second longer: see
    `_LEFT_S`. `hedged` counts the second calls, `late_answers` the answers that came after the deadline.

    Memory: a call leaves nothing behind. Connections, stubs and the loop are made once; calls under way are bounded by
    the caller, and those left to themselves by `_LEFT_MAX`.
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
        self._left: dict[asyncio.Task[Float64], None] = {}
        self._loop = LoopThread(f"the client of Triton at {url}")
        try:
            self._client = self._loop.submit(self._connect()).result()
            # the pools of connections are the channels' own: see `channel_arguments`
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
        """Start scoring; see the protocol. More than 256 rows travel as several requests at the same time."""
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
            raise DeepStageError("deadline", "the time was up before the call began")
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
                self._leave(call, late)

    def _call(self, client: Any, inputs: DeepInputs, deadline: float) -> asyncio.Task[Float64]:
        return asyncio.create_task(self._ask(client, inputs, max(deadline - time.monotonic(), 0.0)))

    def _leave(self, call: asyncio.Task[Float64], late: bool) -> None:
        """Let a call end that nobody waits for any more; `late`: because its time was up."""
        patience = asyncio.get_running_loop().call_later(_LEFT_S, call.cancel)

        def ended(call: asyncio.Task[Float64]) -> None:
            patience.cancel()
            self._left.pop(call, None)
            if not call.cancelled() and call.exception() is None and late:
                self.late_answers += 1

        if call.done():
            ended(call)
            return
        self._left[call] = None
        call.add_done_callback(ended)
        if len(self._left) > _LEFT_MAX:
            oldest = next(iter(self._left))
            # at once, since its end takes a turn of the loop, and more may be left in this one
            del self._left[oldest]
            oldest.cancel()

    async def _ask(self, client: Any, inputs: DeepInputs, remaining_s: float) -> Float64:
        from tritonclient.grpc import InferRequestedOutput

        try:
            answer = await client.infer(
                self.model,
                [
                    _tensor(self._signature.sequence_input, inputs.sequence),
                    _tensor(self._signature.features_input, inputs.features),
                ],
                outputs=[InferRequestedOutput(self._signature.output)],
                # For the server's queue, in microseconds: it refuses what nobody waits for any more.
                timeout=max(int(remaining_s * 1e6), 1),
                client_timeout=remaining_s + _LEFT_S,
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        return checked_scores(answer.as_numpy(self._signature.output), len(inputs))

    def _translated(self, error: Exception) -> DeepStageError:
        status, text = _status_and_text(error)
        lowered = text.lower()
        cause = "error"
        if status == "DEADLINE_EXCEEDED" or any(part in lowered for part in _QUEUE_TIMEOUT_TEXTS):
            cause = "deadline"
        elif status == "RESOURCE_EXHAUSTED" or any(part in lowered for part in _QUEUE_FULL_TEXTS):
            cause = "queue-full"
        return DeepStageError(cause, f"Triton at {self.url}: {status}: {text}")

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the model is the promised one and has answered one row.

        Raises ModelServerError: at once where another model is served, else after `timeout_s` seconds.
        """
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
            # Jitter: workers that start together must not ask together for ever.
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
        """Have one row answered; a queue that refuses it, since the model is slow at first or busy, is asked again."""
        while True:
            try:
                await self._ask(client, probe_inputs(self._signature), deadline - time.monotonic())
                return
            except DeepStageError as error:
                if error.cause not in ("deadline", "queue-full") or time.monotonic() + _RETRY_S_MAX >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S_MAX * random.SystemRandom().uniform(0.5, 1.0))

    async def _check_model(self) -> None:
        """Compare names, types and shapes of the served model, and its batch size, with what is promised."""
        try:
            metadata = await self._client.get_model_metadata(self.model, client_timeout=_PROBE_TIMEOUT_S)
            answer = await self._client.get_model_config(self.model, client_timeout=_PROBE_TIMEOUT_S)
        except Exception as error:
            raise ModelServerError(f"Triton at {self.url}: {': '.join(_status_and_text(error))}") from error
        found = {one.name: (one.datatype, list(one.shape)) for one in (*metadata.inputs, *metadata.outputs)}
        promised = self._signature.input_shapes | self._signature.output_shapes
        wanted = {name: ("FP32", [-1, *shape]) for name, shape in promised.items()}
        remedy = "serve the model of the bundle, or name the bundle of the served model"
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ModelServerError(
                    f"Triton at {self.url} serves another {self.model}: tensor {name} is {_shown(found.get(name))}, "
                    f"the bundle promises {_shown(wanted.get(name))}; {remedy}"
                )
        if answer.config.max_batch_size < BATCH_ROWS_MAX:
            raise ModelServerError(
                f"Triton at {self.url} serves {self.model} with max_batch_size {answer.config.max_batch_size}; "
                f"set it to {BATCH_ROWS_MAX}"
            )

    def close(self) -> None:
        """Close the connections, the loop and the thread; calls under way fail, those left may end before."""
        if self._left:
            with suppress(DeepStageError):
                self._loop.submit(self._wait_for_left()).result()
        self._loop.close(last=self._disconnect)

    async def _wait_for_left(self) -> None:
        if self._left:
            await asyncio.wait(list(self._left), timeout=_LEFT_S)

    def _clients(self) -> list[Any]:
        return [self._client] if self._hedge_client is None else [self._client, self._hedge_client]

    async def _disconnect(self) -> None:
        for client in self._clients():
            await client.close()


async def _first_answer(calls: Iterable[asyncio.Task[Float64]]) -> Float64:
    """The scores of the call that has them first; where all fail, the failure of the last."""
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
    """Name of the gRPC status (`UNAVAILABLE`) and the message as one line."""
    from tritonclient.utils import InferenceServerException

    if not isinstance(error, InferenceServerException):
        return type(error).__name__, " ".join(str(error).split())
    return str(error.status() or "error").removeprefix("StatusCode."), " ".join(str(error.message()).split())


def _shown(tensor: tuple[str, list[int]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {tensor[1]}"
