"""The same replicas as in `queueing`, simulated event by event, to judge the model: clients, queues, batches, answers.

Nothing here comes from the model. Calls arrive one by one at several clients; each client takes the replicas in turn,
as the service's workers do; each replica follows Triton's rules. Bursts begin and end for all clients together. A call
has a random number of rows, where the model takes the mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascade.columns import Float64, Int64
from cascade.errors import DataError
from cascade.mig.arrivals import Bursts, draw_arrivals_s
from cascade.mig.queueing import Batching

if TYPE_CHECKING:
    import simpy

# Seconds of a batch of so many rows.
BatchTime = Callable[[float], float]

# Calls at the beginning that are not counted: the queues are empty then.
_WARM_UP_SHARE = 0.02


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of all clients together: `rate_per_s` in the mean, with `rows_per_call` rows (geometric, mean)."""

    rate_per_s: float
    rows_per_call: float = 1.0
    clients: int = 4
    bursts: Bursts | None = None


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """What the calls met. `busy_share`: mean over the replicas. `batch_mean`: calls in a batch."""

    calls: int
    p50_s: float
    p99_s: float
    mean_s: float
    busy_share: float
    batch_mean: float
    rejected_share: float


def simulate(
    load: Load, batch_times: Sequence[BatchTime], batching: Batching, calls: int, seed: int, instances: int = 1
) -> Simulated:
    """Simulates so many calls to replicas.

    load: the calls of all clients.
    batch_times: of each replica.
    batching: of every replica.
    instances: of the model in every replica, which share its queue.

    Raises DataError where simpy is not installed.
    """
    try:
        import simpy
    except ModuleNotFoundError as error:
        raise DataError("simpy is not installed; install it with `pip install 'cascade-fraud[plan]'`") from error
    chance = np.random.default_rng(seed)
    arrivals_s = draw_arrivals_s(load.rate_per_s, load.bursts, calls, chance)
    environment = simpy.Environment()
    free = [simpy.Resource(environment, instances) for _ in batch_times]
    replicas = [_Replica(environment, *parts, batching) for parts in zip(free, batch_times, strict=True)]
    clients = chance.integers(0, load.clients, calls)
    rows = chance.geometric(1.0 / load.rows_per_call, calls)
    for client in range(load.clients):
        own = clients == client
        first = int(chance.integers(0, len(replicas)))
        environment.process(_client(environment, arrivals_s[own], rows[own], replicas, first))
    environment.run()
    answered = np.array([answer for replica in replicas for answer in replica.answers]).reshape(-1, 2)
    counted = answered[answered[:, 0] >= arrivals_s[int(calls * _WARM_UP_SHARE)], 1]
    rejected = sum(replica.rejected for replica in replicas)
    p50_s, p99_s = np.quantile(counted, [0.5, 0.99])
    return Simulated(
        calls=calls,
        p50_s=float(p50_s),
        p99_s=float(p99_s),
        mean_s=float(counted.mean()),
        busy_share=sum(replica.busy_s for replica in replicas) / float(environment.now) / len(replicas) / instances,
        batch_mean=len(answered) / sum(replica.batches for replica in replicas),
        rejected_share=rejected / calls,
    )


def _client(
    environment: simpy.Environment, times_s: Float64, rows: Int64, replicas: Sequence[_Replica], turn: int
) -> Generator[simpy.Event, Any, None]:
    for time_s, count in zip(times_s.tolist(), rows.tolist(), strict=True):
        yield environment.timeout(max(time_s - environment.now, 0.0))
        replicas[turn].submit(count)
        turn = (turn + 1) % len(replicas)


@dataclass
class _Replica:
    """One Triton: a queue, and the `free` instances of the model."""

    environment: simpy.Environment
    free: simpy.Resource
    batch_time: BatchTime
    batching: Batching
    # (arrival, seconds to the answer) of each answered call
    answers: list[tuple[float, float]] = field(default_factory=list)
    rejected: int = 0
    batches: int = 0
    busy_s: float = 0.0
    _waiting: deque[tuple[float, int]] = field(default_factory=deque)
    _rows: int = 0

    def __post_init__(self) -> None:
        self._arrived = self.environment.event()
        self.environment.process(self._batch())

    def submit(self, rows: int) -> None:
        """Puts a call into the queue, unless that is full."""
        if len(self._waiting) >= self.batching.queue_max:
            self.rejected += 1
            return
        self._waiting.append((self.environment.now, rows))
        self._rows += rows
        if not self._arrived.triggered:
            self._arrived.succeed()

    def _batch(self) -> Generator[simpy.Event, Any, None]:
        environment = self.environment
        while True:
            instance = self.free.request()
            yield instance
            while not self._waiting:
                yield self._next_arrival()
            due_s = self._waiting[0][0] + self.batching.delay_s
            while self._rows < self.batching.rows_max and environment.now < due_s:
                yield environment.any_of((environment.timeout(due_s - environment.now), self._next_arrival()))
            environment.process(self._compute(instance, *self._take()))

    def _compute(
        self, instance: simpy.resources.resource.Request, arrivals_s: list[float], rows: int
    ) -> Generator[simpy.Event, Any, None]:
        seconds = self.batch_time(rows)
        yield self.environment.timeout(seconds)
        self.free.release(instance)
        self.batches += 1
        self.busy_s += seconds
        self.answers += [(arrival_s, self.environment.now - arrival_s) for arrival_s in arrivals_s]

    def _next_arrival(self) -> simpy.Event:
        self._arrived = self.environment.event()
        return self._arrived

    def _take(self) -> tuple[list[float], int]:
        """The arrivals of the calls of the next batch, and its rows."""
        batch: list[float] = []
        taken = 0
        while self._waiting and (not batch or taken + self._waiting[0][1] <= self.batching.rows_max):
            arrival_s, rows = self._waiting.popleft()
            batch.append(arrival_s)
            taken += rows
        self._rows -= taken
        return batch, taken
