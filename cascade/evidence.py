"""Evidence over time that a share has fallen below a limit, from two counts: a test that may be read at any moment.

A gambler who believes that the share is lower bets on each outcome, at odds that are fair if the share is exactly at
the limit. As long as it is at least the limit, whatever else happens, no gambler becomes richer on average, and the
probability that the wealth ever reaches 1 / level is at most `level` (Ville's inequality). So the watch may look after
each label, for ever. The wealth here is the mean over gamblers who each stake a fixed share of their wealth. It depends
on the two counts alone, so that counts of several workers can be added up.

Sources: Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting", arXiv 2010.09686, section 4;
Podkopaev, Ramdas, "Tracking the risk of a deployed model and detecting harmful distribution shifts", arXiv 2110.06177.
"""

from __future__ import annotations

import math
from typing import Final

# Shares of the wealth that are lost at an outcome that speaks for the limit. Small stakes find a small fall after
# many labels, large ones a large fall after few.
STAKES: Final = (0.75, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625)


def evidence_nats(caught: int, missed: int, at_least: float) -> float:
    """The logarithm of the wealth after `caught` outcomes for and `missed` against "the share is at least `at_least`".

    `at_least`: in [0, 1). Without outcomes it is 0. Evidence of separate outcomes, of several workers say, adds up.

    >>> evidence_nats(caught=60, missed=40, at_least=0.6) < 0.0
    True
    >>> evidence_nats(caught=40, missed=60, at_least=0.6) > alarm_nats(level=0.01)
    True
    """
    logs = []
    for stake in STAKES:
        # fair at the limit: at_least · (1 − stake) + (1 − at_least) · (1 + gain) = 1
        gain = stake * at_least / (1.0 - at_least)
        logs.append(caught * math.log1p(-stake) + missed * math.log1p(gain))
    highest = max(logs)
    return highest + math.log(sum(math.exp(log - highest) for log in logs) / len(logs))


def alarm_nats(level: float) -> float:
    """The evidence that is reached with at most the probability `level`, as long as the share is at least the limit."""
    return -math.log(level)
