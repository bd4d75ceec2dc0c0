"""Labelled decisions of the cascade and of deep-only, side by side, and what is counted of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.bundle import Bundle
from cascade.columns import Array, Bool, Float64, Int64
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData
from cascade.schema import key_codes
from stages.offline import OfflineScores

# The first fraud of a card in a month stands for its campaign: the later ones are decided by what was learned of it.
PERIOD_DAYS: Final = 30


@dataclass(frozen=True, slots=True)
class LabelledDecisions:
    """A row for each transaction, in order of event time.

    - `fraud`, `escalated` bool [rows].
    - `time_ms` int64 [rows]: event times, ms since the epoch.
    - `card`, `terminal` int64 [rows]: numbers that identify them.
    - `cascade`, `deep` float64 [rows]: probabilities of fraud, by the cascade and by the deep model.
    - `by_cascade`, `by_deep` bool [rows]: reviewed or declined, by the cascade and by deep-only.
    """

    fraud: Bool
    time_ms: Int64
    card: Int64
    terminal: Int64
    cascade: Float64
    deep: Float64
    by_cascade: Bool
    by_deep: Bool
    escalated: Bool

    @property
    def day(self) -> Int64:
        """Days since the epoch, int64 [rows]."""
        return self.time_ms // DAY_MS

    @property
    def lost(self) -> Bool:
        """Frauds that deep-only catches and the cascade approves, bool [rows]."""
        return self.fraud & self.by_deep & ~self.by_cascade


def replayed(bundle: Bundle, data: LabelledData, scores: OfflineScores) -> LabelledDecisions:
    """The decisions that the bundle makes on recorded data without a service, so without a late answer."""
    policy = bundle.policy
    probability, escalated = scores.cascade(policy)
    return labelled(bundle, data.take(scores.rows), probability, policy.actions(probability) > 0, escalated, scores)


def labelled(
    bundle: Bundle, data: LabelledData, cascade: Float64, by_cascade: Bool, escalated: Bool, scores: OfflineScores
) -> LabelledDecisions:
    """Joins the cascade's decisions with the labels, and with what deep-only decides by the policy's thresholds.

    data: the decided rows. cascade float64 [rows], by_cascade, escalated bool [rows]: as in LabelledDecisions. scores:
    of the same rows.
    """
    roles, policy = bundle.schema.roles, bundle.policy
    deep = policy.deep.probability(scores.deep_raw)
    return LabelledDecisions(
        fraud=data.fraud == 1,
        time_ms=data.batch[roles.event_time],
        card=key_codes(data.batch[roles.card]),
        terminal=key_codes(data.batch[roles.terminal]),
        cascade=cascade,
        deep=deep,
        by_cascade=by_cascade,
        by_deep=policy.actions(deep) > 0,
        escalated=escalated,
    )


def mean_losses(lost: Array, unit: Int64) -> tuple[float, int]:
    """(sum of the units' losses, number of units). A unit's loss is the share of its rows that is lost, 0 to 1.

    lost: bool [rows]. unit: a number that identifies the unit, int64 [rows].
    """
    _, number = np.unique(unit, return_inverse=True)
    rows = np.bincount(number)
    return float((np.bincount(number, weights=lost.astype(np.float64)) / rows).sum()), len(rows)


def first_frauds(fraud: Bool, card: Int64, day: Int64) -> Int64:
    """Positions of each card's first fraud in a period of PERIOD_DAYS, int64; rows in order of event time."""
    rows = np.flatnonzero(fraud)
    _, first = np.unique(np.stack([card[rows], day[rows] // PERIOD_DAYS]), axis=1, return_index=True)
    return np.sort(rows[first])
