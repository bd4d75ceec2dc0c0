"""Which transactions go to the deep model: by what the ranking gains, or by how unsure the screener is.

Every rule gives each row an escalation score, and the rows with the highest scores are escalated. The rules are learned
and compared on out-of-fold scores of the training rows, so that the choice does not look at the validation rows.
"""

from __future__ import annotations

import lightgbm
import msgspec
import numpy as np
from sklearn.metrics import average_precision_score

from cascade.columns import Array, Bool, Float32, Float64
from cascade.policy import RAW_MAX, Calibration, Combination, Escalation, uncertainty
from stages.calibration import FRAUDS_MIN, fit_calibration, fit_combination
from stages.escalation.gains import GainTable, gains

# The first model learns against the screener's ranking, the second against the cascade's that results.
ROUNDS = 2
# It runs on every transaction, so it is small: about 0.2 µs a row. 100 × 31 leaves found no more.
GAIN_MODEL = {
    "objective": "regression",
    "num_leaves": 16,
    "max_depth": 5,
    "learning_rate": 0.1,
    "feature_fraction": 0.7,
    "lambda_l2": 10.0,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}
GAIN_TREES = 64
ROWS_PER_LEAF_MIN = 200
# Candidates for the rows above the middle of the uncertain band, as multiples of the budget. The first is the highest
# score.
SKIPS = (-0.5, *(step / 4 for step in range(13)))


class ScoredRows(msgspec.Struct, frozen=True):
    """Rows with the scores of both models, in order of time.

    - `features` float32 [rows, width + 1]: the last column is the screener's raw score, as the deep model gets it.
    - `screener_raw`, `deep_raw`, `weight` float64 [rows]; `fraud` bool [rows].
    - `names`: those of the features, that of the raw score included.
    """

    features: Float32
    screener_raw: Float64
    deep_raw: Float64
    fraud: Bool
    weight: Float64
    names: tuple[str, ...]

    def take(self, rows: Array | slice) -> ScoredRows:
        """Some rows (positions, a mask or a slice)."""
        return ScoredRows(
            self.features[rows], self.screener_raw[rows], self.deep_raw[rows], self.fraud[rows], self.weight[rows],
            self.names,
        )  # fmt: skip

    def average_precision(self, score: Float64) -> float:
        """Average precision of a score float64 [rows]."""
        return float(average_precision_score(self.fraud, score, sample_weight=self.weight))


class Rule(msgspec.Struct, frozen=True):
    """A learned rule.

    - `escalation`: its threshold is the one that the policy gets from the validation rows, here still RAW_MAX.
    - `gain_model`: of the rule `gain`. It is trained in any case, for the comparison in the report.
    - `average_precision`: of the cascade by each rule, on rows from which the rules did not learn; empty where there
      were too few frauds for a comparison.
    """

    escalation: Escalation
    gain_model: lightgbm.Booster
    average_precision: dict[str, float]


def top_share(score: Float64, weight: Float64, share: float) -> Bool:
    """Mask of the rows with the highest scores, whose weight is at most `share` of the whole; bool [rows].

    Rows of equal score count together, so that ties never exceed the share.
    """
    order = np.argsort(-score, kind="stable")
    outside = np.cumsum(weight[order]) > share * weight.sum() * (1 + 1e-12)
    if not outside.any():
        return np.ones(len(score), np.bool_)
    chosen: Bool = score > score[order[int(np.argmax(outside))]]
    return chosen


def learn_rule(rows: ScoredRows, budget: float, seed: int) -> Rule:
    """Learns both rules, and chooses the one whose cascade has the better average precision.

    For the choice the rules are learned from the first half of the rows, and compared on the second. With too few
    frauds for that it is `uncertainty`, which learns a single number. Raises DataError if even all rows have too few.
    """
    half = len(rows.fraud) // 2
    first, second = rows.take(slice(0, half)), rows.take(slice(half, None))
    enough = min(int(part.fraud.sum()) for part in (first, second)) >= FRAUDS_MIN
    compared = _compared(first, second, budget, seed) if enough else {}
    screener, combined = _calibrated(rows)
    model = _fit_gain_model(rows, screener, combined, budget, seed)
    centre = _best_centre(rows, screener, combined, budget)
    name = "gain" if compared and compared["gain"] >= compared["uncertainty"] else "uncertainty"
    return Rule(Escalation(budget, name, RAW_MAX, centre), model, compared)  # type: ignore[arg-type]


def _compared(first: ScoredRows, second: ScoredRows, budget: float, seed: int) -> dict[str, float]:
    """The cascade's average precision on the second rows by each rule, learned from the first."""
    screener, combined = _calibrated(first)
    by_gain = _fit_gain_model(first, screener, combined, budget, seed).predict(second.features)
    by_uncertainty = uncertainty(second.screener_raw, _best_centre(first, screener, combined, budget))
    return {
        name: second.average_precision(_cascade(second, screener, combined, score, budget))
        for name, score in (("gain", by_gain), ("uncertainty", by_uncertainty))
    }


def _calibrated(rows: ScoredRows) -> tuple[Calibration, Combination]:
    return (
        fit_calibration(rows.screener_raw, rows.fraud, rows.weight),
        fit_combination(rows.screener_raw, rows.deep_raw, rows.fraud, rows.weight),
    )


def _cascade(rows: ScoredRows, screener: Calibration, combined: Combination, score: Float64, budget: float) -> Float64:
    """The cascade's probabilities, float64 [rows], if the rows with the highest escalation `score` are escalated."""
    return np.where(
        top_share(score, rows.weight, budget),
        combined.probability(rows.screener_raw, rows.deep_raw),
        screener.probability(rows.screener_raw),
    )


def _fit_gain_model(
    rows: ScoredRows, screener: Calibration, combination: Combination, budget: float, seed: int
) -> lightgbm.Booster:
    """A model of what the ranking gains if a row is escalated."""
    screened = screener.probability(rows.screener_raw)
    combined = combination.probability(rows.screener_raw, rows.deep_raw)
    least = min(ROWS_PER_LEAF_MIN, max(1, len(rows.fraud) // 100))
    # frauds are rare: without the factor the gains are too small for the regularisation
    factor = rows.weight.sum() / rows.weight[rows.fraud].sum()
    ranked = screened
    for _ in range(ROUNDS):
        gain = gains(GainTable.of(ranked, rows.fraud, rows.weight), screened, combined, rows.fraud)
        data = lightgbm.Dataset(rows.features, factor * gain, weight=rows.weight, feature_name=list(rows.names))
        model = lightgbm.train({**GAIN_MODEL, "min_data_in_leaf": least, "seed": seed}, data, GAIN_TREES)
        ranked = _cascade(rows, screener, combination, model.predict(rows.features), budget)
    return model


def _best_centre(rows: ScoredRows, screener: Calibration, combined: Combination, budget: float) -> float:
    """The raw score around which the cascade's ranking gains most if the budget is spent there."""
    order = np.argsort(-rows.screener_raw, kind="stable")
    above = np.cumsum(rows.weight[order]) / rows.weight.sum()

    def merit(centre: float) -> float:
        score = uncertainty(rows.screener_raw, centre)
        return rows.average_precision(_cascade(rows, screener, combined, score, budget))

    middles = [min(int(np.searchsorted(above, (skip + 0.5) * budget)), len(order) - 1) for skip in SKIPS]
    return max((float(rows.screener_raw[order[middle]]) for middle in middles), key=merit)
