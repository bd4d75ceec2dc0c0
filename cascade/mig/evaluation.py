"""What a Triton on a part of a GPU does under a share of the calls: p99, headroom, joules. Cached, with the queue's
model for one instance and the recursion over batches for several.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np

from cascade.columns import Float64
from cascade.errors import DataError
from cascade.mig.arrivals import ArrivalProcess, draw_arrivals_s
from cascade.mig.demand import Demand
from cascade.mig.queueing import Batching, ReplicaQueue, mix, solve
from cascade.mig.service_time import Part, ServiceTime, ServiceTimes
from cascade.mig.shared_queue import follow

QUANTILE: Final = 0.99
# Calls that the recursion draws for a Triton with several instances: p99 then repeats within about 1 %.
_DRAWN_CALLS: Final = 30_000
# Highest rates are found to this share of themselves, or with a p99 that is this close below the limit.
_RATE_TOLERANCE: Final = 0.01
# Full batches in a burst from which the burst counts as long.
_LONG_BURST: Final = 20.0
# Rates below this share of what a replica can compute count as no load.
_RATE_MIN_SHARE: Final = 1e-4


class Server(msgspec.Struct, frozen=True):
    """One Triton: its name in tables, the part of a GPU of each of its instances of the model, and their number."""

    name: str
    part: Part
    instances: int = 1


class Evaluation:
    """The figures of one model's calls on servers of one model of GPU.

    demand: of the model. times: of its batches. batching: of each Triton. seed: of the recursion's arrivals.
    """

    def __init__(self, demand: Demand, times: ServiceTimes, batching: Batching, seed: int) -> None:
        self.demand, self.batching = demand, batching
        self._times, self._seed = times, seed
        self._service: dict[Part, tuple[ServiceTime, Float64]] = {}
        # by what decides the figures, so that profiles of equal speed share them
        self._queues: dict[tuple[ServiceTime, int, float], ReplicaQueue | None] = {}
        self._rates: dict[tuple[ServiceTime, int], float] = {}
        self._peak = 1.0 if demand.bursts is None else demand.bursts.peak

    def service(self, part: Part) -> ServiceTime:
        """The times of batches on a part."""
        return self._by_calls(part)[0]

    def _by_calls(self, part: Part) -> tuple[ServiceTime, Float64]:
        if part not in self._service:
            service = self._times.of(part)
            calls = max(int(self.batching.rows_max / self.demand.rows_per_call), 1)
            rows = np.arange(1, min(calls, self.batching.queue_max) + 1) * self.demand.rows_per_call
            self._service[part] = (service, np.array([service.seconds(float(count)) for count in rows]))
        return self._service[part]

    def least_s(self, server: Server) -> float:
        """Seconds of a call that meets no other: the delay of its batch and its own computation."""
        return self.batching.delay_s + float(self._by_calls(server.part)[1][0])

    def capacity(self, server: Server) -> float:
        """Calls a second with full batches, whatever their latency, at the rate of a burst."""
        service_s = self._by_calls(server.part)[1]
        return server.instances * len(service_s) / float(service_s[-1]) / self._peak

    def queue(self, server: Server, calls_per_s: float) -> ReplicaQueue | None:
        """The server under so many calls a second; None if they are more than it can compute."""
        key = (self.service(server.part), server.instances, float(f"{calls_per_s:.6g}"))
        if key not in self._queues:
            self._queues[key] = self._compute(server, calls_per_s)
        return self._queues[key]

    def _compute(self, server: Server, calls_per_s: float) -> ReplicaQueue | None:
        if calls_per_s >= self.capacity(server):
            return None
        service_s = self._by_calls(server.part)[1]
        delay_s, bursts = self.batching.delay_s, self.demand.bursts
        if delay_s > service_s[-1]:
            raise DataError(f"batch delay {delay_s * 1e3:g} ms: longer than a full batch, {service_s[-1] * 1e3:g} ms")
        if server.instances == 1:
            return self._single(calls_per_s, service_s)
        chance = np.random.default_rng(self._seed)
        return follow(draw_arrivals_s(calls_per_s, bursts, _DRAWN_CALLS, chance), service_s, delay_s, server.instances)

    def _single(self, calls_per_s: float, service_s: Float64) -> ReplicaQueue:
        bursts = self.demand.bursts
        if bursts is None or bursts.mean_s < _LONG_BURST * float(service_s[-1]):
            arrivals = ArrivalProcess.at_replica(calls_per_s, bursts)
            return solve(arrivals, service_s, self.batching.delay_s, self.batching.queue_max)
        # in a long burst the queue is in its steady state nearly all the time, and so it is between two
        peak = bursts.peak
        states = [
            solve(ArrivalProcess.at_replica(rate), service_s, self.batching.delay_s, self.batching.queue_max)
            for rate in (calls_per_s * peak / bursts.factor, calls_per_s * peak)
        ]
        in_burst = bursts.share * peak
        return mix(states, (1.0 - in_burst, in_burst), (1.0 - bursts.share, bursts.share))

    def p99_s(self, server: Server, calls_per_s: float) -> float:
        """The 99th percentile of a call's time; infinite if the server is overloaded or rejects too many."""
        queue = self.queue(server, calls_per_s)
        return math.inf if queue is None else queue.tail_s(QUANTILE)

    def rate_max(self, server: Server) -> float:
        """The highest rate, in calls a second, at which the server keeps the limit; 0 if it never does."""
        key = (self.service(server.part), server.instances)
        if key not in self._rates:
            self._rates[key] = self._search(server)
        return self._rates[key]

    def _search(self, server: Server) -> float:
        """By interpolation of log p99 over log rate between a rate that keeps the limit and one that does not."""
        limit_s = self.demand.p99_s
        high = self.capacity(server) * (1.0 - _RATE_TOLERANCE)
        low = self.capacity(server) * _RATE_MIN_SHARE
        if self.least_s(server) > limit_s or (low_s := self.p99_s(server, low)) > limit_s:
            return 0.0
        if (high_s := self.p99_s(server, high)) <= limit_s:
            return high
        while high > low * (1.0 + _RATE_TOLERANCE) and low_s < limit_s * (1.0 - _RATE_TOLERANCE):
            share = 0.5
            if high_s < math.inf and high_s > low_s:
                share = min(max(math.log(limit_s / low_s) / math.log(high_s / low_s), 0.1), 0.9)
            middle = low * (high / low) ** share
            middle_s = self.p99_s(server, middle)
            if middle_s <= limit_s:
                low, low_s = middle, middle_s
            else:
                high, high_s = middle, middle_s
        return low

    def joules(self, server: Server, calls_per_s: float) -> float:
        """Joules above idle of a call at this rate; NaN where the server is overloaded."""
        queue = self.queue(server, calls_per_s)
        if queue is None:
            return math.nan
        service = self.service(server.part)
        rows = np.arange(1, len(queue.batch_shares) + 1) * self.demand.rows_per_call
        batch_j = sum(
            float(share) * service.joules(float(count))
            for share, count in zip(queue.batch_shares, rows, strict=True)
            if share > 1e-9
        )
        return batch_j / queue.batch_mean
