"""The time of a deep call at one Triton replica with dynamic batching, computed and not simulated.

The replica has one queue and one instance of the model. Triton's rules (`dynamic_batching`, without preferred sizes):

- When the instance is free, the waiting calls become one batch, at most `rows_max` rows.
- A batch that is not full waits until its oldest call is `delay_s` old.
- At most `queue_max` calls wait; further ones are rejected.
- A batch takes a time that depends on its rows only.

This is a bulk-service queue (Bailey, "On queueing processes with bulk service", JRSS B 16, 1954) whose service time
depends on the batch, with a Markovian arrival process (Neuts, "Structured Stochastic Matrices of M/G/1 Type", 1989,
chapter 5; for batch service: Chakravarthy, "A finite capacity queue with group services", 1993). We look at it at the
moments when a batch starts. The calls in the system at that moment and the phase of the arrivals are a Markov chain:

    q calls, phase i  →  q' calls, phase j      with the arrivals during the batch, and those while a batch waits

The counts of arrivals in a time t have the generating matrix exp((D0 + z·D1)·t). It is evaluated on the unit circle,
and a Fourier transform gives the counts (Abate, Whitt, "Numerical inversion of probability generating functions",
Operations Research Letters 12, 1992). A call that arrives t into a batch of length s, which ends with k calls in the
queue, takes s − t + service(k). The distribution of that time is summed over the stationary chain, with Gauss-Legendre
nodes for t.

Two things are approximate. A batch that becomes full while it waits starts at the end of its delay, not at once
(except with batches of one, which never wait). A call that does not fit into the next batch counts as part of a full
one. Both make calls slower, and both are rare unless `rows_max` is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from cascade.columns import Float64
from cascade.mig.arrivals import ArrivalProcess

Complex128 = npt.NDArray[np.complex128]

_ROOM_MIN: Final = 16
# Probability of the chain's largest queue above which we give it more room.
_TAIL_MAX: Final = 1e-7
# Nodes over a batch's time before its last `delay_s`: with many sizes of batches, fewer give as many different times.
_NODES_MIN, _NODES_MAX, _TIMES = 4, 40, 200_000
# Nodes over the last `delay_s` of a batch, and over a delay.
_NODES_DELAY: Final = 4
# Batches of this probability and below are left out of the distribution of times.
_SHARE_MIN: Final = 1e-6
# Most chains forget their state within these steps; their change is then below the second figure.
_STEPS, _STEP_MIN = 300, 1e-13


class Batching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Triton's dynamic batching, as `cascade repository --target gpu` configures it by default.

    delay_s: `max_queue_delay_microseconds`. rows_max: `max_batch_size`. queue_max: `max_queue_size`, in calls.
    """

    delay_s: float = 200e-6
    rows_max: int = 256
    queue_max: int = 256


@dataclass(frozen=True, eq=False)
class ReplicaQueue:
    """A replica in its steady state.

    times_s, weights: float64 [points], the distribution of a call's time from its arrival to its answer: ascending
    times, and weights that add up to 1.
    batch_shares: float64 [calls], the share of batches with 1, 2, … calls.
    batches_per_s: batches a second.
    busy_share: share of time in which the instance computes.
    rejected_share: share of calls that find `queue_max` calls waiting.
    """

    times_s: Float64
    weights: Float64
    batch_shares: Float64
    batches_per_s: float
    busy_share: float
    rejected_share: float

    def quantile_s(self, share: float) -> float:
        """The time within which this share of the calls have their answer."""
        index = int(np.searchsorted(self._cumulative, share))
        return float(self.times_s[min(index, len(self.times_s) - 1)])

    def tail_s(self, share: float) -> float:
        """The same of all calls, where a rejected call never has its answer: infinite if too many are rejected."""
        answered = 1.0 - self.rejected_share
        return self.quantile_s(share / answered) if share < answered else math.inf

    def late_share(self, limit_s: float) -> float:
        """The share of calls without an answer within `limit_s`; a rejected call has none."""
        index = int(np.searchsorted(self.times_s, limit_s, side="right"))
        in_time = float(self._cumulative[index - 1]) if index else 0.0
        return min(max(1.0 - (1.0 - self.rejected_share) * in_time, 0.0), 1.0)

    @property
    def mean_s(self) -> float:
        """Mean time of a call."""
        return float(self.times_s @ self.weights)

    @property
    def batch_mean(self) -> float:
        """Calls in a batch, mean."""
        return float(self.batch_shares @ np.arange(1, len(self.batch_shares) + 1))

    @cached_property
    def _cumulative(self) -> Float64:
        cumulative: Float64 = np.cumsum(self.weights)
        return cumulative


