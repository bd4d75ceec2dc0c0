"""c0 and s of a service: what every transaction costs besides the deep model, by a ledger, or by a stated default."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from cascade.errors import DataError
from cascade.ledger import LedgerSummary, read_journal, summarise
from cascade.ledger.counterfactual import deep_only, escalated_limit_ms
from cascade.ledger.deep_cost import DeepCost, Estimate
from cascade.ledger.journal import NO_ACCOUNT, merged_between
from cascade.protocols import EnergyKind

# CPU µs of the service for a transaction, by transactions a second: `cascade bench echo` with the model in process up
# to 10,000/s, `cascade bench pipeline` (librdkafka, a backlog) for the last; two cores of an AMD EPYC, 2026-11-30
# (docs/performance.md). They include the screener and 1 % of deep calls, so c0 is a little too high and the saving a
# little too small.
DEFAULT_US: Final = {
    100.0: 1_156.0,
    300.0: 731.0,
    1_000.0: 304.0,
    3_000.0: 109.0,
    10_000.0: 44.0,
    96_174.0: 12.5,
}
# The service level of `[sla]` by default.
LIMIT_MS: Final = 20.0
# A loop under load rests for at most 4 ms, and takes what has come meanwhile (decision 21).
COLLECTED_S: Final = 0.005


class SharedCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a service costs besides its deep calls, by kind of energy, mJ a transaction.

    shared_mj: c0, with idle power. idle_mj: the idle power in it, as far as it is known. screener_mj: s.
    limit_ms: of the escalated path; None without one. collected_s: how long a deep call of the cascade collects rows.
    origin: where the figures come from, in words.
    """

    shared_mj: dict[EnergyKind, Estimate]
    idle_mj: dict[EnergyKind, Estimate]
    screener_mj: dict[EnergyKind, float]
    limit_ms: float | None
    collected_s: float
    origin: str


def read_ledger(path: Path) -> LedgerSummary:
    """A ledger: a file of `cascade run --ledger`, or a journal's directory. Raises DataError for anything else."""
    if path.is_dir():
        account = merged_between(read_journal([path]), None, None)
        if account is None:
            raise DataError(NO_ACCOUNT)
        return summarise(account)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); use a file of `cascade run --ledger`, or a journal's directory"
        raise DataError(f"{path}: {reason}") from error
    try:
        return LedgerSummary.from_json_line(content)
    except DataError as error:
        raise DataError(f"{path}: {error}; use a file of `cascade run --ledger`, or a journal's directory") from error


def of_ledger(summary: LedgerSummary, cost: DeepCost, path: Path) -> SharedCost:
    """The costs in a ledger, without its deep calls. Raises CounterfactualError if `cost` is of another service."""
    found = deep_only(summary, cost)
    units = {comparison.kind: comparison.filled.unit_costs for comparison in found.comparisons}
    escalated_per_s = found.asked / summary.elapsed_s
    return SharedCost(
        shared_mj={kind: unit.shared_mj for kind, unit in units.items()},
        idle_mj={kind: unit.idle_mj for kind, unit in units.items()},
        screener_mj={kind: unit.screener_mj for kind, unit in units.items()},
        limit_ms=escalated_limit_ms(summary),
        collected_s=collected_s(summary.deep.rows_per_call or 1.0, escalated_per_s) if found.asked else COLLECTED_S,
        origin=f"c0 and s: of {path.name}, {summary.transactions:,} decisions at {summary.per_second:,.0f}/s",
    )


def by_default(cost: DeepCost, rate: float, screener_us: float) -> SharedCost:
    """The stated costs at `rate` transactions a second, and the idle power of the meters of `cost`.

    screener_us: CPU µs of the screener for a row.
    """
    service_us = float(np.exp(np.interp(np.log(rate), np.log([*DEFAULT_US]), np.log([*DEFAULT_US.values()]))))
    shared, idle, screener = {}, {}, {}
    for kind in cost.kinds:
        own_mj = service_us * cost.watts_per_core / 1e3 if kind == "modelled" else 0.0
        idle[kind] = cost.idle_w(kind).map(lambda watts: max(watts, 0.0) * 1e3 / rate)
        shared[kind] = idle[kind].map(lambda idle_mj, own_mj=own_mj: own_mj + idle_mj)  # type: ignore[misc]
        screener[kind] = screener_us * cost.watts_per_core / 1e3 if kind == "modelled" else 0.0
    return SharedCost(
        shared_mj=shared,
        idle_mj=idle,
        screener_mj=screener,
        limit_ms=LIMIT_MS,
        collected_s=COLLECTED_S,
        origin=(
            f"c0: the default, {service_us:,.0f} CPU µs at {rate:,.0f}/s by bench echo and bench pipeline of 2026-11-30"
            " on two cores of an AMD EPYC; --ledger takes your own. s: of the bundle's report"
        ),
    )


def collected_rows(escalated_per_s: float, seconds: float) -> float:
    """The mean rows of a call that takes what has come within `seconds`, if arrivals are random and no call is empty.

    λ ÷ (1 − e^−λ), the mean of a Poisson distribution without its zero, with λ = escalated_per_s · seconds.

    >>> collected_rows(10.0, 0.0)
    1.0
    """
    mean = escalated_per_s * seconds
    return mean / -float(np.expm1(-mean)) if mean > 0.0 else 1.0


def collected_s(rows_per_call: float, escalated_per_s: float) -> float:
    """The seconds for which `collected_rows` gives the mean `rows_per_call`; 0 for single rows."""
    low, high = 0.0, rows_per_call / escalated_per_s
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if collected_rows(escalated_per_s, middle) < rows_per_call else (low, middle)
    return low
