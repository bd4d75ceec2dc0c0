"""The deep stage on Triton servers, over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

import numpy as np

from cascade.addresses import parse_addresses
from cascade.columns import Float64
from cascade.errors import DeepStageError, ModelServerError
from cascade.protocols import DeepInputs, ReplicaState
from stages.deep.answers import probe_inputs
from stages.deep.loop_thread import LoopThread
from stages.deep.replica_watch import ReplicaWatch
from stages.deep.replicas import Address, Replica, Replicas
from stages.deep.resolution import AddressWatch, Resolver, resolve_host
from stages.deep.signature import BATCH_ROWS_MAX, MODEL_NAME, DeepSignature
from stages.deep.triton_connection import GrpcOptions, ReplicaUnavailableError, TritonConnection

# The stage does not cancel a call for which nobody waits any more, but abandons it: the request may run on for so long.
# Triton 2.51 crashes (signal 11, within a thousand late calls) if a client cancels a request while the server sends the
# answer: issues 7368 and 8034 of triton-inference-server/server, which name releases up to 25.01. One also crashed
# when it thawed with cancelled requests, so the time is longer than a server usually hangs. The request's own timeout
# still removes late requests from the server's queue, and the breaker bounds how many are sent.
_ABANDONED_S_MAX = 30.0
# Abandoned calls at a time. At more the stage cancels the oldest, since the server then hangs or is gone.
_ABANDONED_MAX = 256
# How long the end of the stage waits for late answers before it cancels them.
_CLOSE_S_MAX = 1.0
# A start waits this long for the first check of the other replicas, once one is ready.
_OTHERS_S_MAX: Final = 1.0
_LOOK_EVERY_S: Final = 0.02


class TritonDeepStage:
    """A deep stage (see `cascade.protocols.DeepStage`) that calls one Triton, or several replicas of it.

    Each replica has a long-lived connection, on an asyncio loop in a thread of its own. Create the stage in the process
    that uses it: after a fork every call fails. Raises ModelServerError if the TLS files of `options` cannot be read,
    or if `url` is not an address.

    - `url`: `host:port` of Triton's gRPC; several separated by commas. Each address of a host name is a replica.
    - `signature`: the tensors of the bundle's model.
    - `model`: its name on the server.
    - `digest`: the SHA-256 of the bundle's ONNX file: a replica that states another one gets no request. None: not
      compared.
    - `hedge_ms`: a call that has no answer after so long is sent a second time, and the first answer counts; 0: never.
    - `resolve`: returns the IP addresses of a host name.

    A request goes to a replica that serves the bundle's model: see `Replicas`. A replica that does not take it is
    passed by, and the call is sent to another one; that is its second time, and there is no third.

    The second call of hedging goes to another replica too, or with one replica over a connection of its own, since the
    first connection may be the problem. It is additional work for a server that is slow because of its load, so choose
    a delay that few calls exceed. Source: Dean, Barroso, "The Tail at Scale", CACM 2013.

    A call fails at its deadline, but its request may run on for half a minute: see `_ABANDONED_S_MAX`.

    Memory is bounded: `REPLICAS_MAX` bounds the connections, the caller the calls in flight, and `_ABANDONED_MAX` the
    abandoned ones.
    """

    def __init__(
        self,
        url: str,
        signature: DeepSignature,
        model: str = MODEL_NAME,
        options: GrpcOptions | None = None,
        hedge_ms: float = 0.0,
        digest: str | None = None,
        resolve: Resolver = resolve_host,
    ) -> None:
        self.url = url
        self.model = model
        self._signature = signature
        self._digest = digest
        self._options = options or GrpcOptions()
        self._hedge_s = hedge_ms / 1e3
        self.hedged = 0
        self.late_answers = 0
        self._abandoned: dict[asyncio.Task[Float64], None] = {}
        try:
            servers = parse_addresses(url)
            self._credentials = self._options.credentials()
        except ValueError as error:
            raise ModelServerError(f"deep.url = {url!r}: {error}; write host:port") from error
        except OSError as error:
            raise ModelServerError(f"{error.filename}: {error.strerror}; check the TLS files of [deep]") from error
        self._replicas = Replicas(self._connect)
        self._watch = ReplicaWatch(self._replicas)
        self._loop = LoopThread(f"the client of Triton at {url}")
        self._addresses = AddressWatch(servers, resolve, lambda found: self._loop.submit(self._watch.update(found)))
        self._addresses.start()

    def _connect(self, address: Address) -> TritonConnection:
        channels = 2 if self._hedge_s else 1
        return TritonConnection(
            address, self.model, self._signature, self._digest, self._options, self._credentials, channels
        )

    def replicas(self) -> list[ReplicaState]:
        """The state of each replica, for any thread."""
        return self._replicas.states()

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
        replica = self._replicas.choose()
        if replica is None:
            raise DeepStageError("error", f"Triton at {self.url}: {self._problem()}")
        calls = [self._call(replica, inputs, deadline)]
        late = False
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await asyncio.wait(calls, timeout=self._hedge_s or None)
                second = self._second_call(replica, calls[0], inputs, deadline)
                if second is None:
                    return await calls[0]
                calls.append(second)
                return await _first_answer(calls)
        except TimeoutError:
            late = True
            raise DeepStageError("deadline", f"Triton at {self.url} did not answer in time") from None
        finally:
            for call in calls:
                self._abandon(call, late)

    def _second_call(
        self, replica: Replica[TritonConnection], first: asyncio.Task[Float64], inputs: DeepInputs, deadline: float
    ) -> asyncio.Task[Float64] | None:
        """The second call of a batch, if the first one has no answer yet, or if its replica did not take it."""
        if not first.done():
            self.hedged += 1
            other = self._replicas.choose(other_than=replica)
            if other is None:
                return self._call(replica, inputs, deadline, channel=1)
            return self._call(other, inputs, deadline)
        if isinstance(first.exception(), ReplicaUnavailableError):
            other = self._replicas.choose(other_than=replica)
            if other is not None:
                return self._call(other, inputs, deadline)
        return None

    def _call(
        self, replica: Replica[TritonConnection], inputs: DeepInputs, deadline: float, channel: int = 0
    ) -> asyncio.Task[Float64]:
        remaining_s = max(deadline - time.monotonic(), 0.0)
        limit_s = remaining_s + _ABANDONED_S_MAX
        call = asyncio.create_task(replica.connection.infer(inputs, remaining_s, limit_s, channel))
        self._replicas.sent(replica)

        def ended(call: asyncio.Task[Float64]) -> None:
            error = None if call.cancelled() else call.exception()
            if call.cancelled():
                self._replicas.failed(replica, "no answer")
            elif error is None:
                self._replicas.answered(replica)
            else:
                overloaded = isinstance(error, DeepStageError) and error.overloaded
                gone = isinstance(error, ReplicaUnavailableError) and not overloaded
                self._replicas.failed(replica, str(error), gone, overloaded)
                if gone:
                    self._watch.check_now(replica)

        call.add_done_callback(ended)
        return call

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

    def wait_ready(self, timeout_s: float) -> None:
        """See the protocol. One replica is enough; the others get a second for their first check."""
        self._loop.submit(self._wait_ready(time.monotonic() + timeout_s, timeout_s)).result()

    async def _wait_ready(self, deadline: float, timeout_s: float) -> None:
        while not self._replicas.ready:
            if self._replicas.all_differ:
                raise ModelServerError(self._problem())
            if time.monotonic() >= deadline:
                raise ModelServerError(
                    f"Triton at {self.url} did not serve the model {self.model} within {timeout_s:g} s "
                    f"({self._problem()}); start it, or correct deep.url, deep.model and deep.tls with its files"
                )
            await asyncio.sleep(_LOOK_EVERY_S)
        others_s = min(deadline, time.monotonic() + _OTHERS_S_MAX)
        while not self._replicas.all_checked and time.monotonic() < others_s:
            await asyncio.sleep(_LOOK_EVERY_S)

    def _problem(self) -> str:
        return self._replicas.problem or self._addresses.problem or "no address yet"

    def close(self) -> None:
        """See the protocol. Waits for abandoned calls, at most a second."""
        self._addresses.close()
        if self._abandoned:
            with suppress(DeepStageError):
                self._loop.submit(self._wait_for_abandoned()).result()
        self._loop.close(last=self._watch.close)

    async def _wait_for_abandoned(self) -> None:
        if self._abandoned:
            await asyncio.wait(list(self._abandoned), timeout=_CLOSE_S_MAX)


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