def mix(queues: Sequence[ReplicaQueue], calls: Sequence[float], time: Sequence[float]) -> ReplicaQueue:
    """The figures of several queues together, or of one that is in several states by turns.

    calls: the share of all calls that each has. time: its share of the time, or of the replicas.
    """
    times = np.concatenate([queue.times_s for queue in queues])
    weights = np.concatenate([queue.weights * share for queue, share in zip(queues, calls, strict=True)])
    order = np.argsort(times, kind="stable")
    batches = np.zeros(max(len(queue.batch_shares) for queue in queues))
    for queue, share in zip(queues, time, strict=True):
        batches[: len(queue.batch_shares)] += share * queue.batches_per_s * queue.batch_shares
    return ReplicaQueue(
        times_s=times[order],
        weights=weights[order] / weights.sum(),
        batch_shares=batches / batches.sum(),
        batches_per_s=float(batches.sum()),
        busy_share=sum(share * queue.busy_share for queue, share in zip(queues, time, strict=True)),
        rejected_share=sum(share * queue.rejected_share for queue, share in zip(queues, calls, strict=True)),
    )


def solve(
    arrivals: ArrivalProcess, service_s: Sequence[float] | Float64, delay_s: float, queue_max: int
) -> ReplicaQueue:
    """The steady state of a replica.

    arrivals: of this replica.
    service_s: seconds of a batch of 1, 2, … calls; its length is the largest batch.
    delay_s, queue_max: as in Batching. A queue is also the limit of a batch.

    Raises ValueError for `delay_s` of more than the time of a full batch: the rules above then miss a case.
    """
    service = np.asarray(service_s, np.float64)[:queue_max]
    if len(service) == 1:
        delay_s = 0.0  # a batch of one is full
    if delay_s > service[-1]:
        raise ValueError(f"delay_s = {delay_s}: must not be more than the {service[-1]} s of a full batch")
    room = min(_room(arrivals, service), queue_max)
    while True:
        chain = _Chain(arrivals, service, delay_s, room, queue_max)
        if room == queue_max or chain.stationary[-1].sum() < _TAIL_MAX:
            return chain.queue()
        room = min(2 * room, queue_max)


