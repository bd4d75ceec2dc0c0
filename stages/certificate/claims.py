"""The four claims of a certificate, and their bounds, from labelled decisions.

The claims are joined to one sentence. It is shown only if each claim is shown at the full level, and it is wrong only
if one of them is: so the sentence is wrong with at most the level of one claim, and no level is divided among them
(intersection-union test; Berger, "Multiparameter hypothesis testing and acceptance sampling", 1982).
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from cascade.certificate import Bound, Claim, Power, Recall, Sense
from cascade.columns import Float64
from stages.certificate.decisions import PERIOD_DAYS, LabelledDecisions, first_frauds, mean_losses
from stages.certificate.exact import (
    PValue,
    binomial_p_value,
    chance,
    hoeffding_bentkus_p_value,
    largest_claim,
    units_min,
    units_needed,
    upper_bound,
)
from stages.resampling import BLOCK_DAYS, Ranking, quantile_t, standard_errors

POWER: Final = 0.8
_BINOMIAL: Final = "Clopper-Pearson"
_BENTKUS: Final = "Hoeffding-Bentkus (Learn then Test)"
_BOOTSTRAP: Final = f"bootstrap over cards and blocks of {BLOCK_DAYS} days"
# unit, method, p-value, and the sum of losses and number of units
_Losses = tuple[str, str, PValue, float, int]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the cascade, fixed before the data is seen.

    - `confidence`: of each bound, and of the sentence that joins them.
    - `keep_frauds`: least share of the frauds that deep-only catches.
    - `keep_precision`: least average precision, as a share of deep-only's.
    - `escalated`: largest escalation rate.
    - `false_alarms`: most false alarms, as a multiple of deep-only's.
    - `alarm_level`: probability of a false alarm of the watch.
    - `replicates`, `seed`: of the bootstrap.
    """

    confidence: float = 0.95
    keep_frauds: float = 0.99
    keep_precision: float = 0.99
    escalated: float = 0.01
    false_alarms: float = 1.05
    alarm_level: float = 0.01
    replicates: int = 300
    seed: int = 1

    @property
    def level(self) -> float:
        """The probability with which a bound may fail."""
        return 1.0 - self.confidence

    @property
    def frauds_min(self) -> int:
        """Frauds caught by deep-only without which nothing can be shown of them."""
        return units_min(1.0 - self.keep_frauds, self.level)


def make_claims(decisions: LabelledDecisions, asked: Asked) -> tuple[Claim, ...]:
    """The claims in the order of the sentence: frauds, average precision, escalated share, false alarms.

    There must be a fraud that deep-only catches, and more than one card and day.
    """
    observed, margins = _resampled(decisions, asked)
    units = len(np.unique(decisions.card))
    precision, escalated, alarms = (
        Bound(unit="cards and days", units=units, method=_BOOTSTRAP, exact=False, value=float(value), p_value=None)
        for value in observed + margins
    )
    rows = len(decisions.fraud)
    each = _upper(("each transaction", _BINOMIAL, binomial_p_value, float(decisions.escalated.sum()), rows),
                  asked.escalated, asked.level)  # fmt: skip
    return (
        _frauds_kept(decisions, asked),
        _claim("average precision", "the cascade's average precision is at least {} of deep-only's", "at least",
               asked.keep_precision, float(observed[0]), (precision,)),
        _claim("escalated", "at most {} of the transactions are escalated", "at most",
               asked.escalated, float(observed[1]), (each, escalated)),
        _claim("false alarms", "the cascade's false alarms are at most {} of deep-only's", "at most",
               asked.false_alarms, float(observed[2]), (alarms,)),
    )  # fmt: skip


def make_power(decisions: LabelledDecisions, asked: Asked) -> Power:
    """What this number of frauds allows, for the claim of frauds kept."""
    limit, level = 1.0 - asked.keep_frauds, asked.level
    frauds = int((decisions.fraud & decisions.by_deep).sum())
    needed: dict[str, int | None] = {}
    chances: dict[str, float] = {}
    for unit, _, p_value, losses, units in _losses(decisions):
        found = units_needed(p_value, losses / units, limit, level, POWER)
        needed[unit] = None if found is None else round(found * frauds / units)
        chances[unit] = chance(p_value, limit / 2.0, units, limit, level)
    return Power(power=POWER, frauds_min=asked.frauds_min, needed=needed, chance=chances)


