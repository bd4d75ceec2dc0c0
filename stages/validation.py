"""The validation rows with the scores of both models: what calibration, thresholds and the report are made from.

A bundle has them as `validation.parquet`, so that `cascade recalibrate` needs neither the data nor a training. Cards
are numbered in order of appearance; no identity of a card or a transaction is in it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import polars as pl
from msgspec.structs import replace

from cascade.columns import Array, Bool, Float64, Int64
from cascade.errors import BundleError
from cascade.escalation_budget import EscalationBudget
from cascade.features.spec import DAY_MS
from cascade.policy import RAW_MAX, Escalation, Policy, uncertainty

# The columns of `validation.parquet`.
_STORED = pl.Schema(
    {
        "day": pl.Int32, "card": pl.Int32, "fraud": pl.Boolean, "amount": pl.Float32, "screener_raw": pl.Float32,
        "deep_raw": pl.Float32, "gain": pl.Float32,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ValidationRows:
    """Rows in order of event time.

    - `day`, `card` int64 [rows]: days since the epoch; a number for each card.
    - `fraud` bool [rows]; `amount` float64 [rows], in the currency of the costs.
    - `screener_raw`, `deep_raw` float64 [rows]: log-odds of both models.
    - `gain` float64 [rows]: the escalation score of the rule `gain`.

    Scores and amounts have the precision of float32, as they are stored.
    """

    day: Int64
    card: Int64
    fraud: Bool
    amount: Float64
    screener_raw: Float64
    deep_raw: Float64
    gain: Float64

    @classmethod
    def of(
        cls,
        time_ms: Int64,
        card: Int64,
        fraud: Bool,
        amount: Float64,
        screener_raw: Float64,
        deep_raw: Float64,
        gain: Float64,
    ) -> ValidationRows:
        """Rows with event times `time_ms` int64 (ms since the epoch) and `card` int64, any number for each card."""
        _, first, number = np.unique(card, return_index=True, return_inverse=True)
        order = np.empty(len(first), np.int64)
        order[np.argsort(first)] = np.arange(len(first))
        return cls(time_ms // DAY_MS, order[number], fraud, *map(_rounded, (amount, screener_raw, deep_raw, gain)))

    def __len__(self) -> int:
        return len(self.fraud)

    def escalation_score(self, escalation: Escalation) -> Float64:
        """The escalation scores float64 [rows] by a rule."""
        return self.gain if escalation.rule == "gain" else uncertainty(self.screener_raw, escalation.centre)

    def at_budget(self, escalation: Escalation, budget: float) -> Escalation:
        """The rule with another budget, and with the threshold that escalates so many of these rows."""
        threshold = escalation_threshold(self.escalation_score(escalation), budget)
        return replace(escalation, budget=budget, threshold=threshold)

    def escalated(self, policy: Policy) -> Bool:
        """Mask of the rows that a service would escalate, bool [rows]: the budget holds over any 10,000 of them."""
        return EscalationBudget.of_policy(policy).choose(self.escalation_score(policy.escalation))

    def cascade(self, policy: Policy) -> Float64:
        """The cascade's probabilities of fraud, float64 [rows]."""
        return policy.probability(self.screener_raw, self.deep_raw, self.escalated(policy))

    @property
    def days(self) -> int:
        """The number of days from the first to the last row."""
        return int(self.day[-1] - self.day[0]) + 1

    def to_parquet(self) -> bytes:
        """The content of `validation.parquet`."""
        target = io.BytesIO()
        columns = {name: getattr(self, name) for name in _STORED}
        pl.DataFrame(columns).cast(_STORED).write_parquet(target, compression="zstd", compression_level=9)
        return target.getvalue()

    @classmethod
    def from_parquet(cls, content: bytes, origin: str) -> ValidationRows:
        """Reads `to_parquet`'s result. Raises BundleError, which names `origin`."""
        try:
            frame = pl.read_parquet(io.BytesIO(content), columns=list(_STORED))
            if frame.schema != _STORED or any(column.has_nulls() for column in frame):
                raise pl.exceptions.SchemaError("columns of other types, or with nulls")
        except (pl.exceptions.PolarsError, OSError) as error:
            reason = " ".join(str(error).split())
            raise BundleError(f"{origin}: cannot be read ({reason}); train the bundle again") from error
        wide = frame.cast({pl.Float32: pl.Float64, pl.Int32: pl.Int64})
        return cls(*(wide[name].to_numpy() for name in _STORED))


def escalation_threshold(score: Float64, budget: float) -> float:
    """The score that at most a share of `budget` of the rows exceed. `score` float64 [rows].

    Rows that tie with it are not escalated, so that ties never exceed the budget. A budget of 1 gives −RAW_MAX, one
    below the share of a single row RAW_MAX.
    """
    if budget >= 1.0:
        return -RAW_MAX
    allowed = int(budget * len(score))
    return float(np.sort(score)[::-1][allowed]) if allowed else RAW_MAX


def _rounded(values: Array) -> Float64:
    return values.astype(np.float32).astype(np.float64)