def _room(arrivals: ArrivalProcess, service: Float64) -> int:
    """Calls to begin with: of a batch that takes as long as the arrivals of the next one, and eight deviations more."""
    calls = 1.0
    for _ in range(64):
        calls = arrivals.rate_per_s_max * service[min(int(calls), len(service)) - 1] + 1.0
    return _ROOM_MIN * (1 + int(min(calls + 8.0 * np.sqrt(calls), 1e6)) // _ROOM_MIN)


class _Chain:
    """The Markov chain at the starts of batches, with at most `room` calls in the system then."""

    def __init__(self, arrivals: ArrivalProcess, service: Float64, delay_s: float, room: int, queue_max: int) -> None:
        self._d0, self._d1, self._rate = arrivals.d0, arrivals.d1, arrivals.rate_per_s
        self._service, self._delay, self._room, self._queue_max = service, delay_s, room, queue_max
        self._calls = np.arange(1, room + 1)
        self._batch = np.minimum(self._calls, len(service))
        self._left = self._calls - self._batch
        self._seconds = service[self._batch - 1]
        # until here a first arrival makes the next batch old enough at the end of this one
        self._until = np.where(self._left > 0, self._seconds, np.maximum(self._seconds - delay_s, 0.0))
        expected = arrivals.rate_per_s_max * max(self._seconds.max(), delay_s)
        self._counts = 1 << int(np.ceil(np.log2(expected + 12.0 * np.sqrt(expected + 1.0) + 8.0)))
        circle = np.exp(-2j * np.pi * np.arange(self._counts // 2 + 1) / self._counts)[:, None, None]
        self._values, self._vectors = np.linalg.eig(self._d0 + circle * self._d1)
        self._inverse = np.linalg.inv(self._vectors)
        self._arrival = self._inverse @ (circle * self._d1) @ self._vectors
        self._ones = self._inverse.sum(axis=-1)
        self._no_arrival = _exponential(self._d0 * self._until[:, None, None])
        self._wait_s = np.linalg.inv(-self._d0)
        self._first = self._no_arrival @ self._wait_s @ self._d1
        self.stationary = self._solve()

    def _generating(self, seconds: Float64) -> Complex128:
        """Generating matrices [times, points, phases, phases] of the arrivals in each of `seconds`."""
        grown = np.exp(self._values * seconds[:, None, None])
        product: Complex128 = (self._vectors * grown[..., None, :]) @ self._inverse
        return product

    def _solve(self) -> Float64:
        """Float64 [calls, phases]: the stationary probabilities."""
        phases = len(self._d0)
        during = self._generating(self._seconds)
        none_yet = self._no_arrival[:, None] @ self._generating(self._seconds - self._until)
        later = self._left > 0
        counts = np.fft.irfft(np.where(later[:, None, None, None], during, during - none_yet), self._counts, axis=1)
        waiting = self._first[:, None] @ np.fft.irfft(
            self._generating(np.array([self._delay]))[0], self._counts, axis=0
        )
        counts = np.concatenate([counts, np.zeros((self._room, 1, phases, phases))], axis=1)
        counts[~later, 1:] += waiting[~later]
        target = np.clip(self._left[:, None] + np.arange(self._counts + 1), 1, self._room) - 1
        cells = (np.arange(self._room)[:, None] * self._room + target).ravel()
        moves = np.empty((self._room, phases, self._room, phases))
        for before, after in np.ndindex(phases, phases):
            flows = np.bincount(cells, counts[..., before, after].ravel(), self._room**2)
            moves[:, before, :, after] = flows.reshape(self._room, self._room)
        size = self._room * phases
        stationary = _stationary(moves.reshape(size, size)).reshape(self._room, phases)
        beyond = np.maximum(self._left[:, None] + np.arange(self._counts + 1) - self._queue_max, 0)
        self._rejected = float(np.einsum("qi,qcij,qc->", stationary, counts, beyond))
        return stationary

    def queue(self) -> ReplicaQueue:
        """The figures of the replica."""
        shares = self.stationary.sum(axis=1)
        idle = np.where(
            self._left > 0, 0.0, ((self.stationary[:, None] @ self._no_arrival)[:, 0] @ self._wait_s).sum(-1)
        )
        delayed = (self.stationary[:, None] @ self._no_arrival)[:, 0].sum(-1) * (
            self._until + self._delay - self._seconds
        )
        cycle_s = float((shares * self._seconds + idle + np.where(self._left > 0, 0.0, delayed)).sum())
        times, weights = self._times()
        order = np.argsort(times, kind="stable")
        batch_shares = np.bincount(self._batch - 1, shares)
        return ReplicaQueue(
            times_s=times[order],
            weights=weights[order] / weights.sum(),
            batch_shares=batch_shares / batch_shares.sum(),
            batches_per_s=1.0 / cycle_s,
            busy_share=float(shares @ self._seconds) / cycle_s,
            rejected_share=max(self._rejected / (self._rate * cycle_s), 0.0),
        )

    def _times(self) -> tuple[Float64, Float64]:
        """The time of a call and its weight, for the calls of one step of the chain; both float64 [points]."""
        parts = [self._after_first()]
        rows = np.flatnonzero(self.stationary.sum(axis=1) > _SHARE_MIN)
        nodes = int(np.clip(_TIMES // (len(rows) * self._counts), _NODES_MIN, _NODES_MAX))
        parts += self._during(rows, np.zeros(self._room), self._until, nodes)
        if self._delay:
            parts += self._during(rows, self._until, self._seconds, _NODES_DELAY)
        times, weights = map(np.concatenate, zip(*parts, strict=True))
        possible = weights > 0.0
        return times[possible], weights[possible]

    def _during(
        self, rows: npt.NDArray[np.int64], start: Float64, end: Float64, nodes: int
    ) -> list[tuple[Float64, Float64]]:
        """The calls that arrive during a batch, between `start` and `end`."""
        at, weight = _nodes(start[rows], end[rows], nodes)
        seconds, left, until = self._seconds[rows], self._left[rows], self._until[rows]
        before = self._rows_at(self.stationary[rows], at)
        if start.any():  # only together with a first call that is old enough at the end
            none_yet = (self.stationary[rows][:, None] @ self._no_arrival[rows])[:, 0]
            none_yet[left > 0] = 0.0
            before = before - self._rows_at(none_yet, at - until[:, None])
        arriving = np.einsum("rtzi,zij->rtzj", before, self._arrival)
        remaining = (seconds[:, None] - at)[..., None, None]
        ending = np.einsum("rtzi,zi->rtz", arriving * np.exp(self._values * remaining), self._ones)
        found = np.maximum(np.fft.irfft(ending, self._counts, axis=-1), 0.0) * weight[..., None]
        total = left[:, None] + np.arange(self._counts)
        largest = len(self._service)
        service = self._service[np.clip(total, 1, largest) - 1]
        rest = (seconds[:, None] - at)[..., None]
        together = found * (total <= largest)[:, None]
        parts = [((rest + service[:, None]).ravel(), together.ravel())]
        if self._room >= largest:
            position = total + 1
            # the same calls by their own position in the queue, whatever arrives after them
            alone = np.fft.irfft(np.einsum("rtzi,zi->rtz", arriving, self._ones), self._counts, axis=-1)
            alone = np.roll(np.maximum(alone, 0.0), -1, axis=-1) * weight[..., None]
            full = (alone * (position <= largest)[:, None]).sum(-1) - together.sum(-1)
            parts.append(((rest[..., 0] + self._service[-1]).ravel(), np.maximum(full, 0.0).ravel()))
            behind = alone * ((position > largest) & (position <= self._queue_max))[:, None]
            batches = 1 + (position - 1) // largest
            parts.append(((rest + (batches * self._service[-1])[:, None]).ravel(), behind.ravel()))
        return parts

    def _after_first(self) -> tuple[Float64, Float64]:
        """The calls that a batch waits for: the first to arrive, and those in the delay after it."""
        open_rows = self._left == 0
        first = np.einsum("ri,rij->j", self.stationary[open_rows], self._first[open_rows])
        alone = np.einsum("zij,zj->zi", self._vectors * np.exp(self._values * self._delay)[:, None, :], self._ones)
        counts = np.maximum(np.fft.irfft(alone @ first, self._counts), 0.0)
        service = self._service[np.clip(np.arange(1, self._counts + 1), 1, len(self._service)) - 1]
        times, weights = [self._delay + service], [counts]
        if self._delay:
            at, weight = _nodes(np.zeros(1), np.full(1, self._delay), _NODES_DELAY)
            arriving = np.einsum("rtzi,zij->rtzj", self._rows_at(first[None], at), self._arrival)
            remaining = np.exp(self._values * (self._delay - at)[..., None, None])
            ending = np.einsum("rtzi,zi->rtz", arriving * remaining, self._ones)
            found = np.maximum(np.fft.irfft(ending, self._counts, axis=-1), 0.0) * weight[..., None]
            times.append(((self._delay - at)[..., None] + service).ravel())
            weights.append(found.ravel())
        return np.concatenate(times), np.concatenate(weights)

    def _rows_at(self, phases: Float64, at: Float64) -> Complex128:
        """Complex [rows, times, points, phases]: row vectors `phases` [rows, phases] a time later, in eigenvectors."""
        started = np.einsum("ri,zij->rzj", phases, self._vectors)
        later: Complex128 = started[:, None] * np.exp(self._values * at[..., None, None])
        return later


def _stationary(moves: Float64) -> Float64:
    """The stationary probabilities of a chain with the transition probabilities `moves` [states, states]."""
    size = len(moves)
    state = np.full(size, 1.0 / size)
    for _ in range(_STEPS):
        following = state @ moves
        if np.abs(following - state).sum() < _STEP_MIN:
            return np.asarray(following / following.sum())
        state = following
    # long bursts: the chain remembers its phase for too many steps
    equations = moves.T - np.eye(size)
    equations[-1] = 1.0
    solution = np.maximum(np.linalg.solve(equations, np.append(np.zeros(size - 1), 1.0)), 0.0)
    return np.asarray(solution / solution.sum())


def _nodes(start: Float64, end: Float64, count: int) -> tuple[Float64, Float64]:
    """Gauss-Legendre nodes and weights between `start` and `end` [rows]; both float64 [rows, count]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    half = ((end - start) / 2.0)[:, None]
    return start[:, None] + half * (nodes + 1.0), half * weights


def _exponential(matrices: Float64) -> Float64:
    """The exponentials of matrices [count, size, size], by Taylor's series after halving, then squaring.

    Source: Moler, Van Loan, "Nineteen dubious ways to compute the exponential of a matrix, twenty-five years later",
    SIAM Review 45, 2003, method 3.
    """
    norm = float(np.abs(matrices).sum(axis=-1).max(initial=0.0))
    halvings = max(int(np.ceil(np.log2(norm))) + 2, 0) if norm else 0
    scaled = matrices / 2.0**halvings
    term = np.broadcast_to(np.eye(matrices.shape[-1]), matrices.shape).copy()
    total = term.copy()
    for order in range(1, 16):
        term = term @ scaled / order
        total += term
    for _ in range(halvings):
        total = total @ total
    return total
