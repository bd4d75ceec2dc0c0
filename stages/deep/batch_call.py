"""A batch of rows until its scores: which replicas are called, when a second time, and until when; on an asyncio loop.

Nothing here waits: requests, timers and their ends call each other back, so that a call takes two turns of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from cascade.columns import Float64
from cascade.errors import DeepStageError
from cascade.protocols import DeepInputs
from stages.deep.grpc_channel import GrpcCall
from stages.deep.replicas import Replica, Replicas
from stages.deep.triton_connection import ReplicaUnavailableError, TritonConnection

# The stage does not cancel a request for which nobody waits any more, but abandons it: it may run on for so long.
# Triton 2.51 crashes (signal 11, within a thousand late calls) if a client cancels a request while the server sends the
# answer: issues 7368 and 8034 of triton-inference-server/server, which name releases up to 25.01. One also crashed
# when it thawed with cancelled requests, so the time is longer than a server usually hangs. The request's own timeout
# still removes late requests from the server's queue, and the breaker bounds how many are sent.
ABANDONED_S_MAX: Final = 30.0
# Abandoned requests at a time. At more the stage cancels the oldest, since the server then hangs or is gone.
ABANDONED_MAX: Final = 256

TritonReplica = Replica[TritonConnection]
Outcome = Float64 | DeepStageError


@dataclass(eq=False, slots=True)
class Request:
    """A request to a replica, until its answer, its error or its cancellation.

    - `channel`: that of the connection. `call`: what it waits for there.
    - `ended`: gets the request and its end; None once it is abandoned.
    - `late`: whether it was abandoned because of its deadline.
    - `limit`: cancels it once it is abandoned.
    """

    replica: TritonReplica
    channel: int
    ended: Callable[[Request, Outcome], None] | None
    call: GrpcCall | None = None
    late: bool = False
    limit: asyncio.TimerHandle | None = None


class Requests:
    """All requests of a stage, and what the replicas learn from them.

    - `url`: of the server, for messages.
    - `replicas`: those that requests are sent to. `gone`: called for one whose connection has ended.
    - `hedge_s`: a request without an answer after so long is sent a second time; 0: never.
    - `problem`: why no replica can be called.

    `hedged`: how often that happened. `late_answers`: answers to requests that were abandoned at their deadline.
    `abandoned`: requests that run on and for which nobody waits, at most ABANDONED_MAX, the oldest first.
    """

    def __init__(
        self,
        url: str,
        replicas: Replicas[TritonConnection],
        hedge_s: float,
        gone: Callable[[TritonReplica], None],
        problem: Callable[[], str],
    ) -> None:
        self.url, self.replicas, self.hedge_s, self._gone, self.problem = url, replicas, hedge_s, gone, problem
        self.hedged = self.late_answers = 0
        self.abandoned: dict[Request, None] = {}

    def send(
        self,
        replica: TritonReplica,
        inputs: DeepInputs,
        queue_s: float,
        channel: int,
        ended: Callable[[Request, Outcome], None],
    ) -> Request:
        """Send a request. `ended` gets its end, unless it is abandoned before. Other arguments: `TritonConnection`."""
        request = Request(replica, channel, ended)
        request.call = replica.connection.start(inputs, queue_s, partial(self._answered, request), channel)
        self.replicas.sent(replica)
        return request

    def abandon(self, request: Request, late: bool) -> None:
        """Let a request end for which nobody waits any more. `late`: whether that is because of its deadline."""
        request.late = late
        request.ended = None
        request.limit = asyncio.get_running_loop().call_later(ABANDONED_S_MAX, self._cancel, request)
        self.abandoned[request] = None
        if len(self.abandoned) > ABANDONED_MAX:
            self._cancel(next(iter(self.abandoned)))

    def _cancel(self, request: Request) -> None:
        if request.call is not None:
            request.replica.connection.cancel(request.call, request.channel)
        self.replicas.failed(request.replica, "no answer")
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self.abandoned.pop(request, None)
        request.call = None  # which refers to the request
        if request.limit is not None:
            request.limit.cancel()

    def _answered(self, request: Request, outcome: Outcome) -> None:
        self._forget(request)
        if isinstance(outcome, DeepStageError):
            gone = isinstance(outcome, ReplicaUnavailableError) and not outcome.overloaded
            self.replicas.failed(request.replica, str(outcome), gone, outcome.overloaded)
            if gone:
                self._gone(request.replica)
        else:
            self.replicas.answered(request.replica)
            self.late_answers += request.late
        if request.ended is not None:
            request.ended(request, outcome)


class BatchCall:
    """At most 256 rows until their scores: a request, perhaps a second one, and a deadline.

    - `requests`: of the stage.
    - `inputs`: the rows.
    - `deadline_s`: on the loop's clock.
    - `ended`: gets the scores or the error, once, also if that is known before `start` returns.

    A second request follows where the first replica did not take it and there is another one, and for hedging, where
    the first answer counts. There is no third.
    """

    def __init__(
        self, requests: Requests, inputs: DeepInputs, deadline_s: float, ended: Callable[[Outcome], None]
    ) -> None:
        self._requests, self._inputs, self._deadline_s = requests, inputs, deadline_s
        self._ended: Callable[[Outcome], None] | None = ended
        self._open: list[Request] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._sent = 0

    def start(self) -> None:
        """Send the first request. No effect after `stop`."""
        if self._ended is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._deadline_s:
            self._end(DeepStageError("deadline", "the deadline had passed before the call began"))
            return
        replica = self._requests.replicas.choose()
        if replica is None:
            self._end(DeepStageError("error", f"Triton at {self._requests.url}: {self._requests.problem()}"))
            return
        self._send(replica)
        self._timers.append(loop.call_at(self._deadline_s, self._expire))
        if self._requests.hedge_s:
            self._timers.append(loop.call_later(self._requests.hedge_s, self._hedge, replica))

    def stop(self, outcome: Outcome) -> None:
        """End the call with this outcome, unless it has ended. Its requests run on."""
        self._abandon(late=False)
        self._end(outcome)

    def _send(self, replica: TritonReplica, channel: int = 0) -> None:
        self._sent += 1
        queue_s = max(self._deadline_s - asyncio.get_running_loop().time(), 0.0)
        self._open.append(self._requests.send(replica, self._inputs, queue_s, channel, self._answered))

    def _answered(self, request: Request, outcome: Outcome) -> None:
        self._open.remove(request)
        if not isinstance(outcome, DeepStageError):
            self.stop(outcome)
        elif self._sent == 1:
            not_taken = isinstance(outcome, ReplicaUnavailableError)
            other = self._requests.replicas.choose(other_than=request.replica) if not_taken else None
            if other is None:
                self._end(outcome)
            else:
                self._send(other)
        elif not self._open:
            self._end(outcome)

    def _hedge(self, first: TritonReplica) -> None:
        if self._sent > 1:
            return
        self._requests.hedged += 1
        other = self._requests.replicas.choose(other_than=first)
        if other is None:
            self._send(first, channel=1)
        else:
            self._send(other)

    def _expire(self) -> None:
        self._abandon(late=True)
        self._end(DeepStageError("deadline", f"Triton at {self._requests.url} did not answer in time"))

    def _abandon(self, late: bool) -> None:
        for request in self._open:
            self._requests.abandon(request, late)
        self._open.clear()

    def _end(self, outcome: Outcome) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(outcome)
