"""The ceiling: an oracle that knows the hidden states and all parameters, but not the outcome of a single transaction.

Genuine purchases of a card and the rows of each campaign are processes on the space of card, time, terminal, device
and amount. Their intensities add up, so by Bayes' rule a transaction is a fraud with probability

    sum of the intensities of the frauds that are possible there ÷ sum of all intensities there.

The oracle knows habits, homes, journeys, devices and subscriptions of the cards, and of each campaign card or
terminal, first and last moment, pools of terminals, device, number of rows and distribution of the amounts. It takes
times as uniform within a campaign, and does not use the order of rows. A label is reported by the parameters of
`labels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.simulator.background import genuine_intensity, normal
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import position_in_group
from cascade.simulator.labels import UNREPORTED_SHARE, false_report_share
from cascade.simulator.rows import Campaigns, Rows
from cascade.simulator.settings import DAY_MS, Kind
from cascade.simulator.simulation import Simulation, is_fraud
from cascade.simulator.world import World

# Purchases a day and unit of log amount.
_INTENSITY_MIN: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the oracle reaches on the reported labels.

    - `average_precision`: of the oracle's probabilities. `average_precision_truth`: the same on the true frauds.
    - `frauds`: reported ones. `unlikely_share`: share of them to which the oracle gives at most ½;
      `indistinguishable_share`: at most 0.1, false reports included.
    """

    average_precision: float
    average_precision_truth: float
    frauds: int
    unlikely_share: float
    indistinguishable_share: float


def fraud_probability(simulation: Simulation) -> Float64:
    """The oracle's probability that each transaction is a fraud, float64 [rows], by the rule above."""
    world, rows, campaigns = simulation.world, simulation.rows, simulation.campaigns
    frauds, others = np.zeros(len(rows.card)), np.zeros(len(rows.card))
    converted = np.zeros(len(rows.card))
    fraud = is_fraud(campaigns.kind)
    for keyed in (campaigns.card >= 0, campaigns.card < 0):
        row, campaign = _pairs(world, rows, campaigns, np.flatnonzero(keyed))
        intensity = _campaign_intensity(world, rows.take(row), campaigns.take(campaign))
        of_fraud = fraud[campaign]
        np.add.at(frauds, row[of_fraud], intensity[of_fraud])
        np.add.at(others, row[~of_fraud], intensity[~of_fraud])
        np.maximum.at(converted, row, campaigns.share[campaign])
    probability = np.zeros(len(rows.card))
    possible = np.flatnonzero((frauds > 0) | (converted > 0))
    possible = possible[rows.kind[possible] != Kind.SUBSCRIPTION]
    # a purchase that is moved into opening hours may leave the journey or the device by which it was drawn
    genuine = np.maximum(genuine_intensity(world, rows.take(possible)), _INTENSITY_MIN)
    found = frauds[possible] + converted[possible] * genuine
    probability[possible] = found / (frauds[possible] + others[possible] + genuine)
    return probability


def label_probability(simulation: Simulation) -> Float64:
    """The oracle's probability that each transaction is reported as a fraud, float64 [rows]."""
    fraud = fraud_probability(simulation)
    of_genuine = (1.0 - fraud) * false_report_share(simulation.world.settings)
    return np.asarray(fraud * (1.0 - UNREPORTED_SHARE) + of_genuine, np.float64)


def ceiling(simulation: Simulation) -> Ceiling | None:
    """The oracle's quality; None if no fraud was reported."""
    label = simulation.report_delay_ms >= 0
    truth = is_fraud(simulation.rows.kind)
    if not (label.any() and truth.any()):
        return None
    probability = label_probability(simulation)
    return Ceiling(
        average_precision=average_precision(label, probability),
        average_precision_truth=average_precision(truth, probability),
        frauds=int(label.sum()),
        unlikely_share=float((probability[label] <= 0.5).mean()),
        indistinguishable_share=float((probability[label] <= 0.1).mean()),
    )


def average_precision(label: Bool, score: Float64) -> float:
    """Σ (recall step × precision) over the distinct scores, highest first: the definition of scikit-learn."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(label[order])
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    recall = hits[ends] / hits[-1]
    return float(np.sum(np.diff(np.append(0.0, recall)) * hits[ends] / (ends + 1)))


def _pairs(world: World, rows: Rows, campaigns: Campaigns, which: Int64) -> tuple[Int64, Int64]:
    """Positions of rows and of the campaigns (of `which`) that may have made them: key and time fit."""
    span = world.settings.span_ms
    by_card = bool(len(which)) and campaigns.card[which[0]] >= 0
    key = rows.card if by_card else rows.terminal
    wanted = (campaigns.card if by_card else campaigns.terminal)[which]
    code = key * span + rows.time_ms
    order = np.argsort(code, kind="stable")
    start, end = np.maximum(campaigns.start_ms[which], 0), np.minimum(campaigns.end_ms[which], span)
    low = np.searchsorted(code[order], wanted * span + start)
    high = np.searchsorted(code[order], wanted * span + np.maximum(end, start))
    sizes = high - low
    return order[np.repeat(low, sizes) + position_in_group(sizes)], np.repeat(which, sizes)


def _campaign_intensity(world: World, rows: Rows, campaigns: Campaigns) -> Float64:
    """Intensity of each campaign at its row: rows a day x probability of terminal, device and log amount, [pairs]."""
    days = np.maximum(campaigns.end_ms - campaigns.start_ms, 1) / DAY_MS
    cards = np.where(campaigns.card >= 0, 1.0, 1.0 / world.settings.cards)
    log_amount = np.log(rows.amount)
    first = normal(log_amount, campaigns.log_amount, campaigns.log_spread)
    other = normal(log_amount, campaigns.log_amount_other, campaigns.log_spread_other)
    amount = (1.0 - campaigns.other_share) * first + campaigns.other_share * other
    intensity: Float64 = campaigns.rows / days * cards * amount
    return intensity * _terminal(world, rows, campaigns) * _device(world, rows, campaigns)


def _terminal(world: World, rows: Rows, campaigns: Campaigns) -> Float64:
    first = world.terminals.probability(np.maximum(campaigns.pool, 0), rows.terminal)
    other = world.terminals.probability(np.maximum(campaigns.pool_other, 0), rows.terminal)
    return np.where(campaigns.pool >= 0, (first + other) / 2.0, 1.0)


def _device(world: World, rows: Rows, campaigns: Campaigns) -> Float64:
    expected = np.where(world.is_online(rows.terminal), campaigns.device, NO_DEVICE)
    return np.asarray(rows.device == expected, np.float64)
