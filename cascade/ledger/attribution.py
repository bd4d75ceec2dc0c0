"""Attribution of the joules of the meters to their uses, as double-entry books.

The reading of a meter is on one side. The entries are on the other: idle, each stage, deep answers that decided a
transaction, deep answers that decided nothing, the rest of the worker, and a residual. The residual is the part that
the other entries do not explain, so the two sides are equal by construction. The books are good if the residual is
small, and if a second measurement of the same joules (`check_j`) agrees with the counter.

Worker: the CPU seconds of each stage, measured on the worker's thread, times the stated watts. One further line has the
rest of the process: fetching and the threads of the clients.
Deep model: divided by rows. Rows whose answers came too late, or whose transactions were decided otherwise, have a line
of their own.
Idle: a line of its own if idle power is stated; else it is part of the other lines, and `Books.idle_stated` is False.
Counters of the whole machine are not divided, because other processes are in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from cascade.errors import CascadeError
from cascade.ledger.account import Account, MeterState
from cascade.ledger.counters import Counters
from cascade.ledger.energy import DEEP_METER, IDLE_METER, WORKER_METER
from cascade.protocols import EnergyKind

# Names of lines; the worker's stages are lines too.
IDLE: Final = "idle"
WORKER_REST: Final = "worker, besides its stages"
DEEP: Final = "deep answers"
WASTED: Final = "deep answers that decided nothing"
UNDIVIDED: Final = "machine, not divided"
RESIDUAL: Final = "residual"
# A residual below this share of the meter's joules is the rounding error of float64 sums.
ROUNDING: Final = 1e-12
Path = Literal["screened", "escalated"]
OfEach = Path | Literal["all"] | None
# line, joules, the decisions that share them equally
_Share = tuple[str, float, OfEach]


class MixedEnergyError(CascadeError):
    """A caller asked for a sum over measured and modelled joules without `mixed=True`."""


class Entry(msgspec.Struct, frozen=True):
    """Joules of one meter on one line. `of_each`: the decisions that share them equally; None if none do."""

    line: str
    meter: str
    kind: EnergyKind
    energy_j: float
    of_each: OfEach


class Closing(msgspec.Struct, frozen=True):
    """The balance of one meter.

    energy_j: joules by the meter; entries_j: the sum of its entries; residual_j: the difference.
    check_j: the same joules by a second measurement (power integrated over time); None if there is none.
    """

    meter: str
    kind: EnergyKind
    energy_j: float
    entries_j: float
    residual_j: float
    check_j: float | None

    @property
    def residual_share(self) -> float:
        """The residual as a share of the meter's joules; 0 if it has none."""
        return self.residual_j / self.energy_j if self.energy_j else 0.0

    @property
    def check_share(self) -> float | None:
        """The difference of the second measurement from the meter, as a share of the meter's joules."""
        return None if self.check_j is None or not self.energy_j else self.check_j / self.energy_j - 1.0


class PathEnergy(msgspec.Struct, frozen=True):
    """mJ of one kind for a decision on a path: its own, and its share of what all decisions use. Without idle."""

    path: Path
    kind: EnergyKind
    mj_per_decision: float


class Books(msgspec.Struct, frozen=True):
    """The entries and balances of all meters over a period.

    idle_stated: True if idle has lines of its own; else it is part of the other lines.
    lost: meters without joules, for which there are no entries.
    """

    entries: tuple[Entry, ...]
    closings: tuple[Closing, ...]
    paths: tuple[PathEnergy, ...]
    idle_stated: bool
    lost: tuple[str, ...]

    def total_j(self, lines: Iterable[str] | None = None, *, mixed: bool = False) -> float:
        """Joules on these lines, on all if None. Raises MixedEnergyError if both kinds occur, unless `mixed` is True.

        >>> entry = Entry("decode", "cpu-worker", "modelled", energy_j=2.0, of_each="all")
        >>> books = Books((entry,), closings=(), paths=(), idle_stated=False, lost=())
        >>> books.total_j(["decode"])
        2.0
        """
        wanted = None if lines is None else set(lines)
        chosen = [entry for entry in self.entries if wanted is None or entry.line in wanted]
        if len({entry.kind for entry in chosen}) > 1 and not mixed:
            raise MixedEnergyError("these joules are both measured and modelled: choose one kind, or pass mixed=True")
        return sum(entry.energy_j for entry in chosen)

    def by_line(self, kind: EnergyKind) -> dict[str, float]:
        """Joules of one kind by line, in the order of the entries."""
        found: dict[str, float] = {}
        for entry in self.entries:
            if entry.kind == kind:
                found[entry.line] = found.get(entry.line, 0.0) + entry.energy_j
        return found


