"""Scores of the deep model on rows that it was not trained on."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float32, Float64, Int64
from cascade.progress import Progress
from cascade.protocols import DeepInputs
from stages.deep.model import Codes
from stages.deep.train import score_torch, train_deep
from stages.settings import DeepSettings

# A training takes minutes to half an hour; two more on half of the rows cost as much as one.
FOLDS = 2


def deep_scores_out_of_fold(
    inputs: DeepInputs,
    fraud: Int64,
    weight: Float32,
    codes: Codes,
    settings: DeepSettings,
    seed: int,
    progress: Progress,
) -> Float64:
    """Log-odds float64 [rows] of models that were trained without the row's half of the time.

    Arguments as `train_deep`'s; rows in order of time.
    """
    scores = np.empty(len(fraud))
    half = np.arange(len(fraud)) * FOLDS // len(fraud)
    for fold in range(FOLDS):
        left_out = half == fold

        def report(share: float, done: int = fold) -> None:
            progress((done + share) / FOLDS)

        model = train_deep(inputs.take(~left_out), fraud[~left_out], weight[~left_out], codes, settings, seed, report)
        scores[left_out] = score_torch(model, inputs.take(left_out))
    return scores
