"""Trains the screener: a small LightGBM model that scores a row in about a microsecond."""

from __future__ import annotations

import lightgbm
import msgspec
import numpy as np

from cascade.columns import Array, Float32, Float64, Int64
from cascade.progress import Progress


class ScreenerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and regularisation of the screener. It is small and shallow, since it must only rank the transactions."""

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
    """Fit a model to features float32 [rows, width] and fraud int64 [rows]. `names`: those of the features."""
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
    """Log-odds float64 [rows]; each row is scored by a screener that was trained without the row's block.

    The deep model learns from these scores. From scores of a screener that was trained on the same rows it would learn
    to trust the screener too much.

    - `features` float32 [rows, width], `fraud` int64 [rows]: in order of time.
    - `names`: those of the features.
    - `folds`: number of blocks of consecutive rows.
    """
    scores = np.empty(len(fraud))
    block: Array = np.arange(len(fraud)) * folds // len(fraud)
    for fold in range(folds):
        left_out = block == fold

        def report(share: float, done: int = fold) -> None:
            progress((done + share) / folds)

        booster = train_screener(features[~left_out], fraud[~left_out], names, settings, seed, report)
        scores[left_out] = booster.predict(features[left_out], raw_score=True)
    return scores
