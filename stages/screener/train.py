"""Trains a screener of given settings: a LightGBM model that scores a row in a microsecond or two."""

from __future__ import annotations

from typing import Any

import lightgbm
import msgspec
import numpy as np
from lightgbm.callback import CallbackEnv

from cascade.columns import Array, Bool, Float32, Float64, Int64
from cascade.progress import Progress
from stages.screener.objectives import Objective, parameters, queries

DIRECTIONS = {"increasing": 1, "decreasing": -1}


class ScreenerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a screener is trained.

    - `objective`: what it is trained for; see `stages.screener.objectives`.
    - `trees`, `leaves`, `learning_rate`: its size and LightGBM's step.
    - `fraud_weight`: weight of a fraud; that of a genuine transaction is 1.
    - `monotone`: features in which the score may only rise (`increasing`) or fall (`decreasing`), by name.
    - `feature_share`, `rows_per_leaf_min`, `l2`: regularisation.
    """

    objective: Objective = "log-loss"
    trees: int = 64
    leaves: int = 15
    learning_rate: float = 0.1
    fraud_weight: float = 1.0
    monotone: dict[str, str] = {}
    feature_share: float = 0.7
    rows_per_leaf_min: int = 200
    l2: float = 10.0

    @property
    def size(self) -> int:
        """The number of leaves of all trees, on which the time of a row depends."""
        return self.trees * self.leaves


class ScreenerRows(msgspec.Struct, frozen=True):
    """Rows to train on, in order of time.

    - `features` float32 [rows, width]; `names`: those of the features; `categorical`: those that are categories.
    - `fraud` int64 [rows].
    - `belief` float64 [rows]: the deep model's probability of fraud, for the objective `distilled`; NaN: unknown.
    """

    features: Float32
    fraud: Int64
    names: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    belief: Float64 | None = None

    def take(self, rows: Array | Bool | slice) -> ScreenerRows:
        """Some rows (positions, a mask or a slice)."""
        belief = None if self.belief is None else self.belief[rows]
        return ScreenerRows(self.features[rows], self.fraud[rows], self.names, self.categorical, belief)


def train_screener(
    rows: ScreenerRows, settings: ScreenerSettings, seed: int, progress: Progress, stop: EarlyStop | None = None
) -> lightgbm.Booster:
    """Fits a model. With `stop`, the result has the number of trees that is best on other rows, at most `trees`."""

    def report(state: CallbackEnv) -> None:
        progress((state.iteration + 1) / settings.trees)

    data = _dataset(rows, settings)
    callbacks: list[Any] = [report]
    judged: list[lightgbm.Dataset] = []
    if stop is not None:
        callbacks.append(lightgbm.early_stopping(stop.patience, verbose=False))
        judged.append(_dataset(stop.rows, settings, data))
    booster = lightgbm.train(
        _parameters(rows, settings, seed, stop), data, settings.trees, valid_sets=judged, callbacks=callbacks
    )
    progress(1.0)
    return booster


class EarlyStop(msgspec.Struct, frozen=True):
    """Ends a training when average precision on `rows` has not risen for `patience` trees."""

    rows: ScreenerRows
    patience: int


def _parameters(rows: ScreenerRows, settings: ScreenerSettings, seed: int, stop: EarlyStop | None) -> dict[str, Any]:
    least = min(settings.rows_per_leaf_min, max(1, len(rows.fraud) // 100))
    chosen: dict[str, Any] = {
        "num_leaves": settings.leaves,
        "learning_rate": settings.learning_rate,
        "feature_fraction": settings.feature_share,
        "min_data_in_leaf": least,
        "lambda_l2": settings.l2,
        "metric": "average_precision" if stop is not None else "none",
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
    }
    if settings.monotone:
        chosen["monotone_constraints"] = [DIRECTIONS.get(settings.monotone.get(name, ""), 0) for name in rows.names]
    return chosen | parameters(settings.objective)


def _dataset(rows: ScreenerRows, settings: ScreenerSettings, reference: lightgbm.Dataset = None) -> lightgbm.Dataset:
    fraud, label = rows.fraud, rows.fraud.astype(np.float64)
    if settings.objective == "distilled" and rows.belief is not None and reference is None:
        # half of each: the labels keep what the deep model does not know
        label = np.where(np.isnan(rows.belief), label, (label + rows.belief) / 2.0)
    return lightgbm.Dataset(
        rows.features,
        label,
        weight=np.where(fraud == 1, settings.fraud_weight, 1.0) if settings.fraud_weight != 1.0 else None,
        group=queries(len(fraud)) if settings.objective == "lambdarank" else None,
        feature_name=list(rows.names),
        categorical_feature=list(rows.categorical) or "auto",
        reference=reference,
    )


def out_of_fold_scores(
    rows: ScreenerRows, settings: ScreenerSettings, seed: int, folds: int, progress: Progress
) -> Float64:
    """Raw scores float64 [rows]; each row is scored by a screener that was trained without the row's block.

    The deep model and the escalation rule learn from these scores. From scores of a screener that was trained on the
    same rows they would learn to trust it too much. `folds`: number of blocks of consecutive rows.
    """
    scores = np.empty(len(rows.fraud))
    block: Array = np.arange(len(scores)) * folds // len(scores)
    for fold in range(folds):
        left_out = block == fold

        def report(share: float, done: int = fold) -> None:
            progress((done + share) / folds)

        booster = train_screener(rows.take(~left_out), settings, seed, report)
        scores[left_out] = booster.predict(rows.features[left_out], raw_score=True)
    return scores
