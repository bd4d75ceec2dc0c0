"""The deep stage on Triton servers, over gRPC."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Final

import numpy as np

from cascade.addresses import parse_addresses
from cascade.columns import Float64
from cascade.errors import DeepStageError, ModelServerError
from cascade.protocols import DeepInputs, ReplicaState
from stages.deep.answers import probe_inputs
from stages.deep.batch_call import BatchCall, Outcome, Requests
from stages.deep.loop_thread import LoopThread
from stages.deep.replica_watch import ReplicaWatch
from stages.deep.replicas import Address, Replicas
from stages.deep.resolution import AddressWatch, Resolver, resolve_host
from stages.deep.signature import BATCH_ROWS_MAX, MODEL_NAME, DeepSignature
from stages.deep.triton_connection import GrpcOptions, TritonConnection

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

    A call fails at its deadline, but its request may run on for half a minute: see `ABANDONED_S_MAX`.

    Memory is bounded: `REPLICAS_MAX` bounds the connections, the caller the calls in flight, and `ABANDONED_MAX` the
    abandoned requests.
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
        try:
            servers = parse_addresses(url)
            self._credentials = self._options.credentials()
        except ValueError as error:
            raise ModelServerError(f"deep.url = {url!r}: {error}; write host:port") from error
        except OSError as error:
            raise ModelServerError(f"{error.filename}: {error.strerror}; check the TLS files of [deep]") from error
        self._replicas = Replicas(self._connect)
        self._watch = ReplicaWatch(self._replicas)
        self._requests = Requests(url, self._replicas, self._hedge_s, self._watch.check_now, self._problem)
        self._calls: set[_Call] = set()
        self._loop = LoopThread(f"the client of Triton at {url}")
        self._addresses = AddressWatch(servers, resolve, lambda found: self._loop.submit(self._watch.update(found)))
        self._addresses.start()

    def _connect(self, address: Address) -> TritonConnection:
        channels = 2 if self._hedge_s else 1
        return TritonConnection(
            address, self.model, self._signature, self._digest, self._options, self._credentials, channels
        )

    @property
    def hedged(self) -> int:
        """See the protocol."""
        return self._requests.hedged

    @property
    def late_answers(self) -> int:
        """See the protocol."""
        return self._requests.late_answers

    def replicas(self) -> list[ReplicaState]:
        """The state of each replica, for any thread."""
        return self._replicas.states()

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """See the protocol. More than 256 rows are sent as several concurrent requests."""
        return self._loop.start(partial(self._score, inputs, time.monotonic() + timeout_s))

    def probe(self, timeout_s: float) -> Future[Float64]:
        """See the protocol."""
        return self.submit(probe_inputs(self._signature), timeout_s)

    def _score(self, inputs: DeepInputs, deadline_s: float, future: Future[Float64]) -> None:
        call = _Call(future)
        self._calls.add(call)
        future.add_done_callback(lambda _: self._calls.discard(call))
        call.start(self._requests, inputs, deadline_s)

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
        """See the protocol. Waits for abandoned requests, at most a second."""
        self._addresses.close()
        if self._requests.abandoned:
            with suppress(DeepStageError):
                self._loop.submit(self._wait_for_abandoned()).result()
        self._loop.close(last=self._end)

    async def _wait_for_abandoned(self) -> None:
        give_up_s = time.monotonic() + _CLOSE_S_MAX
        while self._requests.abandoned and time.monotonic() < give_up_s:
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _end(self) -> None:
        for call in list(self._calls):
            call.fail(self._loop.closed_error())
        await self._watch.close()


class _Call:
    """A call with any number of rows: `future` gets the scores of all its batches, or the first error."""

    def __init__(self, future: Future[Float64]) -> None:
        self._future = future
        self._batches: list[BatchCall] = []
        self._scores: dict[int, Float64] = {}

    def start(self, requests: Requests, inputs: DeepInputs, deadline_s: float) -> None:
        """Start all batches."""
        for number, start in enumerate(range(0, len(inputs), BATCH_ROWS_MAX)):
            rows = inputs.take(slice(start, start + BATCH_ROWS_MAX))
            self._batches.append(BatchCall(requests, rows, deadline_s, partial(self._ended, number)))
        if not self._batches:
            self._future.set_result(np.zeros(0, np.float64))
        for batch in self._batches:
            batch.start()

    def fail(self, error: DeepStageError) -> None:
        """End the call with an error, unless it has ended. Its requests run on."""
        if self._future.done():
            return
        self._future.set_exception(error)
        for batch in self._batches:
            batch.stop(error)

    def _ended(self, number: int, outcome: Outcome) -> None:
        if isinstance(outcome, DeepStageError):
            self.fail(outcome)
            return
        self._scores[number] = outcome
        if len(self._scores) == len(self._batches) and not self._future.done():
            parts = [self._scores[place] for place in range(len(self._batches))]
            self._future.set_result(parts[0] if len(parts) == 1 else np.concatenate(parts))
