"""The figures of a ledger as plain records: its JSON lines, and the source of its tables."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from cascade.errors import DataError
from cascade.ledger.attribution import Books
from cascade.ledger.burn import ObjectiveBurn
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.machine import Machine
from cascade.ledger.sla import ObjectiveResult
from cascade.ledger.unit_costs import UnitCosts
from cascade.protocols import EnergyKind

SUMMARY_FORMAT: Final = 2


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles, mean and maximum in ms. `clamped` of the `count` values were above the range of the histogram."""

    count: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    clamped: int

    @classmethod
    def of(cls, histogram: LatencyHistogram) -> LatencyFigures | None:
        """The figures of a histogram; None if it is empty."""
        if not histogram.count:
            return None
        return cls(
            count=histogram.count,
            mean_ms=1e3 * histogram.mean_s,
            p50_ms=1e3 * histogram.quantile(0.5),
            p99_ms=1e3 * histogram.quantile(0.99),
            p999_ms=1e3 * histogram.quantile(0.999),
            max_ms=1e3 * histogram.max_s,
            clamped=histogram.clamped,
        )


class PathFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The decisions on one path: their number, their share of all, and their latency from append to decision."""

    decisions: int
    share: float | None
    latency: LatencyFigures | None


class StageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One stage.

    latency: time that each transaction spent in it: for all rows of a batch, the duration of the batch.
    cpu_s: CPU seconds of the worker's thread, in total.
    cpu_us_per_transaction: CPU µs over all decisions of the ledger; None without decisions.
    modelled_mj_per_transaction: CPU seconds × stated watts, over all decisions; None without either.
    """

    latency: LatencyFigures | None
    cpu_s: float
    cpu_us_per_transaction: float | None
    modelled_mj_per_transaction: float | None


class DeepCallFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The calls to the deep model.

    calls, rows, rows_per_call: their number, their transactions, and the mean of transactions per call.
    latency: of calls, not of transactions.
    late_answers: calls whose answer came too late for some or all of their transactions.
    hedged_calls: calls that were sent a second time.
    """

    calls: int
    rows: int
    rows_per_call: float | None
    latency: LatencyFigures | None
    late_answers: int
    hedged_calls: int


class ClockFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's clock against the clock that stamps records, by the least wait of the last ten minutes.

    least_wait_ms: the worker's clock is ahead by at most this; if negative, behind by at least as much. The lowest of
        several workers.
    least_wait_ms_highest: the highest of several workers.
    early_records: records with a stamp ahead of the worker's clock.
    """

    least_wait_ms: float
    least_wait_ms_highest: float
    early_records: int


class WatchFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What labels say of the certificate, on cards' first frauds in a period.

    caught: of the `first_frauds`, those that had been reviewed or declined. at_least: the recall that the certificate
    states. evidence_nats, alarm_nats: evidence that the recall is lower, and from where on it is an alarm. holds: no
    alarm. expires: the end of the certificate.
    """

    first_frauds: int
    caught: int
    at_least: float
    evidence_nats: float
    alarm_nats: float
    holds: bool
    expires: datetime


class EnergyFigure(msgspec.Struct, frozen=True, kw_only=True):
    """The joules of one meter. If the meter was lost, `energy_j` is None (never 0) and `problem` is the reason."""

    meter: str
    kind: EnergyKind | None
    source: str
    energy_j: float | None
    per_transaction_mj: float | None
    problem: str | None


class EnergyTotal(msgspec.Struct, frozen=True, kw_only=True):
    """The joules of all meters of one kind; None if one of them was lost. There is no total over both kinds."""

    kind: EnergyKind
    meters: tuple[str, ...]
    energy_j: float | None
    per_transaction_mj: float | None


class CarbonTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Grams of CO2e for the energy of one kind; None if one of its meters was lost or the intensity was unknown."""

    kind: EnergyKind
    operational_g: float | None
    per_million_g: float | None


class CarbonFigures(msgspec.Struct, frozen=True, kw_only=True):
    """gCO2e after ISO/IEC 21031.

    bases: the inputs. totals: grams of the energy, by kind.
    embodied_g: grams of manufacturing the hardware, for the time of the ledger.
    sci_g_per_million: operational and embodied grams per million decisions; None if the energy has both kinds, because
        measured and modelled grams are never added up.
    """

    bases: tuple[str, ...]
    totals: tuple[CarbonTotal, ...]
    embodied_g: float | None
    embodied_per_million_g: float | None
    sci_g_per_million: float | None


class ModelQuality(msgspec.Struct, frozen=True, kw_only=True):
    """The quality of one model. Counts are at the `alert_rule` of the comparison; None for a figure not evaluated."""

    name: str
    frauds_caught: int
    frauds_missed: int
    false_alarms: int | None = None
    auc_roc: float | None = None
    average_precision: float | None = None
    card_precision_100: float | None = None


class QualityComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Models side by side, on the same `transactions`, of which `frauds` are fraud.

    `alert_rule`: which transactions are alerts, for all models (for example `the 1 % with the highest scores`).
    """

    transactions: int
    frauds: int
    alert_rule: str
    models: tuple[ModelQuality, ...]


class DeepOnly(msgspec.Struct, frozen=True, kw_only=True):
    """The energy of deep-only in calls of `rows_per_call` transactions.

    energy_j: its joules. ratio: its joules over those of the cascade. ratio_without_idle: the same, if the idle joules
        that are known count on neither side; None if nothing is left on the cascade's.
    saving_j, saving_share: joules that the cascade saves, and their share of `energy_j`; negative if deep-only uses
        less.
    break_even_share: escalation rate at which both use the same; None if the cascade made no deep call.
    unit_costs: c0, s and D behind these figures.
    """

    rows_per_call: float
    energy_j: Estimate
    ratio: Estimate
    ratio_without_idle: Estimate | None
    saving_j: Estimate
    saving_share: Estimate
    break_even_share: Estimate | None
    unit_costs: UnitCosts


class EnergyComparison(msgspec.Struct, frozen=True, kw_only=True):
    """The cascade against deep-only by the meters of one kind, in joules.

    cascade_j: joules of the cascade, by the ledger.
    screener_j: the part of its screener.
    own_deep_j: the part of its deep calls: the model server's joules by its meter, the client's at the cost of a call.
    own_deep_priced_j: the same, with both at the cost of a call, as a check; None without a deep call.
    shared_j: the rest, which deep-only needs too. idle_j: the part of it that is idle power, as far as it is known.
    filled: deep-only in calls as large as the stream fills them within the limit.
    as_called: deep-only in calls as large as the cascade's own; None without a deep call.
    """

    kind: EnergyKind
    meters: tuple[str, ...]
    cascade_j: float
    screener_j: float
    own_deep_j: Estimate
    own_deep_priced_j: Estimate | None
    shared_j: Estimate
    idle_j: Estimate
    filled: DeepOnly
    as_called: DeepOnly | None


class Counterfactual(msgspec.Struct, frozen=True, kw_only=True):
    """The energy of the same stream with every transaction through the deep model; see ledger/counterfactual.py.

    transactions: without duplicates. asked: those that were sent to the deep model.
    per_second, limit_ms: rate of the stream, and limit of the escalated path (None without one), for `filled`.
    comparisons: by kind of energy.
    undivided: meters of the whole machine, which are not compared.
    measured_at, server, rounds, method: of the DeepCost.
    """

    transactions: int
    asked: int
    per_second: float
    limit_ms: float | None
    comparisons: tuple[EnergyComparison, ...]
    undivided: tuple[str, ...]
    measured_at: datetime
    server: str
    rounds: int
    method: str


class LedgerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of a ledger at `ended`. Shares are in 0..1 of all decisions; None without decisions.

    screener, deep_backend: how the screener scored, and the backend of the deep model.
    paths: by path, and `all`.
    escalation_share: escalated and degraded decisions together.
    degraded_by_cause, dead_letters, labels: counts; dead letters by reason.
    duplicate_share: repeated transactions, which got their first decision again: the hit rate of the idempotency cache.
    recovery: time from the assignment of a partition to its first decision.
    sessions: times that the worker opened its connections, with the first.
    offset_gaps: confirmed gaps in the offsets of the log.
    state_covered, state_covered_min: the share of the longest window that the feature state covers at the end, and the
        lowest.
    budget_factor_min: the lowest part of the escalation budget that overload has left.
    energy, energy_totals: joules by meter and by kind. books: joules by use.
    burn: error budgets over time; only from a journal.
    clock: None without a record in the last ten minutes.
    other_machines: further machines of merged ledgers.
    processes: workers of the service.
    restarts: times that a worker ended unexpectedly; its last second is missing in all figures.
    counterfactual: the comparison with deep-only; None without a measured DeepCost.
    watch: of the certificate; None without one.
    """

    format: int = SUMMARY_FORMAT
    started: datetime
    ended: datetime
    elapsed_s: float
    bundle_version: str
    screener: str = ""
    deep_backend: str = ""
    transactions: int
    per_second: float
    paths: dict[str, PathFigures]
    escalation_share: float | None
    degraded_share: float | None
    degraded_by_cause: dict[str, int]
    duplicate_share: float | None
    dead_letters: dict[str, int]
    labels: int
    recovery: LatencyFigures | None
    sessions: int
    offset_gaps: int
    budget_factor_min: float = 1.0
    state_covered: float | None = None
    state_covered_min: float | None = None
    deep: DeepCallFigures
    stages: dict[str, StageFigures]
    watts_per_core: float | None
    energy: tuple[EnergyFigure, ...]
    energy_totals: tuple[EnergyTotal, ...]
    books: Books | None = None
    carbon: CarbonFigures | None = None
    objectives: tuple[ObjectiveResult, ...]
    burn: tuple[ObjectiveBurn, ...] = ()
    clock: ClockFigures | None = None
    machine: Machine
    other_machines: tuple[Machine, ...] = ()
    processes: int = 1
    restarts: int = 0
    quality: QualityComparison | None = None
    counterfactual: Counterfactual | None = None
    watch: WatchFigures | None = None

    def to_json_line(self) -> bytes:
        """One line of JSON without a newline."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json_line(cls, line: bytes) -> LedgerSummary:
        """Reads what `to_json_line` wrote; raises DataError for anything else."""
        try:
            summary = msgspec.json.decode(line, type=cls)
        except msgspec.MsgspecError as error:
            raise DataError(f"ledger summary: this release cannot read it ({error})") from error
        if summary.format != SUMMARY_FORMAT:
            raise DataError(f"ledger summary: format {summary.format}; this release reads format {SUMMARY_FORMAT}")
        return summary
