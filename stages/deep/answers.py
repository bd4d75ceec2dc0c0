"""Checks of a deep model's answer, and the inputs of a probe, for both deep stages."""

from __future__ import annotations

import math

import numpy as np

from cascade.columns import Array, Float64
from cascade.errors import DeepStageError
from cascade.protocols import DeepInputs
from stages.deep.signature import DeepSignature


def checked_scores(output: Array | None, rows: int) -> Float64:
    """Convert the model's output float32 [rows, 1] to raw scores float64 [rows].

    Raises DeepStageError if the output is absent, has another shape, or is not finite: a model server that reports
    that it is ready may still answer nonsense.
    """
    if output is None or output.shape != (rows, 1):
        shape = None if output is None else list(output.shape)
        raise DeepStageError("error", f"the deep model answered with shape {shape} for {rows} rows")
    scores: Float64 = output[:, 0].astype(np.float64)
    # float32 numbers do not overflow in a sum of float64: it is finite if each of them is
    if not math.isfinite(sum(scores.tolist())):
        raise DeepStageError("error", "the deep model answered with a score that is not finite")
    return scores


def probe_inputs(signature: DeepSignature) -> DeepInputs:
    """One row of zeros, which every model with this signature can score."""
    sequences = {name: np.zeros((1, *shape), np.float32) for name, shape in signature.sequences.items()}
    return DeepInputs(sequences, np.zeros((1, signature.features), np.float32))
