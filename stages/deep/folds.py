"""Scores of the deep model on rows that it was not trained on, from which the escalation rule is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cascade.columns import Float64, Int64
from cascade.progress import Progress
from stages.deep.train import Examples, score_torch, train_deep
from stages.settings import DeepSettings


def later_half(examples: Examples) -> slice:
    """The rows that `deep_scores_of_later_half` scores."""
    return slice(len(examples) // 2, None)


def deep_scores_of_later_half(
    examples: Examples, settings: DeepSettings, seed: int, progress: Progress, checkpoints: Path | None = None
) -> Float64:
    """Log-odds float64 [rows of `later_half`] of a model that was trained on the earlier half, as in service.

    A second model for the earlier half would cost a third of the whole training. Arguments as `train_deep`'s.
    """
    rest = later_half(examples)
    earlier: Int64 = np.arange(rest.start)
    model = train_deep(examples, earlier, settings, seed, progress, checkpoints)
    return score_torch(model, examples.inputs.take(rest))