def make_recall(decisions: LabelledDecisions, asked: Asked) -> Recall:
    """The figure that the service compares with later labels."""
    rows = first_frauds(decisions.fraud, decisions.card, decisions.day)
    missed = int((~decisions.by_cascade[rows]).sum())
    return Recall(
        period_days=PERIOD_DAYS,
        first_frauds=len(rows),
        caught=len(rows) - missed,
        at_least=1.0 - upper_bound(binomial_p_value, missed, len(rows), asked.level),
        alarm_level=asked.alarm_level,
    )


def _frauds_kept(decisions: LabelledDecisions, asked: Asked) -> Claim:
    """The claim on frauds: the loss of a fraud that deep-only catches is 1 if the cascade does not catch it."""
    counted = _losses(decisions)
    bounds = []
    for unit, method, p_value, losses, units in counted:
        upper = _upper((unit, method, p_value, losses, units), 1.0 - asked.keep_frauds, asked.level)
        bounds.append(msgspec.structs.replace(upper, value=1.0 - upper.value))

    def worst_p_value(kept: float) -> float:
        return max(p_value(losses, units, 1.0 - kept) for _, _, p_value, losses, units in counted)

    _, _, _, lost, frauds = counted[0]
    claim = _claim("frauds", "of the frauds that deep-only catches, the cascade catches at least {}", "at least",
                   asked.keep_frauds, 1.0 - lost / frauds, tuple(bounds))  # fmt: skip
    return msgspec.structs.replace(claim, largest=largest_claim(worst_p_value, asked.level))


def _losses(decisions: LabelledDecisions) -> tuple[_Losses, ...]:
    """The losses of frauds, cards and terminals: each is another belief about what is independent."""
    caught = np.flatnonzero(decisions.fraud & decisions.by_deep)
    lost = decisions.lost[caught]
    return (
        ("each fraud", _BINOMIAL, binomial_p_value, float(lost.sum()), len(caught)),
        ("each card", _BENTKUS, hoeffding_bentkus_p_value, *mean_losses(lost, decisions.card[caught])),
        ("each terminal", _BENTKUS, hoeffding_bentkus_p_value, *mean_losses(lost, decisions.terminal[caught])),
    )


def _upper(counted: _Losses, limit: float, level: float) -> Bound:
    unit, method, p_value, losses, units = counted
    return Bound(
        unit=unit, units=units, method=method, exact=True, value=upper_bound(p_value, losses, units, level),
        p_value=p_value(losses, units, limit),
    )  # fmt: skip


def _claim(name: str, statement: str, sense: Sense, asked: float, observed: float, bounds: tuple[Bound, ...]) -> Claim:
    values = [bound.value for bound in bounds]
    shown = min(values) if sense == "at least" else max(values)
    return Claim(
        name=name,
        statement=statement.format(f"{asked:.4g}" if asked > 1.0 else f"{100 * asked:.4g} %"),
        sense=sense,
        asked=asked,
        observed=observed,
        bounds=bounds,
        shown=shown,
        holds=shown >= asked if sense == "at least" else shown <= asked,
        approximate=not all(bound.exact for bound in bounds),
    )


def _resampled(decisions: LabelledDecisions, asked: Asked) -> tuple[Float64, Float64]:
    """(observed figures, distances of their bounds), float64 [3]: average precision kept, escalated, false alarms."""
    fraud = decisions.fraud
    cascade, deep = Ranking.of(decisions.cascade, fraud), Ranking.of(decisions.deep, fraud)
    escalated = decisions.escalated.astype(np.float64)
    alarms = (~fraud & decisions.by_cascade).astype(np.float64)
    alarms_deep = (~fraud & decisions.by_deep).astype(np.float64)

    def figures(weight: Float64) -> Float64:
        kept = cascade.average_precision(weight) / max(deep.average_precision(weight), 1e-9)
        # one false alarm where deep-only has none, so that the ratio is a number
        return np.array(
            [kept, weight @ escalated / weight.sum(), weight @ alarms / max(float(weight @ alarms_deep), 1.0)]
        )

    errors, freedom = standard_errors(figures, decisions.day, decisions.card, asked.replicates, asked.seed)
    margins = quantile_t(asked.confidence, freedom) * errors
    return figures(np.ones(len(fraud))), np.array([-1.0, 1.0, 1.0]) * margins
