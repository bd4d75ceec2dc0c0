"""How much of deep-only's quality the demo's cascade keeps, with intervals."""

from __future__ import annotations

import msgspec
import numpy as np
import polars as pl

from cascade.bundle import Bundle
from cascade.columns import Bool, Float64, Int64
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData
from cascade.policy import Policy
from cascade.schema import key_codes
from stages.intervals import Figure, with_intervals
from stages.resampling import Ranking
from streaming.evaluation import Judged
from streaming.pipeline.decisions import plain_ids

_SEED = 1


class Kept(msgspec.Struct, frozen=True):
    """Shares of deep-only's figures, with 95 % intervals by a bootstrap over days and cards: approximate.

    - `precision`: the cascade's average precision ÷ deep-only's. `caught`: frauds caught ÷ frauds that deep-only
      catches, each by the policy's thresholds.
    """

    precision: Figure
    caught: Figure


def kept(judged: Judged, data: LabelledData, bundle: Bundle) -> Kept | None:
    """Compares the judged decisions with deep-only's; None where deep-only catches no fraud.

    data: the file whose transactions were decided.
    """
    roles = bundle.schema.roles
    ids = pl.DataFrame({"transaction_id": plain_ids(data.batch[roles.transaction_id])}).with_row_index("row")
    rows = ids.join(judged.scores, on="transaction_id", how="inner").sort("row")
    own = data.take(rows["row"].to_numpy().astype(np.int64))
    return kept_of(
        rows["score"].to_numpy(),
        rows["deep_only"].to_numpy(),
        rows["deep_weight"].to_numpy(),
        own.fraud == 1,
        own.batch[roles.event_time] // DAY_MS,
        key_codes(own.batch[roles.card]),
        bundle.policy,
    )


def kept_of(
    cascade: Float64, deep: Float64, deep_weight: Float64, fraud: Bool, day: Int64, card: Int64, policy: Policy
) -> Kept | None:
    """The same from probabilities of fraud, `cascade` and `deep` float64 [rows].

    deep_weight: float64 [rows], how many rows each stands for in deep-only's figures; all frauds stand for themselves.
    fraud: bool [rows]. day, card: int64 [rows], days since the epoch and a number for each card.
    """
    rankings = [Ranking.of(probability, fraud) for probability in (cascade, deep)]
    caught = [fraud & (policy.actions(probability) > 0) for probability in (cascade, deep)]
    if not caught[1].any():
        return None

    def shares(weight: Float64) -> Float64:
        weights = (weight, weight * deep_weight)
        precision = [ranking.average_precision(own) for ranking, own in zip(rankings, weights, strict=True)]
        frauds = [float(weight[found].sum()) for found in caught]
        # a resample without any of deep-only's frauds has no share; it is one in which nothing was lost
        return np.array([own / base if base > 0.0 else 1.0 for own, base in (precision, frauds)])

    return Kept(*with_intervals(shares, day, card, _SEED))
