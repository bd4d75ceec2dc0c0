"""The policy's work on each row, compiled by numba; numpy's functions take several times as long for few rows.

The exponential function is numpy's, so that the probabilities of a micro-batch equal those of `Calibration.probability`
to the last bit.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Float64
from cascade.compilation import kernel
from cascade.policy import Policy


@kernel
def _exponents(raw: Float64, slope: float, intercept: float, exponents: Float64) -> None:
    for row in range(len(raw)):
        exponents[row] = -(slope * raw[row] + intercept)


@kernel
def _judge(raw: Float64, centre: float, powers: Float64, scores: Float64) -> None:
    for row in range(len(raw)):
        powers[row] = 1.0 / (1.0 + powers[row])
        scores[row] = -abs(raw[row] - centre)


def judge(policy: Policy, raw: Float64) -> tuple[Float64, Float64]:
    """The probabilities, and the escalation scores of the rule `uncertainty`, float64 [rows], of raw screener scores.

    They equal `policy.screener.probability(raw)` and `uncertainty(raw, policy.escalation.centre)`.
    """
    probability, scores = np.empty(len(raw)), np.empty(len(raw))
    _exponents(raw, policy.screener.slope, policy.screener.intercept, probability)
    np.exp(probability, probability)
    _judge(raw, policy.escalation.centre, probability, scores)
    return probability, scores


def warm_up_policy(policy: Policy) -> None:
    """Compiles the kernels ahead of the first micro-batch."""
    judge(policy, np.zeros(1))
