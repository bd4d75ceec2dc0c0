"""What a ledger says at a moment, as plain records: the form of its JSON lines and the source of its tables."""

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
from cascade.protocols import EnergyKind

SUMMARY_FORMAT: Final = 2


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles, mean and maximum in ms; `clamped` of `count` values lay beyond the histogram's range."""

    count: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    clamped: int

    @classmethod
    def of(cls, histogram: LatencyHistogram) -> LatencyFigures | None:
        """The figures of a histogram; None where it is empty."""
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
    """Decisions on one path: how many, their share of all, and the latency from append to decision."""

    decisions: int
    share: float | None
    latency: LatencyFigures | None


class StageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: `latency` is what each transaction spent in it, so a row of a batch has the batch's duration.

    `cpu_s`: of the worker's thread, in total. `cpu_us_per_transaction` and `modelled_mj_per_transaction` (CPU seconds ×
    stated watts) are over all decisions of the ledger; None where there are none, or no watts are stated.
    """

    latency: LatencyFigures | None
    cpu_s: float
    cpu_us_per_transaction: float | None
    modelled_mj_per_transaction: float | None


class DeepCallFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Calls to the deep model; `latency` is a call's, not a transaction's. `late_answers`: calls answered too late for
    some or all of their rows.

    `hedged_calls`: sent a second time.
    """

    calls: int
    rows: int
    rows_per_call: float | None
    latency: LatencyFigures | None
    late_answers: int
    hedged_calls: int


class ClockFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's clock against the one that stamps records, by their least wait in the last ten minutes.

    The worker's clock is ahead by at most `least_wait_ms`; where that is negative, behind by at least as much. Of
    several workers it is the lowest, `least_wait_ms_highest` the highest. `early_records`: stamped ahead of the
    worker's clock.
    """

    least_wait_ms: float
    least_wait_ms_highest: float
    early_records: int


class EnergyFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One meter's figure. Where its counter was lost, `energy_j` is None (never 0) and `problem` says why."""

    meter: str
    kind: EnergyKind | None
    source: str
    energy_j: float | None
    per_transaction_mj: float | None
    problem: str | None


class EnergyTotal(msgspec.Struct, frozen=True, kw_only=True):
    """The sum over the meters of one kind; None where one of them was lost. There is no total over both kinds."""

    kind: EnergyKind
    meters: tuple[str, ...]
    energy_j: float | None
    per_transaction_mj: float | None


class CarbonTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Grams of CO2e of the energy of one kind; None where a meter of it was lost, or the grid's intensity unknown."""

    kind: EnergyKind
    operational_g: float | None
    per_million_g: float | None


class CarbonFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Carbon after ISO/IEC 21031; `bases`: the inputs. `embodied_g`: of the hardware's making, for the time.

    `sci_g_per_million`: operational and embodied for a million decisions, where all energy is of one kind; a sum of
    measured and modelled grams is not told.
    """

    bases: tuple[str, ...]
    totals: tuple[CarbonTotal, ...]
    embodied_g: float | None
    embodied_per_million_g: float | None
    sci_g_per_million: float | None


class ModelQuality(msgspec.Struct, frozen=True, kw_only=True):
    """How well one way of deciding did. Counts are at the comparison's `alert_rule`; None where not evaluated."""

    name: str
    frauds_caught: int
    frauds_missed: int
    false_alarms: int | None = None
    auc_roc: float | None = None
    average_precision: float | None = None
    card_precision_100: float | None = None


class QualityComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Ways of deciding side by side, on the same `transactions` of which `frauds` are fraud.

    `alert_rule`: when a transaction counts as caught, the same for all (`the 1 % with the highest scores`, say).
    """

    transactions: int
    frauds: int
    alert_rule: str
    models: tuple[ModelQuality, ...]


class DeepOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Deep-only in calls of `rows_per_call` transactions, J; `ratio`: how many times the cascade's joules.

    `saving_j`, `saving_share` (of deep-only's joules): negative where deep-only costs less. `break_even_share`: of
    transactions that are escalated, at which both cost the same; None where the cascade asked the deep model nothing.
    """

    rows_per_call: float
    energy_j: Estimate
    ratio: Estimate
    saving_j: Estimate
    saving_share: Estimate
    break_even_share: Estimate | None


class EnergyComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Cascade against deep-only by the meters of one kind, J.

    `cascade_j`: by the ledger. `screener_j`: its screener's part. `own_deep_j`: its deep calls' part, where the model
    server's is metered and the client's priced by the call; `own_deep_priced_j`: both priced, as a check. `shared_j`:
    what is left, which deep-only needs as well. `filled`: calls as full as the stream fills them in time; `as_called`:
    as full as the cascade's own; None where it made none.
    """

    kind: EnergyKind
    meters: tuple[str, ...]
    cascade_j: float
    screener_j: float
    own_deep_j: Estimate
    own_deep_priced_j: Estimate | None
    shared_j: Estimate
    filled: DeepOnly
    as_called: DeepOnly | None


class Counterfactual(msgspec.Struct, frozen=True, kw_only=True):
    """What the same stream would have cost with every transaction through the deep model; see ledger/counterfactual.py.

    `transactions`: through the models, so without duplicates; `asked`: of them, the deep model was asked. `per_second`
    and `limit_ms` (the escalated path's; None where there is none) say how full a call gets in time. `undivided`:
    meters of the whole machine, which are not compared. The rest tells by what the cost of a call was measured.
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
    """Everything a ledger knows at `ended`. Shares are in 0..1 of all decisions; None where there are none.

    `paths` also holds `all`. `escalation_share` is what the deep model was asked: escalated and degraded together.
    `degraded_by_cause`, `dead_letters` (by reason), `labels`: counts. `duplicate_share`: transactions that came again
    and got their first decision again, the hit rate of the idempotency cache. `recovery`: from the assignment of a
    partition to its first decision, one value a partition. `sessions`: times that connections were made anew, the
    first included. `offset_gaps`: stretches without records in the log. `escalation_raised_max`: how far overload has
    raised the escalation threshold, log-odds. `screener`: how it scored; `deep_backend`: what ran the deep model.
    `processes`: workers of one service side by side; `restarts`: times that one of them ended unexpectedly, whose last
    second is then in no figure. `burn`: error budgets over time, of a journal only. `clock`: None where no
    record came in the last ten minutes. `books`: the joules by who used them. `other_machines`: beside `machine`, where
    ledgers of several were merged.
    `counterfactual`: deep-only, where its cost was measured and given.
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
    escalation_raised_max: float
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

    def to_json_line(self) -> bytes:
        """One line of JSON, without a line end."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json_line(cls, line: bytes) -> LedgerSummary:
        """The summary that `to_json_line` wrote; raises DataError for anything else."""
        try:
            summary = msgspec.json.decode(line, type=cls)
        except msgspec.MsgspecError as error:
            raise DataError(f"ledger summary: not a line that this release reads ({error})") from error
        if summary.format != SUMMARY_FORMAT:
            raise DataError(f"ledger summary: format {summary.format}, this release reads {SUMMARY_FORMAT}")
        return summary
