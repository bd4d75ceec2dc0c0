"""What deep-only would have cost for the same stream: every transaction through the deep model, nothing screened.

Whole service against whole service. From what the meters say of the cascade is taken off what deep-only does not need;
what is left it shares. Put on is each transaction's part of a deep call, at the cost that was measured on the same
machine with the same model (DeepCost):

    own deep  = (model server's joules − its idle power · time) + calls · client's joules a call
    shared    = cascade − screener − own deep
    deep-only = shared + transactions · joules a call of b ÷ b

So idle power, fetching, decoding, features, producing and whatever else the service does stand on both sides, and the
cascade's own deep calls stay at what its meters say, whatever a call costs alone.

How full deep-only's calls are decides most of it. `filled`, the kinder: b is the largest measured call that the
stream's mean rate fills so early that its first transaction still meets the escalated path's limit, (b − 1) ÷ rate +
wall time of the call ≤ limit; the largest measured where no limit is stated. `as_called`: b is the mean of the
cascade's own calls. Kind to deep-only as well: gathering the model's inputs for all transactions costs nothing, and the
screener is taken off although a model may read its score.

The break-even escalation rate is where both cost the same, at what an escalated transaction has cost here:

    (joules a call of b ÷ b − screener ÷ transactions) ÷ (own deep ÷ asked)

Intervals: the ends of the measured intervals, each at its worse side; wider than any way that assumes that the errors
are independent. What the ledger itself counted is taken as exact: it stands on both sides with the same error. Joules
of the two kinds are compared apart, and those of a meter of the whole machine (RAPL) not at all, since they cannot be
divided.
"""

from __future__ import annotations

from collections.abc import Iterable

from cascade.ledger.comparable import MEASURE_AGAIN, UNDIVIDED, check_service, compared_figures
from cascade.ledger.deep_cost import DeepCost, Estimate
from cascade.ledger.energy import IDLE_METER, WORKER_METER
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.summary import Counterfactual, DeepOnly, EnergyComparison, EnergyFigure, LedgerSummary
from cascade.protocols import EnergyKind

# Measured joules a call by weight: (meter, place in the table of calls) to calls.
_Weights = dict[tuple[str, int], float]


def deep_only(summary: LedgerSummary, cost: DeepCost) -> Counterfactual:
    """Deep-only beside the cascade that `summary` tells of, at the measured `cost` of a deep call.

    Raises CounterfactualError, one line, where the cost was not measured for this: other kinds of energy, other
    meters, another machine, bundle, backend or wattage, a size of calls that was not tried, or nothing to compare.
    """
    transactions = summary.transactions - summary.paths["duplicate"].decisions
    if transactions <= 0 or summary.elapsed_s <= 0:
        raise CounterfactualError("deep-only: no transaction went through the models; give a ledger with decisions")
    check_service(summary, cost)
    figures = compared_figures(summary, cost)
    limit_ms = _limit_ms(summary)
    return Counterfactual(
        transactions=transactions,
        asked=_asked(summary),
        per_second=summary.per_second,
        limit_ms=limit_ms,
        comparisons=tuple(
            _comparison(kind, [one for one in figures if one.kind == kind], summary, cost, transactions, limit_ms)
            for kind in dict.fromkeys(one.kind for one in figures if one.kind is not None)
        ),
        undivided=tuple(one.meter for one in summary.energy if one.meter in UNDIVIDED),
        measured_at=cost.measured_at,
        server=cost.server,
        rounds=cost.rounds,
        method=cost.method,
    )


def _asked(summary: LedgerSummary) -> int:
    return summary.paths["escalated"].decisions + summary.paths["degraded"].decisions


def _limit_ms(summary: LedgerSummary) -> float | None:
    """The tightest limit on the latency of escalated transactions."""
    limits = [one.limit for one in summary.objectives if one.unit == "ms" and one.name.endswith(" of escalated")]
    return min(limits, default=None)


def _comparison(
    kind: EnergyKind, figures: list[EnergyFigure], summary: LedgerSummary, cost: DeepCost, transactions: int,
    limit_ms: float | None,
) -> EnergyComparison:  # fmt: skip
    """One kind's meters: each either the worker's, the reserved cores' idle, or the model server's (CPU or GPU)."""
    metered_j = {one.meter: one.energy_j or 0.0 for one in figures}
    cascade_j = sum(metered_j.values())
    screener_j = summary.stages["screener"].cpu_s * cost.watts_per_core if WORKER_METER in metered_j else 0.0
    serving = [meter for meter in metered_j if meter not in (WORKER_METER, IDLE_METER)]
    calling = [meter for meter in metered_j if meter != IDLE_METER]
    serving_j = sum(metered_j[meter] for meter in serving)
    idle_j = [_idle_j(meter, metered_j[meter], summary.elapsed_s, cost) for meter in serving]
    rows, calls = summary.deep.rows_per_call, summary.deep.calls
    client = _call_weights(cost, rows, calls, [one for one in calling if one == WORKER_METER])
    own = _sum(cost, client, serving_j, [_negative(one) for one in idle_j])
    # what both need, but for the client's part of the cascade's own calls
    base_j, less_client = cascade_j - screener_j - serving_j, _scaled(client, -1.0)

    def at(rows: float) -> DeepOnly:
        weights = _call_weights(cost, rows, transactions / rows, calling)
        energy = _sum(cost, _added(weights, less_client), base_j, idle_j)
        return _deep_only(rows, energy, _sum(cost, weights), cascade_j, screener_j, own, _asked(summary), transactions)

    return EnergyComparison(
        kind=kind,
        meters=tuple(metered_j),
        cascade_j=cascade_j,
        screener_j=screener_j,
        own_deep_j=own,
        own_deep_priced_j=None if rows is None else _sum(cost, _call_weights(cost, rows, calls, calling)),
        shared_j=_sum(cost, less_client, base_j, idle_j),
        filled=at(filled_rows(cost, summary.per_second, limit_ms)),
        as_called=None if rows is None else at(rows),
    )