def attribute(account: Account) -> Books:
    """The books of an account: entries and a balance for each meter that has joules."""
    entries: list[Entry] = []
    closings: list[Closing] = []
    lost: list[str] = []
    idle_stated = False
    for state in account.meters:
        if state.energy_j is None or state.kind is None:
            lost.append(state.meter)
            continue
        shares = _shares(state, state.energy_j, account)
        explained_j = sum(energy_j for _, energy_j, _ in shares)
        residual_j = state.energy_j - explained_j
        if abs(residual_j) <= ROUNDING * state.energy_j:
            residual_j = 0.0
        idle_stated |= any(line == IDLE for line, _, _ in shares)
        entries += [
            Entry(line, state.meter, state.kind, energy_j, of_each)
            for line, energy_j, of_each in [*shares, (RESIDUAL, residual_j, None)]
            if energy_j
        ]
        closings.append(Closing(state.meter, state.kind, state.energy_j, explained_j, residual_j, state.check_j))
    return Books(tuple(entries), tuple(closings), _paths(entries, account.counters), idle_stated, tuple(lost))


def _shares(state: MeterState, energy_j: float, account: Account) -> list[_Share]:
    """Divides the joules of one meter."""
    counters = account.counters
    if state.meter == WORKER_METER:
        return _worker(energy_j, counters, account.watts_per_core)
    if state.meter == DEEP_METER:
        return _deep(energy_j, counters)
    if state.meter == IDLE_METER:
        return [(IDLE, energy_j, None)]
    if state.meter.startswith("gpu"):
        return _gpu(energy_j, account, state.meters)
    return [(UNDIVIDED, energy_j, None)]


def _worker(energy_j: float, counters: Counters, watts_per_core: float | None) -> list[_Share]:
    """By stage. The residual is negative if the stages' clocks add up to more than the process has used."""
    if watts_per_core is None:
        return [(WORKER_REST, energy_j, "all")]
    stages: list[_Share] = [
        (stage, cpu_s * watts_per_core, "all") for stage, cpu_s in counters.stage_cpu_s.items() if cpu_s
    ]
    rest_j = energy_j - sum(stage_j for _, stage_j, _ in stages)
    return [*stages, (WORKER_REST, max(rest_j, 0.0), "all")]


def _deep(dynamic_j: float, counters: Counters) -> list[_Share]:
    """By rows. Without any row there is nothing to divide by, so that the joules become the residual."""
    rows = counters.deep_rows
    if not rows:
        return []
    answered = min(counters.paths["escalated"].count, rows)
    wasted_j = dynamic_j * (rows - answered) / rows
    return [(DEEP, dynamic_j - wasted_j, "escalated"), (WASTED, wasted_j, None)]


def _gpu(energy_j: float, account: Account, gpus: int) -> list[_Share]:
    """Stated idle power first, at most all of the joules; the rest by rows."""
    if account.gpu_idle_watts is None:
        return _deep(energy_j, account.counters)
    elapsed_s = (account.ended - account.started).total_seconds()
    idle_j = min(account.gpu_idle_watts * elapsed_s * gpus, energy_j)
    return [(IDLE, idle_j, None), *_deep(energy_j - idle_j, account.counters)]


def _paths(entries: Sequence[Entry], counters: Counters) -> tuple[PathEnergy, ...]:
    """The energy of a screened and of an escalated decision, by kind."""
    decisions, escalated = counters.decisions, counters.paths["escalated"].count
    if not decisions:
        return ()
    paths = []
    for kind in dict.fromkeys(entry.kind for entry in entries):
        of_all_j = sum(entry.energy_j for entry in entries if entry.kind == kind and entry.of_each == "all")
        own_j = sum(entry.energy_j for entry in entries if entry.kind == kind and entry.of_each == "escalated")
        shared_mj = 1e3 * of_all_j / decisions
        if of_all_j:
            paths.append(PathEnergy("screened", kind, shared_mj))
        if escalated and (of_all_j or own_j):
            paths.append(PathEnergy("escalated", kind, shared_mj + 1e3 * own_j / escalated))
    return tuple(paths)
