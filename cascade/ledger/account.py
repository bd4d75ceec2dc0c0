"""A ledger's account: all its counts, histograms and meter readings at a moment; it can be written, read and merged.

A summary has quantiles, which cannot be merged. An account has the histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import reduce
from typing import Any, Final

import msgspec

from cascade.errors import DataError
from cascade.ledger.counters import Counters
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.machine import Machine
from cascade.ledger.sla import ServiceLevel
from cascade.protocols import EnergyKind

ACCOUNT_FORMAT: Final = 1
# A table has room for these; `MeterState.source` gives the number of the others.
SOURCES_MAX: Final = 4


class MeterState(msgspec.Struct, frozen=True):
    """The last reading of one meter, or of `meters` meters of the same name and kind, merged.

    meter: its name.
    kind: also set after a working meter was lost, so that the total of its kind is unknown; None if it never worked.
    sources: where the joules come from, sorted; at most `SOURCES_MAX`.
    energy_j: joules since the ledger began; None if a meter was lost.
    problem: why `energy_j` is None.
    carbon_g: gCO2e of these joules; None without carbon accounting, or if the grid's intensity was ever unknown.
    uncertainty, check_j: as in EnergyReading.
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

    @property
    def source(self) -> str:
        """All sources in one line."""
        more = self.meters - len(self.sources)
        return "; ".join(self.sources) + (f"; and {more} more" if self.sources and more else "")

    def since(self, earlier: MeterState | None) -> MeterState:
        """The joules since an earlier state of the same meter; all of them if `earlier` has none."""
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
        """The sum of both states; without joules if either has none."""
        known = self.energy_j is not None and other.energy_j is not None
        return msgspec.structs.replace(
            self,
            sources=tuple(sorted(self.sources + other.sources)[:SOURCES_MAX]),
            energy_j=(self.energy_j or 0.0) + (other.energy_j or 0.0) if known else None,
            problem=min(filter(None, (self.problem, other.problem)), default=None),
            meters=self.meters + other.meters,
            carbon_g=sum_if_known((self.carbon_g, other.carbon_g)),
            uncertainty=sum_if_known((self.uncertainty, other.uncertainty), max),
            check_j=sum_if_known((self.check_j, other.check_j)),
        )


class CertifiedRecall(msgspec.Struct, frozen=True):
    """What the bundle's certificate states of the recall: see `cascade.certificate.Recall`."""

    at_least: float
    alarm_level: float
    expires: datetime


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """All counts and readings of a ledger from `started` to `ended`, or of several merged ledgers.

    watts_per_core, gpu_idle_watts: stated in the settings; None if not stated.
    bundle_versions, screeners, deep_backends, machines, carbon_bases: each value that occurs, sorted.
    embodied_g: gCO2e of manufacturing the hardware; None without carbon accounting.
    certified: by the bundle's certificate; None without one, and where merged accounts have different ones.
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
    certified: CertifiedRecall | None = None

    def to_json(self) -> bytes:
        """One line of JSON without a newline."""
        return msgspec.json.encode(self, enc_hook=_encode)

    def since(self, earlier: Account) -> Account:
        """The difference from `earlier`, an earlier account of the same ledger; raises DataError if it is not one."""
        if earlier.started != self.started or earlier.ended > self.ended:
            raise DataError("ledger accounts: only accounts of the same ledger have a difference, the earlier first")
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
        """Reads what `to_json` wrote; raises DataError for anything else."""
        try:
            account = msgspec.json.decode(line, type=cls, dec_hook=_decode)
        except msgspec.MsgspecError as error:
            raise DataError(f"ledger account: this release cannot read it ({error})") from error
        if account.format != ACCOUNT_FORMAT:
            raise DataError(f"ledger account: format {account.format}; this release reads format {ACCOUNT_FORMAT}")
        return account


def merge_accounts(accounts: Iterable[Account]) -> Account:
    """The account that a single ledger would have made of the same events; the order of `accounts` does not matter.

    Counts and buckets are exact; sums of seconds and joules are exact within the rounding of float64. Meters of the
    same name and kind are added up, so only one ledger may read a device: a GPU in two ledgers would count twice.
    Raises DataError if there is no account, or if service levels or stated watts differ.
    """
    found = list(accounts)
    if not found:
        raise DataError("ledger accounts: there is none to merge")
    return reduce(_merged, found)


def _merged(first: Account, second: Account) -> Account:
    if _settings(first) != _settings(second):
        raise DataError("ledger accounts: their service levels or stated watts differ; merge only accounts that agree")
    counters = first.counters.copy()
    counters.merge(second.counters)
    return msgspec.structs.replace(
        first,
        started=min(first.started, second.started),
        ended=max(first.ended, second.ended),
        counters=counters,
        meters=_merged_meters(first.meters + second.meters),
        bundle_versions=tuple(sorted({*first.bundle_versions, *second.bundle_versions})),
        screeners=tuple(sorted({*first.screeners, *second.screeners})),
        machines=_distinct(first.machines + second.machines),
        carbon_bases=tuple(sorted({*first.carbon_bases, *second.carbon_bases})),
        embodied_g=sum_if_known((first.embodied_g, second.embodied_g)),
        deep_backends=tuple(sorted({*first.deep_backends, *second.deep_backends})),
        certified=first.certified if first.certified == second.certified else None,
    )


def _settings(account: Account) -> tuple[object, ...]:
    """The settings that must be equal in accounts to be merged."""
    return account.service_level, account.watts_per_core, account.gpu_idle_watts


def sum_if_known(values: Sequence[float | None], combine: Callable[[Sequence[float]], float] = sum) -> float | None:
    """The sum, or what `combine` gives; None if any value is unknown, so that a part never passes for the whole."""
    known = [value for value in values if value is not None]
    return combine(known) if len(known) == len(values) else None


def _merged_meters(states: Iterable[MeterState]) -> tuple[MeterState, ...]:
    found: dict[tuple[str, EnergyKind | None], MeterState] = {}
    for state in states:
        key = (state.meter, state.kind)
        found[key] = found[key].merged(state) if key in found else state
    return tuple(found[key] for key in sorted(found, key=lambda key: (key[0], key[1] or "")))


def _distinct(machines: Iterable[Machine]) -> tuple[Machine, ...]:
    by_text = {machine.text: machine for machine in machines}
    return tuple(by_text[text] for text in sorted(by_text))


def _encode(value: Any) -> Any:
    if isinstance(value, LatencyHistogram):
        return value.to_dict()
    raise NotImplementedError(f"an account cannot contain a {type(value)}")


def _decode(kind: type, value: Any) -> Any:
    if kind is LatencyHistogram:
        return LatencyHistogram.from_dict(value)
    raise NotImplementedError(f"an account cannot contain a {kind}")
