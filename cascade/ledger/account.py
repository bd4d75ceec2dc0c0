"""A ledger's account: everything that it knows at a moment, in a form that is written, read and merged.

A summary holds quantiles, and quantiles of several ledgers cannot be put together; an account holds the histograms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import reduce
from typing import Any, Final, Self

import msgspec

from cascade.errors import DataError
from cascade.ledger.counters import Counters
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.machine import Machine
from cascade.ledger.sla import ServiceLevel
from cascade.protocols import EnergyKind

ACCOUNT_FORMAT: Final = 1
# What a table can show; a merged meter says how many sources it has beyond these.
SOURCES_MAX: Final = 4


class MeterState(msgspec.Struct, frozen=True, kw_only=True):
    """The last word of one meter: joules since the ledger began, or the problem since which it gives none.

    `kind` stays known where a meter that once worked is lost, so that its kind's total is known to lack it. Merged, it
    is `meters` of them: their sum, the first `SOURCES_MAX` of their sources in order, and no sum where one was lost.
    `carbon_g`: of these joules, where carbon is accounted and the grid's intensity was known all the time.
    `uncertainty` and `check_j`: as an EnergyReading has them.
    """

    meter: str
    kind: EnergyKind | None
    sources: tuple[str, ...]
    energy_j: float | None
    problem: str | None
    meters: int = 1
    carbon_g: float | None = None
    uncertainty: float | None = None
    check_j: float | None = None

    @classmethod
    def of(
        cls, meter: str, kind: EnergyKind | None, source: str, energy_j: float | None, problem: str | None,
        carbon_g: float | None = None, uncertainty: float | None = None, check_j: float | None = None,
    ) -> Self:  # fmt: skip
        """The state of a single meter; `source` is empty where it has none."""
        sources = (source,) if source else ()
        return cls(
            meter=meter, kind=kind, sources=sources, energy_j=energy_j, problem=problem, carbon_g=carbon_g,
            uncertainty=uncertainty, check_j=check_j,
        )  # fmt: skip

    @property
    def source(self) -> str:
        """Where the joules come from, in a line."""
        more = self.meters - len(self.sources)
        return "; ".join(self.sources) + (f"; and {more} more" if self.sources and more else "")

    def since(self, earlier: MeterState | None) -> MeterState:
        """The joules after an earlier word of the same meter; of all where that gave none."""
        if self.energy_j is None or earlier is None or earlier.energy_j is None:
            return self
        sources = tuple(f"a part of {source}" for source in self.sources)
        carbon_g = None if self.carbon_g is None else self.carbon_g - (earlier.carbon_g or 0.0)
        return msgspec.structs.replace(
            self,
            energy_j=self.energy_j - earlier.energy_j,
            sources=sources,
            carbon_g=carbon_g,
            check_j=None if self.check_j is None or earlier.check_j is None else self.check_j - earlier.check_j,
        )

    def merged(self, other: MeterState) -> MeterState:
        """Both together."""
        known = self.energy_j is not None and other.energy_j is not None
        return MeterState(
            meter=self.meter,
            kind=self.kind,
            sources=tuple(sorted(self.sources + other.sources)[:SOURCES_MAX]),
            energy_j=(self.energy_j or 0.0) + (other.energy_j or 0.0) if known else None,
            problem=min(filter(None, (self.problem, other.problem)), default=None),
            meters=self.meters + other.meters,
            carbon_g=sum_if_known((self.carbon_g, other.carbon_g)),
            uncertainty=_max_if_known((self.uncertainty, other.uncertainty)),
            check_j=sum_if_known((self.check_j, other.check_j)),
        )


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a ledger knows from `started` to `ended`; of several, merged, from the first to the last.

    `bundle_versions`, `screeners`, `deep_backends`, `machines`: each that occurs, in order. `carbon_bases`: by which
    inputs carbon was accounted, each that occurs; `embodied_g`: of the hardware's making, None where no carbon is
    accounted.
    """

    format: int = ACCOUNT_FORMAT
    started: datetime
    ended: datetime
    counters: Counters
    meters: tuple[MeterState, ...]
    service_level: ServiceLevel
    watts_per_core: float | None
    bundle_versions: tuple[str, ...]
    screeners: tuple[str, ...]
    machines: tuple[Machine, ...]
    carbon_bases: tuple[str, ...] = ()
    embodied_g: float | None = None
    gpu_idle_watts: float | None = None
    deep_backends: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """One line of JSON, without a line end."""
        return msgspec.json.encode(self, enc_hook=_encode)

    def since(self, earlier: Account) -> Account:
        """What came after `earlier`, an account of the same ledger; raises DataError where it is none."""
        if earlier.started != self.started or earlier.ended > self.ended:
            raise DataError("ledger accounts: not an earlier and a later one of the same ledger")
        before = {(state.meter, state.kind): state for state in earlier.meters}
        return msgspec.structs.replace(
            self,
            started=earlier.ended,
            counters=self.counters.since(earlier.counters),
            meters=tuple(state.since(before.get((state.meter, state.kind))) for state in self.meters),
            embodied_g=None if self.embodied_g is None else self.embodied_g - (earlier.embodied_g or 0.0),
        )

    @classmethod
    def from_json(cls, line: bytes) -> Account:
        """The account that `to_json` wrote; raises DataError for anything else."""
        try:
            account = msgspec.json.decode(line, type=cls, dec_hook=_decode)
        except msgspec.MsgspecError as error:
            raise DataError(f"ledger account: not one that this release reads ({error})") from error
        if account.format != ACCOUNT_FORMAT:
            raise DataError(f"ledger account: format {account.format}, this release reads {ACCOUNT_FORMAT}")
        return account


