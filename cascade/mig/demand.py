"""What a plan must carry: the calls of each model, with their service level, stated or from a ledger's journal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np

from cascade.durations import parse_ms
from cascade.errors import DataError, SettingError
from cascade.ledger.account import Account
from cascade.ledger.journal import NO_ACCOUNT, Run, merged_between
from cascade.mig.arrivals import Bursts
from cascade.setting_files import parse_settings, read_setting_file

MODELS_MAX: Final = 5
# Rates are forecasts, and near its limit a replica's p99 rises steeply.
RESERVE: Final = 1.25
INTERVALS_MAX: Final = 10_000

Positive = Annotated[float, msgspec.Meta(gt=0, le=1_000_000_000)]


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of one model.

    calls_per_s: at the peak. calls_per_s_mean: over the time that joules are counted for.
    reserve: `p99_s` must be kept up to this multiple of the peak.
    rows_per_call: transactions in a call, mean. bursts: about the rate, within minutes.
    p99_s: limit of the 99th percentile of a call's time at the server.
    memory_gb: that one instance of the model needs on the GPU.
    """

    name: str = "deep"
    calls_per_s: float
    calls_per_s_mean: float
    reserve: float = 1.0
    rows_per_call: float = 1.0
    bursts: Bursts | None = None
    p99_s: float
    memory_gb: float = 2.0

    @property
    def calls_per_s_kept(self) -> float:
        """The rate up to which `p99_s` must be kept."""
        return self.calls_per_s * self.reserve


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[models]]` of a plan file; the options of `cascade mig plan` have the same names.

    rate, mean_rate: transactions a second, at the peak and in the mean (by default the same).
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=32)] = "deep"
    rate: Positive
    mean_rate: Positive | None = None
    reserve: Annotated[float, msgspec.Meta(ge=1, le=100)] = RESERVE
    escalated: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    p99: str
    rows_per_call: Annotated[float, msgspec.Meta(ge=1, le=256)] = 1.0
    bursts: Bursts | None = None
    memory_gb: Positive = 2.0
    measured: dict[str, str] = {}

    def demand(self, origin: str) -> Demand:
        """The demand. Raises SettingError, which names `origin`, for a p99 that is no duration and for odd rates."""
        mean_rate = self.rate if self.mean_rate is None else self.mean_rate
        if mean_rate > self.rate:
            raise SettingError(origin, "mean_rate", mean_rate, f"above the rate at the peak, {self.rate:g}", "lower it")
        try:
            p99_s = parse_ms(self.p99) / 1e3
        except ValueError as error:
            raise SettingError(origin, "p99", self.p99, str(error), "write it as 20ms") from error
        if not p99_s:
            raise SettingError(origin, "p99", self.p99, "no call takes no time", "use 1ms or more")
        share = self.escalated / self.rows_per_call
        return Demand(
            name=self.name,
            calls_per_s=self.rate * share,
            calls_per_s_mean=mean_rate * share,
            reserve=self.reserve,
            rows_per_call=self.rows_per_call,
            bursts=self.bursts,
            p99_s=p99_s,
            memory_gb=self.memory_gb,
        )


class _PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: Annotated[tuple[ModelEntry, ...], msgspec.Meta(min_length=1, max_length=MODELS_MAX)]


def read_models(path: Path) -> tuple[ModelEntry, ...]:
    """The models of a plan file (TOML). Raises SettingError if it cannot be read or used, or names a model twice."""
    models = parse_settings(read_setting_file(path), _PlanFile, path, "docs/mig.md").models
    names = [model.name for model in models]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise SettingError(path, f"models[{number}].name", name, "names a model twice", "give each its own")
    return models


class JournalRates(msgspec.Struct, frozen=True, kw_only=True):
    """The deep calls of a journal.

    calls_per_s_mean, calls_per_s_max: over the whole journal, and in its busiest interval.
    rows_per_call: mean. dispersion: variance ÷ mean of the calls in an interval; None with fewer than two intervals.
    """

    interval_s: float
    intervals: int
    calls_per_s_mean: float
    calls_per_s_max: float
    rows_per_call: float
    escalated_share: float
    dispersion: float | None


def journal_rates(runs: Sequence[Run], interval_s: float) -> JournalRates:
    """The rates in intervals of a journal. A service that writes less often than `interval_s` shows false peaks.

    Raises DataError for a journal without deep calls and for more than INTERVALS_MAX intervals.
    """
    start = min(run.accounts[0].started for run in runs)
    end = max(run.accounts[-1].ended for run in runs)
    step = timedelta(seconds=interval_s)
    count = max(-((start - end) // step), 1)
    if count > INTERVALS_MAX:
        raise DataError(f"{count:,} intervals of {interval_s:g} s, the maximum is {INTERVALS_MAX:,}; use longer ones")
    found = (merged_between(runs, start + number * step, start + (number + 1) * step) for number in range(count))
    accounts = [account for account in found if account is not None]
    if not accounts:
        raise DataError(NO_ACCOUNT)
    seconds = np.array([(account.ended - account.started).total_seconds() for account in accounts])
    # a stub of an interval, as a service that ends leaves it, is no peak
    whole = seconds >= min(interval_s, seconds.max()) / 2.0
    accounts, seconds = [account for account, keep in zip(accounts, whole, strict=True) if keep], seconds[whole]
    calls = np.array([account.counters.deep_calls.count for account in accounts], np.float64)
    if not calls.sum():
        raise DataError("the journal has no deep call: state the rate with --rate")
    rates = calls / seconds
    return JournalRates(
        interval_s=interval_s,
        intervals=len(accounts),
        calls_per_s_mean=float(calls.sum() / seconds.sum()),
        calls_per_s_max=float(rates.max()),
        rows_per_call=sum(account.counters.deep_rows for account in accounts) / float(calls.sum()),
        escalated_share=_escalated_share(accounts),
        dispersion=float(calls.var(ddof=1) / calls.mean()) if len(calls) > 1 else None,
    )


def _escalated_share(accounts: Sequence[Account]) -> float:
    escalated = sum(account.counters.paths[path].count for account in accounts for path in ("escalated", "degraded"))
    return escalated / max(sum(account.counters.decisions for account in accounts), 1)
