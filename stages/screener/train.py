"""Training of the screener: a small LightGBM model that ranks, for a microsecond a row."""

from __future__ import annotations

from collections.abc import Callable

import lightgbm
import msgspec
import numpy as np

from cascade.columns import Array, Float32, Float64, Int64

Progress = Callable[[float], None]


class ScreenerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and regularisation of the screener; small and shallow on purpose: it only ranks."""

    trees: int = 64
    leaves: int = 16
    depth: int = 5
    learning_rate: float = 0.15
    feature_share: float = 0.7
    rows_per_leaf_min: int = 200
    l2: float = 10.0


def train_screener(
    features: Float32, fraud: Int64, names: tuple[str, ...], settings: ScreenerSettings, seed: int, progress: Progress
) -> lightgbm.Booster:
    """Fit on features float32 [rows, width] and fraud int64 [rows]; `progress` gets the share done, 0 to 1."""
    parameters = {
        "objective": "binary",
        "num_leaves": settings.leaves,
        "max_depth": settings.depth,
        "learning_rate": settings.learning_rate,
        "feature_fraction": settings.feature_share,
        "min_data_in_leaf": min(settings.rows_per_leaf_min, max(1, len(fraud) // 100)),
        "lambda_l2": settings.l2,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
    }

    def report(state: lightgbm.callback.CallbackEnv) -> None:
        progress((state.iteration + 1) / settings.trees)

    data = lightgbm.Dataset(features, fraud, feature_name=list(names))
    return lightgbm.train(parameters, data, settings.trees, callbacks=[report])


def out_of_fold_scores(
    features: Float32,
    fraud: Int64,
    names: tuple[str, ...],
    settings: ScreenerSettings,
    seed: int,
    folds: int,
    progress: Progress,
) -> Float64:
    """Log-odds float64 [rows] of each row by a screener that was not trained on its part of the rows.

    The rows are in order of time and are cut into `folds` blocks. The deep model reads the screener's score; fed with
    scores of rows that the screener was trained on, it would learn to trust it more than it may.
    """
    scores = np.empty(len(fraud))
    block: Array = np.arange(len(fraud)) * folds // len(fraud)
    for fold in range(folds):
        held_out = block == fold

        def report(share: float, done: int = fold) -> None:
            progress((done + share) / folds)

        booster = train_screener(features[~held_out], fraud[~held_out], names, settings, seed, report)
        scores[held_out] = booster.predict(features[held_out], raw_score=True)
    return scores