def merge_accounts(accounts: Iterable[Account]) -> Account:
    """One account of all, as of a ledger that had been told everything, in whatever order they are given.

    Counts and buckets are exact; sums of seconds and joules are so within the rounding of float64. Meters of the same
    name and kind are added up: what two ledgers have metered both, a GPU say, counts twice, so one of them must own it.
    Raises DataError where there are none, or where they were kept under different service levels or stated watts.
    """
    given = list(accounts)
    if not given:
        raise DataError("ledger accounts: none to merge")
    return reduce(_merged, given)


def _merged(one: Account, other: Account) -> Account:
    if _terms(one) != _terms(other):
        raise DataError("ledger accounts: kept under different service levels or stated watts; merge like with like")
    counters = one.counters.copy()
    counters.merge(other.counters)
    return Account(
        started=min(one.started, other.started),
        ended=max(one.ended, other.ended),
        counters=counters,
        meters=_merged_meters(one.meters + other.meters),
        service_level=one.service_level,
        watts_per_core=one.watts_per_core,
        bundle_versions=tuple(sorted({*one.bundle_versions, *other.bundle_versions})),
        screeners=tuple(sorted({*one.screeners, *other.screeners})),
        machines=_in_order(one.machines + other.machines),
        carbon_bases=tuple(sorted({*one.carbon_bases, *other.carbon_bases})),
        embodied_g=sum_if_known((one.embodied_g, other.embodied_g)),
        gpu_idle_watts=one.gpu_idle_watts,
        deep_backends=tuple(sorted({*one.deep_backends, *other.deep_backends})),
    )


def _terms(account: Account) -> tuple[object, ...]:
    """What two accounts must have alike to be put together."""
    return account.service_level, account.watts_per_core, account.gpu_idle_watts


def sum_if_known(values: Sequence[float | None]) -> float | None:
    """Their sum; None where one of them is not known, never a part of it."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _max_if_known(values: Sequence[float | None]) -> float | None:
    """The largest; None where one of them is not known."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _merged_meters(states: Iterable[MeterState]) -> tuple[MeterState, ...]:
    found: dict[tuple[str, EnergyKind | None], MeterState] = {}
    for state in states:
        key = (state.meter, state.kind)
        found[key] = found[key].merged(state) if key in found else state
    return tuple(found[key] for key in sorted(found, key=lambda key: (key[0], key[1] or "")))


def _in_order(machines: Iterable[Machine]) -> tuple[Machine, ...]:
    by_text = {machine.text: machine for machine in machines}
    return tuple(by_text[text] for text in sorted(by_text))


def _encode(value: Any) -> Any:
    if isinstance(value, LatencyHistogram):
        return value.to_dict()
    raise NotImplementedError(f"{type(value)} has no place in an account")


def _decode(kind: type, value: Any) -> Any:
    if kind is LatencyHistogram:
        return LatencyHistogram.from_dict(value)
    raise NotImplementedError(f"{kind} has no place in an account")
