"""Who used the joules that the meters told, as double entry: every meter's joules stand on both sides.

On one side is what a meter says. On the other are entries: idle, each stage, the deep model's answers, the answers that
came to nothing, what the worker does besides, and a residual, which is what the entries do not explain. The two sides
are equal by construction; how well the books are kept is told by the residual, and by how far the counter is from the
same joules by another way.

Worker: its CPU seconds by stage, measured on its own thread, at the stated watts; the rest of its process (fetching,
the clients' threads) on a line of its own. Deep model: by the rows it was sent, those whose answers decided something
apart from those that came too late or whose transactions were decided without. Idle: where it is stated; without a
statement it is within the other lines, and `Books.idle_stated` says so. What a machine-wide counter tells is not
divided: other processes are in it.
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

# Names of entries beside those of the worker's stages.
IDLE: Final = "idle"
WORKER_REST: Final = "worker, besides its stages"
DEEP: Final = "deep answers"
WASTED: Final = "deep answers that decided nothing"
UNDIVIDED: Final = "machine, not divided"
RESIDUAL: Final = "residual"
# Of a meter's joules: what adding up float64 leaves.
ROUNDING: Final = 1e-12
Path = Literal["screened", "escalated"]


class MixedEnergyError(CascadeError):
    """A sum over measured and modelled joules was asked for without saying that a mixture is meant."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Joules of one meter on one line. `of_each`: decisions that share them equally; None where nobody's."""

    line: str
    meter: str
    kind: EnergyKind
    energy_j: float
    of_each: Path | Literal["all"] | None


class Closing(msgspec.Struct, frozen=True, kw_only=True):
    """How one meter's page closes: its joules, what the entries besides the residual explain, and what is left.

    `check_j`: the same joules by another way (power integrated over time), where there is one.
    """

    meter: str
    kind: EnergyKind
    energy_j: float
    entries_j: float
    residual_j: float
    check_j: float | None

    @property
    def residual_share(self) -> float:
        """Of the meter's joules; 0 where it has none."""
        return self.residual_j / self.energy_j if self.energy_j else 0.0

    @property
    def check_share(self) -> float | None:
        """How far the other way is from the meter, as a share of it."""
        return None if self.check_j is None or not self.energy_j else self.check_j / self.energy_j - 1.0


class PathEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """mJ of one kind that a decision on a path has used, its share of what all share included; idle is not in it."""

    path: Path
    kind: EnergyKind
    mj_per_decision: float


class Books(msgspec.Struct, frozen=True, kw_only=True):
    """The books of a window. `lost`: meters that gave no joules, whose page is missing.

    `idle_stated`: whether idle stands apart; else it is within the other lines.
    """

    entries: tuple[Entry, ...]
    closings: tuple[Closing, ...]
    paths: tuple[PathEnergy, ...]
    idle_stated: bool
    lost: tuple[str, ...]

    def total_j(self, lines: Iterable[str] | None = None, *, mixed: bool = False) -> float:
        """Joules on these lines, on all where None; raises MixedEnergyError for two kinds at once, unless `mixed`.

        >>> one = Entry(line="decode", meter="cpu-worker", kind="modelled", energy_j=2.0, of_each="all")
        >>> books = Books(entries=(one,), closings=(), paths=(), idle_stated=False, lost=())
        >>> books.total_j(["decode"])
        2.0
        """
        wanted = None if lines is None else set(lines)
        chosen = [entry for entry in self.entries if wanted is None or entry.line in wanted]
        if len({entry.kind for entry in chosen}) > 1 and not mixed:
            raise MixedEnergyError("joules both measured and modelled: ask for one kind, or for a mixed sum by name")
        return sum(entry.energy_j for entry in chosen)

    def by_line(self, kind: EnergyKind) -> dict[str, float]:
        """Joules of a kind by line, in the order of the entries."""
        found: dict[str, float] = {}
        for entry in self.entries:
            if entry.kind == kind:
                found[entry.line] = found.get(entry.line, 0.0) + entry.energy_j
        return found


