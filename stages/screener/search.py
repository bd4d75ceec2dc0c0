"""Chooses the screener: of many candidates, trained within a stated time a row, the one that serves a cascade best.

The candidates are fitted to the first part of the training rows and judged on the rest, so that the validation rows,
from which calibration and thresholds come, have no part in the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import lightgbm
import msgspec
from msgspec.structs import replace
from sklearn.metrics import average_precision_score

from cascade.columns import Float64, Int64
from cascade.progress import Progress
from stages.metrics import recall_at
from stages.screener.cost import us_per_row
from stages.screener.objectives import Objective
from stages.screener.train import EarlyStop, ScreenerRows, ScreenerSettings, train_screener

# Of the time of a row; the rest is for the escalation rule's model, whose size is fixed.
SCREENER_PART = 0.8
_Positive = Annotated[float, msgspec.Meta(gt=0.0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Leaves = Annotated[int, msgspec.Meta(ge=2, le=255)]


class SearchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[screener]` of a training file: which candidates are tried; docs/training.example.toml explains each key."""

    us_per_row_max: _Positive = 2.0
    batch_rows: _Count = 256
    trees_max: _Count = 600
    patience: _Count = 40
    leaves: Annotated[tuple[_Leaves, ...], msgspec.Meta(min_length=1)] = (15, 31, 63)
    learning_rates: Annotated[tuple[_Positive, ...], msgspec.Meta(min_length=1)] = (0.1, 0.05)
    fraud_weights: tuple[_Positive, ...] = (3.0,)
    objectives: tuple[Objective, ...] = ("focal", "lambdarank", "distilled")
    monotone: dict[str, str] = {}
    feature_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.7
    rows_per_leaf_min: _Count = 200
    l2: Annotated[float, msgspec.Meta(ge=0.0)] = 10.0
    worse_share_max: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.005
    tuning_share: Annotated[float, msgspec.Meta(ge=0.05, le=0.5)] = 0.2


class Candidate(msgspec.Struct, frozen=True):
    """A candidate and its figures on the tuning rows.

    - `settings`: with the number of trees that early stopping and the time a row left.
    - `us_per_row`: with the compiled kernel.
    - `average_precision`, `recall_at_budget`: of its ranking.
    """

    settings: ScreenerSettings
    us_per_row: float
    average_precision: float
    recall_at_budget: float

    @property
    def merit(self) -> float:
        """The mean of both: no escalation brings back a fraud outside the budget; the rest is ranked by it alone."""
        return (self.average_precision + self.recall_at_budget) / 2.0


def tuning_part(fraud: Int64, share: float) -> slice:
    """The rows on which candidates are judged: the last `share` of the training rows (fraud int64 [rows])."""
    return slice(round(len(fraud) * (1.0 - share)), len(fraud))


class Search:
    """Tries candidates on training rows in order of time; `tried` has them all."""

    def __init__(self, settings: SearchSettings, budget: float, seed: int, progress: Progress) -> None:
        """`budget`: escalation budget. `progress`: called with the share of the candidates that are tried."""
        self._settings, self._budget, self._seed, self._progress = settings, budget, seed, progress
        self._variants = list(_variants(settings))
        sizes = len(settings.leaves) * len(settings.learning_rates)
        self._planned = sizes + len(self._variants) + ("distilled" in settings.objectives)
        self.tried: list[Candidate] = []

    @property
    def best(self) -> Candidate:
        """The smallest of the candidates that are at most `worse_share_max` worse than the best one.

        By leaves, not by the measured time, so that the same seed gives the same screener.
        """
        enough = (1.0 - self._settings.worse_share_max) * max(candidate.merit for candidate in self.tried)
        return min((one for one in self.tried if one.merit >= enough), key=lambda one: one.settings.size)

    def try_sizes(self, rows: ScreenerRows) -> None:
        """Tries all sizes and learning rates with log-loss, then the best with the other objectives and weights."""
        settings = self._settings
        for leaves in settings.leaves:
            for learning_rate in settings.learning_rates:
                self._try(rows, replace(self._plain, leaves=leaves, learning_rate=learning_rate))
        for changes in self._variants:
            self._try(rows, replace(self.best.settings, **changes))

    def try_distilled(self, rows: ScreenerRows) -> None:
        """Tries the best candidate with the deep model's opinion, `rows.belief`, as its label."""
        if "distilled" in self._settings.objectives:
            self._try(rows, replace(self.best.settings, objective="distilled"))

    @property
    def _plain(self) -> ScreenerSettings:
        settings = self._settings
        return ScreenerSettings(
            trees=settings.trees_max,
            feature_share=settings.feature_share,
            rows_per_leaf_min=settings.rows_per_leaf_min,
            l2=settings.l2,
        )

    def _try(self, rows: ScreenerRows, settings: ScreenerSettings) -> None:
        settings = replace(settings, trees=self._settings.trees_max)
        tuning = rows.take(tuning_part(rows.fraud, self._settings.tuning_share))
        fitted = rows.take(slice(0, len(rows.fraud) - len(tuning.fraud)))
        done = len(self.tried)
        booster = train_screener(
            fitted,
            settings,
            self._seed,
            lambda share: self._progress((done + share) / self._planned),
            EarlyStop(tuning, self._settings.patience),
        )
        trees, us = self._within_time(booster, tuning)
        raw: Float64 = booster.predict(tuning.features, raw_score=True, num_iteration=trees)
        fraud = tuning.fraud == 1
        self.tried.append(
            Candidate(
                replace(settings, trees=trees),
                us,
                float(average_precision_score(fraud, raw)),
                recall_at(raw, fraud, self._budget),
            )
        )

    def _within_time(self, booster: lightgbm.Booster, tuning: ScreenerRows) -> tuple[int, float]:
        """The number of trees that early stopping left, or fewer if they take longer than allowed; and their µs."""
        limit = SCREENER_PART * self._settings.us_per_row_max
        trees = max(1, booster.best_iteration)
        while True:
            text = booster.model_to_string(num_iteration=trees).encode()
            us = us_per_row(text, tuning.features, self._settings.batch_rows)
            if us <= limit or trees == 1:
                return trees, us
            # the time grows with the trees; a little less, so that this ends
            trees = max(1, min(trees - 1, int(0.98 * trees * limit / us)))


def _variants(settings: SearchSettings) -> Iterator[dict[str, Any]]:
    """What is changed in the best candidate so far, for each of the candidates that follow the sizes."""
    for weight in settings.fraud_weights:
        yield {"fraud_weight": weight}
    for objective in settings.objectives:
        if objective in ("focal", "lambdarank"):
            yield {"objective": objective}
    if settings.monotone:
        yield {"monotone": settings.monotone}