def _deep_only(
    rows: float, energy: Estimate, calls: Estimate, cascade_j: float, screener_j: float, own: Estimate, asked: int,
    transactions: int,
) -> DeepOnly:  # fmt: skip
    """All figures of deep-only; `calls`: joules of all its calls alone."""
    if calls.low <= 0 or energy.low <= 0 or cascade_j <= 0:
        raise CounterfactualError(
            "deep-only: by the meters a deep call is not surely above idle; measure on the device that runs the model, "
            "in longer or more rounds"
        )
    return DeepOnly(
        rows_per_call=rows,
        energy_j=energy,
        ratio=Estimate(value=energy.value / cascade_j, low=energy.low / cascade_j, high=energy.high / cascade_j),
        saving_j=Estimate(value=energy.value - cascade_j, low=energy.low - cascade_j, high=energy.high - cascade_j),
        saving_share=Estimate(
            value=1 - cascade_j / energy.value, low=1 - cascade_j / energy.low, high=1 - cascade_j / energy.high
        ),
        break_even_share=_break_even(calls, screener_j, own, asked / transactions),
    )


def _break_even(calls: Estimate, screener_j: float, own: Estimate, asked_share: float) -> Estimate | None:
    """The share at which what is escalated, at its cost here, costs what deep-only's calls do without the screener."""
    if own.low <= 0 or not asked_share:
        return None
    corners = [
        (end - screener_j) / own_j * asked_share for end in (calls.low, calls.high) for own_j in (own.low, own.high)
    ]
    value = (calls.value - screener_j) / own.value * asked_share
    return Estimate(value=value, low=min(corners), high=max(corners))


def filled_rows(cost: DeepCost, per_second: float, limit_ms: float | None) -> int:
    """The largest measured call that fills and answers within the limit, the smallest at least; see the module."""
    fitting = [
        call.rows
        for call in cost.calls
        if limit_ms is None or 1e3 * (call.rows - 1) / per_second + call.wall_ms.value <= limit_ms
    ]
    return max(fitting, default=cost.rows[0])


def _call_weights(cost: DeepCost, rows: float | None, calls: float, meters: Iterable[str]) -> _Weights:
    """`calls` of `rows` as a sum of measured ones, by these meters."""
    if rows is None:
        return {}
    places = cost.weights(rows)
    if places is None:
        measured = cost.rows
        raise CounterfactualError(
            f"deep-only: the stream's deep calls have {rows:.1f} transactions each, measured were {measured[0]} to "
            f"{measured[-1]}; {MEASURE_AGAIN} with --rows"
        )
    return {(meter, place): calls * weight for meter in meters for place, weight in places.items()}


def _added(one: _Weights, other: _Weights) -> _Weights:
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in one | other}


def _scaled(weights: _Weights, factor: float) -> _Weights:
    return {key: factor * weight for key, weight in weights.items()}


def _sum(cost: DeepCost, weights: _Weights, fixed_j: float = 0.0, more: Iterable[Estimate] = ()) -> Estimate:
    """Joules; a measured call counts once, with the sum of its weights, so what cancels leaves no uncertainty."""
    value = low = high = fixed_j
    for (meter, place), weight in weights.items():
        call = cost.calls[place].energy_mj[meter]
        value += weight * call.value / 1e3
        low += weight * (call.low if weight > 0 else call.high) / 1e3
        high += weight * (call.high if weight > 0 else call.low) / 1e3
    for one in more:
        value, low, high = value + one.value, low + one.low, high + one.high
    return Estimate(value=value, low=low, high=high)


def _negative(one: Estimate) -> Estimate:
    return Estimate(value=-one.value, low=-one.high, high=-one.low)


def _idle_j(meter: str, metered_j: float, seconds: float, cost: DeepCost) -> Estimate:
    """What a model server's meter tells without any call, over the ledger's time; never more than it has told."""
    watts = next(one.idle_w for one in cost.meters if one.meter == meter)
    value, low, high = (min(max(one, 0.0) * seconds, metered_j) for one in (watts.value, watts.low, watts.high))
    return Estimate(value=value, low=low, high=high)