def attribute(account: Account) -> Books:
    """The books of an account."""
    entries: list[Entry] = []
    closings: list[Closing] = []
    lost: list[str] = []
    idle_stated = False
    for state in account.meters:
        if state.energy_j is None or state.kind is None:
            lost.append(state.meter)
            continue
        page = _page(state, state.energy_j, state.kind, account)
        explained_j = sum(entry.energy_j for entry in page)
        residual_j = state.energy_j - explained_j
        if abs(residual_j) <= ROUNDING * state.energy_j:
            residual_j = 0.0
        idle_stated |= any(entry.line == IDLE for entry in page)
        entries += [entry for entry in page if entry.energy_j]
        if residual_j:
            entries.append(_entry(RESIDUAL, state, state.kind, residual_j, None))
        closings.append(
            Closing(
                meter=state.meter, kind=state.kind, energy_j=state.energy_j, entries_j=explained_j,
                residual_j=residual_j, check_j=state.check_j,
            )
        )  # fmt: skip
    return Books(
        entries=tuple(entries), closings=tuple(closings), paths=_paths(entries, account.counters),
        idle_stated=idle_stated, lost=tuple(lost),
    )  # fmt: skip


def _page(state: MeterState, energy_j: float, kind: EnergyKind, account: Account) -> list[Entry]:
    """The entries that one meter's joules go to."""
    counters = account.counters
    if state.meter == WORKER_METER:
        return _worker(state, energy_j, kind, counters, account.watts_per_core)
    if state.meter == DEEP_METER:
        return _deep(state, energy_j, kind, counters)
    if state.meter == IDLE_METER:
        return [_entry(IDLE, state, kind, energy_j, None)]
    if state.meter.startswith("gpu"):
        return _gpu(state, energy_j, kind, account)
    return [_entry(UNDIVIDED, state, kind, energy_j, None)]


def _worker(
    state: MeterState, energy_j: float, kind: EnergyKind, counters: Counters, watts_per_core: float | None
) -> list[Entry]:
    """By stage, and the rest; where the stages' clocks tell more than the process used, the residual is negative."""
    if watts_per_core is None:
        return [_entry(WORKER_REST, state, kind, energy_j, "all")]
    page = [
        _entry(stage, state, kind, cpu_s * watts_per_core, "all")
        for stage, cpu_s in counters.stage_cpu_s.items()
        if cpu_s
    ]
    rest_j = energy_j - sum(entry.energy_j for entry in page)
    return [*page, _entry(WORKER_REST, state, kind, max(rest_j, 0.0), "all")]


def _deep(state: MeterState, dynamic_j: float, kind: EnergyKind, counters: Counters) -> list[Entry]:
    """By rows: those that an answer decided, and those that were sent for nothing; without any row, a residual."""
    rows = counters.deep_rows
    if not rows:
        return []
    answered = min(counters.paths["escalated"].count, rows)
    wasted_j = dynamic_j * (rows - answered) / rows
    return [
        _entry(DEEP, state, kind, dynamic_j - wasted_j, "escalated"),
        _entry(WASTED, state, kind, wasted_j, None),
    ]


def _gpu(state: MeterState, energy_j: float, kind: EnergyKind, account: Account) -> list[Entry]:
    """Idle, where it is stated, and the rest by rows; idle is never more than there is."""
    if account.gpu_idle_watts is None:
        return _deep(state, energy_j, kind, account.counters)
    elapsed_s = (account.ended - account.started).total_seconds()
    idle_j = min(account.gpu_idle_watts * elapsed_s * state.meters, energy_j)
    return [
        _entry(IDLE, state, kind, idle_j, None), *_deep(state, energy_j - idle_j, kind, account.counters)
    ]  # fmt: skip


def _entry(
    line: str, state: MeterState, kind: EnergyKind, energy_j: float, of_each: Path | Literal["all"] | None
) -> Entry:
    return Entry(line=line, meter=state.meter, kind=kind, energy_j=energy_j, of_each=of_each)


def _paths(entries: Sequence[Entry], counters: Counters) -> tuple[PathEnergy, ...]:
    """What a screened and an escalated decision cost, by kind: its share of what all share, and what is its own."""
    decisions, escalated = counters.decisions, counters.paths["escalated"].count
    found = []
    for kind in dict.fromkeys(entry.kind for entry in entries):
        of_all_j = sum(entry.energy_j for entry in entries if entry.kind == kind and entry.of_each == "all")
        own_j = sum(entry.energy_j for entry in entries if entry.kind == kind and entry.of_each == "escalated")
        if not decisions:
            continue
        shared_mj = 1e3 * of_all_j / decisions
        if of_all_j:
            found.append(PathEnergy(path="screened", kind=kind, mj_per_decision=shared_mj))
        if escalated and (of_all_j or own_j):
            own_mj = 1e3 * own_j / escalated
            found.append(PathEnergy(path="escalated", kind=kind, mj_per_decision=shared_mj + own_mj))
    return tuple(found)
