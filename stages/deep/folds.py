"""Scores of the deep model on rows that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cascade.columns import Float64
from cascade.progress import Progress
from stages.deep.train import Examples, score_torch, train_deep
from stages.settings import DeepSettings

# A training takes minutes to half an hour; two more on half of the rows cost as much as one.
FOLDS = 2


def deep_scores_out_of_fold(
    examples: Examples, settings: DeepSettings, seed: int, progress: Progress, checkpoints: Path | None = None
) -> Float64:
    """Log-odds float64 [rows] of models that were trained without the row's half of the time.

    Arguments as `train_deep`'s.
    """
    scores = np.empty(len(examples))
    half = np.arange(len(examples)) * FOLDS // len(examples)
    for fold in range(FOLDS):

        def report(share: float, done: int = fold) -> None:
            progress((done + share) / FOLDS)

        model = train_deep(examples, np.flatnonzero(half != fold), settings, seed, report, checkpoints)
        left_out = np.flatnonzero(half == fold)
        # neighbours in time, so a slice: nothing is copied
        scores[left_out] = score_torch(model, examples.inputs.take(slice(left_out[0], left_out[-1] + 1)))
    return scores
