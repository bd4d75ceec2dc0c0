"""Exact tests and bounds for a loss between 0 and 1, and the number of units that they need.

A claim "the mean loss is at most `limit`" is shown if the hypothesis that it is higher is rejected. The p-values here
are valid for any number of units, if the units are independent and have the same distribution. Inverting a p-value over
all limits, from the weakest claim to the strongest, is fixed sequence testing: the limits are ordered, the p-value
falls as the limit rises, and the first claim that is not shown ends the sequence. So no level is divided.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test", arXiv 2110.01052.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

# p-value of "the mean loss is above limit" by (total loss, units, limit)
PValue = Callable[[float, int, float], float]
_BISECTIONS: Final = 40
# Claims for the fixed sequence, as shares kept: from the weakest on.
CLAIMS: Final = (
    *(half / 100 for half in range(50, 90, 5)),
    *(hundredth / 100 for hundredth in range(90, 99)),
    *(thousandth / 1_000 for thousandth in range(990, 1_000)),
)
UNITS_MAX: Final = 1 << 24


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(at most `successes` of `trials`), each with `probability`."""
    if successes >= trials or probability <= 0.0:
        return 1.0
    if successes < 0 or probability >= 1.0:
        return 0.0
    # the ratio of neighbouring terms, added up in logarithms: exact enough for millions of trials
    counts = np.arange(1, successes + 1)
    steps = np.log((trials - counts + 1) / counts) + math.log(probability) - math.log1p(-probability)
    terms = trials * math.log1p(-probability) + np.concatenate([[0.0], np.cumsum(steps)])
    highest = float(terms.max())
    return min(1.0, math.exp(highest) * float(np.exp(terms - highest).sum()))


def binomial_p_value(losses: float, units: int, limit: float) -> float:
    """The p-value for losses that are 0 or 1: P(Binomial(units, limit) ≤ losses). Its inverse is Clopper and Pearson's.

    >>> round(binomial_p_value(0, 299, 0.01), 4)
    0.0495
    """
    return binomial_cdf(math.floor(losses), units, limit)


def hoeffding_bentkus_p_value(losses: float, units: int, limit: float) -> float:
    """The p-value for losses within [0, 1] (`losses`: their sum). Source: Learn then Test, proposition 1."""
    if losses >= units * limit:
        return 1.0
    hoeffding = math.exp(-units * _divergence(losses / units, limit))
    bentkus = math.e * binomial_cdf(math.ceil(losses), units, limit)
    return min(1.0, hoeffding, bentkus)


def upper_bound(p_value: PValue, losses: float, units: int, level: float) -> float:
    """The smallest limit that is shown: with confidence 1 − level the mean loss is at most this."""
    low, high = losses / units, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if p_value(losses, units, middle) <= level:
            high = middle
        else:
            low = middle
    return high


def largest_claim(p_values: Callable[[float], float], level: float, claims: Sequence[float] = CLAIMS) -> float | None:
    """The last claim before the first that is not shown; None if that is the first. `p_values`: by share kept."""
    largest = None
    for claim in claims:
        if p_values(claim) > level:
            break
        largest = claim
    return largest


def units_min(limit: float, level: float) -> int:
    """The number of units with which a loss of zero is just enough for the claim."""
    return math.ceil(math.log(level) / math.log1p(-limit))


def chance(p_value: PValue, loss: float, units: int, limit: float, level: float) -> float:
    """The probability that the claim is shown with this many units, if each is lost with probability `loss`."""
    return binomial_cdf(_allowed(p_value, units, limit, level), units, loss)


def units_needed(p_value: PValue, loss: float, limit: float, level: float, power: float) -> int | None:
    """The number of units, within one per cent, for which `chance` reaches `power`.

    None if the loss reaches the limit, or if more than UNITS_MAX units are needed.
    """
    if loss >= limit:
        return None
    low, high = 0, units_min(limit, level)
    while chance(p_value, loss, high, limit, level) < power:
        low, high = high, 2 * high
        if high > UNITS_MAX:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        if chance(p_value, loss, middle, limit, level) < power:
            low = middle
        else:
            high = middle
    return high


def _allowed(p_value: PValue, units: int, limit: float, level: float) -> int:
    """The most losses with which the claim is still shown; −1 if even none is too many."""
    low, high = -1, math.floor(units * limit)
    while low < high:
        middle = (low + high + 1) // 2
        if p_value(middle, units, limit) <= level:
            low = middle
        else:
            high = middle - 1
    return low


def _divergence(mean: float, limit: float) -> float:
    """Kullback-Leibler divergence of Bernoulli(mean) from Bernoulli(limit), nats."""
    lower = mean * math.log(mean / limit) if mean > 0.0 else 0.0
    upper = (1.0 - mean) * math.log((1.0 - mean) / (1.0 - limit)) if limit < 1.0 else math.inf
    return lower + upper
