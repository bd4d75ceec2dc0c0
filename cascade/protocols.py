"""The interfaces that the core uses: clock, screener, deep stage and energy meter.

`stages` and `cascade.ledger` implement them. An implementation needs no base class: any object with the methods and
attributes of a protocol is one.
"""

from __future__ import annotations

import time as machine_time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from cascade.columns import Array, Float32, Float64


class Clock(Protocol):
    """Time as an argument, so that a simulation can supply its own."""

    def time(self) -> float:
        """Seconds since the epoch. The value may jump when the machine's clock is set."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment. The value never decreases."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return after so many seconds."""
        ...


class SystemClock:
    """The machine's clock."""

    time = staticmethod(machine_time.time)
    monotonic = staticmethod(machine_time.monotonic)
    sleep = staticmethod(machine_time.sleep)


@dataclass(frozen=True, slots=True)
class DeepInputs:
    """Inputs of the deep model, a row per escalated transaction.

    - `sequences` float32 [rows, length, width], by name: the last transactions of a key (`card_sequence`: of the card),
      oldest first, the current one last. A key with fewer transactions has rows of zeros in front.
    - `features` float32 [rows, features + 1]: the features of the current transaction. The last column is the
      screener's raw score (log-odds).

    `len()` is the number of rows.
    """

    sequences: Mapping[str, Float32]
    features: Float32

    def take(self, rows: Array | slice) -> DeepInputs:
        """Some rows: positions, a mask bool [rows], or a slice."""
        return DeepInputs({name: sequence[rows] for name, sequence in self.sequences.items()}, self.features[rows])

    def __len__(self) -> int:
        return len(self.features)


class Screener(Protocol):
    """Scores every transaction, for use by one thread.

    Equal features give equal scores, whatever the other rows of the call: after a restart a replayed transaction gets
    the same decision.
    """

    @property
    def method(self) -> str:
        """A short name of the algorithm for the ledger, such as `quickscorer`, `walk` or `lightgbm`."""
        ...

    def warm_up(self) -> None:
        """Do now what would make the first `score` slow, such as compiling."""
        ...

    def score(self, features: Float32) -> Float64:
        """Raw scores (log-odds) float64 [rows] for features float32 [rows, features]."""
        ...


class DeepStage(Protocol):
    """Scores the escalated transactions with the deep model, without blocking the caller.

    One thread calls the methods. Futures complete in any thread, so a callback of a future must be thread-safe.

    - `hedged`: calls that were sent a second time because the first had no answer (0 where a stage never does).
    - `late_answers`: calls whose answer arrived after their future had failed with `deadline`.

    Both only increase; the caller reads them for the ledger.

    A stage that gives every transaction the same score:

    >>> import numpy as np
    >>> class ConstantStage:
    ...     hedged = late_answers = 0
    ...     def submit(self, inputs, timeout_s):
    ...         future = Future()
    ...         future.set_result(np.zeros(len(inputs)))
    ...         return future
    ...     def probe(self, timeout_s):
    ...         row = DeepInputs({"card_sequence": np.zeros((1, 16, 6), np.float32)}, np.zeros((1, 22), np.float32))
    ...         return self.submit(row, timeout_s)
    ...     def wait_ready(self, timeout_s): ...
    ...     def close(self): ...
    >>> stage: DeepStage = ConstantStage()
    >>> stage.probe(timeout_s=0.1).result()
    array([0.])
    """

    @property
    def hedged(self) -> int:
        """See above."""
        ...

    @property
    def late_answers(self) -> int:
        """See above."""
        ...

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """Start scoring and return at once.

        The future gives raw scores (log-odds), finite float64 [rows] in the order of `inputs`. It fails with
        `DeepStageError`, whose `cause` is `deadline` (no answer in time), `queue-full` (the model refused the call) or
        `error`. It is done at the latest `timeout_s` seconds after the call, successfully or not. `submit` itself
        raises nothing.
        """
        ...

    def probe(self, timeout_s: float) -> Future[Float64]:
        """Start scoring one row of zeros, to find out whether the model answers. The future is as that of `submit`."""
        ...

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the model answers.

        Raises `ModelServerError` if it does not within `timeout_s` seconds, or at once if it is not the bundle's model.
        """
        ...

    def close(self) -> None:
        """Release connections, threads and sessions. Unfinished futures fail with cause `error`."""
        ...


class ReplicaState(NamedTuple):
    """A replica of a model server, as its client sees it.

    - `address`: `ip:port`.
    - `ready`, `problem`: whether it gets calls, and if not, why.
    - `calls`, `failures`: requests that were sent to it and that failed, since the client knows it.
    """

    address: str
    ready: bool
    problem: str
    calls: int
    failures: int


@runtime_checkable
class Replicated(Protocol):
    """A deep stage with several replicas of its model server; for any thread."""

    def replicas(self) -> list[ReplicaState]:
        """The state of each replica."""
        ...


EnergyKind = Literal["measured", "modelled"]


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """Energy that a meter has counted since its start.

    - `energy_j`: joules.
    - `kind`: `measured` by a hardware counter, or `modelled` from CPU time. The ledger never adds the two.
    - `source`: the counter, or the model with its inputs, for the reader of the ledger.
    - `uncertainty`: largest relative error that the counter's manufacturer states (0.05 is five per cent); None if
      nobody states one.
    - `check_j`: the same joules determined in a second, independent way; None if there is none.
    """

    energy_j: float
    kind: EnergyKind
    source: str
    uncertainty: float | None = None
    check_j: float | None = None


class EnergyMeter(Protocol):
    """A source of joules, such as one GPU or one CPU package.

    - `name`: identifies the meter in the ledger, unique on the machine.

    A meter exists only where its hardware exists: no meter reads zero because a counter is absent.

    >>> class UnitMeter:
    ...     name = "power supply unit"
    ...     def read(self):
    ...         return EnergyReading(energy_j=12.5, kind="measured", source="PMBus READ_EIN")
    >>> meter: EnergyMeter = UnitMeter()
    >>> meter.read().energy_j
    12.5
    """

    name: str

    def read(self) -> EnergyReading:
        """Joules since the creation of the meter, never fewer than the previous reading.

        Raises OSError or CascadeError if the counter is lost. The ledger then records the problem, and no joules.
        """
        ...
