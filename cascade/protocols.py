"""What the core asks of the models, of the energy meters and of time; `stages` and the ledger fulfil it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from cascade.columns import Float32, Float64


class Clock(Protocol):
    """Time, as an argument: a simulation brings its own."""

    def time(self) -> float:
        """Seconds since the epoch; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        """See Clock."""
        return time.time()

    def monotonic(self) -> float:
        """See Clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See Clock."""
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class DeepInputs:
    """What the deep model reads, a row per escalated transaction.

    `sequence` float32 [rows, length, width]: the card's last transactions, oldest first, zero rows in front where
    there are fewer, the current one last. `features` float32 [rows, features + 1]: the current features and, as
    the last column, the screener's raw score.
    """

    sequence: Float32
    features: Float32

    def __len__(self) -> int:
        return len(self.features)


class Screener(Protocol):
    """Scores every transaction.

    `method` names how: `quickscorer`, `walk` or `lightgbm`; the simulator of faults has its own.
    """

    @property
    def method(self) -> str:
        """See the class."""
        ...

    def warm_up(self) -> None:
        """Do now what the first call of `score` would have to, compiling among it."""
        ...

    def score(self, features: Float32) -> Float64:
        """Raw scores (log-odds) float64 [rows] of features float32 [rows, features]."""
        ...


class DeepStage(Protocol):
    """Scores the escalated transactions, without blocking the caller.

    `hedged`: calls that were sent a second time. `late_answers`: calls that were answered after their time was up, when
    their future had failed already.
    """

    hedged: int
    late_answers: int

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        """Start scoring; the future holds raw scores (log-odds) float64 [rows].

        The future fails with DeepStageError (`deadline`, `queue-full` or `error`); at the latest `timeout_s`
        seconds after the call it is done, one way or the other.
        """
        ...

    def probe(self, timeout_s: float) -> Future[Float64]:
        """Start scoring one row of zeros, to see whether the model answers; as `submit`."""
        ...

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the model answers; raises ModelServerError after `timeout_s` seconds."""
        ...

    def close(self) -> None:
        """Release connections, threads and sessions."""
        ...


EnergyKind = Literal["measured", "modelled"]


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """Energy that a meter has counted since it was started.

    `energy_j`: joules. `kind`: measured by a hardware counter, or modelled from CPU time. `source`: the counter or
    the model with its inputs, for the ledger's reader. `uncertainty`: by how much of itself the figure may be off, as
    the counter's maker states it; None where nobody does. `check_j`: the same joules by another way, where there is
    one.
    """

    energy_j: float
    kind: EnergyKind
    source: str
    uncertainty: float | None = None
    check_j: float | None = None


class EnergyMeter(Protocol):
    """A source of joules; hardware that is absent is an absent meter, never a meter that reads zero."""

    name: str

    def read(self) -> EnergyReading:
        """Joules since the meter was made; raises OSError or CascadeError where the counter is lost."""
        ...
