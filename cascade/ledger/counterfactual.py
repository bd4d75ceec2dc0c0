"""The energy of deep-only: the same stream with every transaction through the deep model and without the screener.

The comparison is between two whole services. Deep-only needs what the cascade used, without the screener and without
the cascade's own deep calls, and in addition one part of a deep call for each transaction. The cost of a deep call was
measured on the same machine with the same model (DeepCost):

    own deep  = (joules of the model server − its idle power · time) + calls · client's joules per call
    shared    = cascade − screener − own deep
    deep-only = shared + transactions · joules of a call of b rows ÷ b

Idle power, fetching, decoding, features, producing and all other work are therefore on both sides. The meters, not the
measured cost, give the joules of the cascade's own deep calls.

The result depends most on b, the rows of a deep call. `filled` favours deep-only: b is the largest measured call that
the mean rate of the stream fills early enough for its first transaction to meet the limit of the escalated path,
(b − 1) ÷ rate + time of the call ≤ limit; without a limit, the largest measured call. The time of the call is its wall
time, but at most its CPU time, because on a busy machine a call waits for a core, and single calls would look like the
best that deep-only can do. `as_called`: b is the mean of the cascade's own calls. Two more assumptions favour
deep-only: collecting the model's inputs for all transactions costs nothing, and the screener is left out although a
model may read its score.

Divided by the transactions these are c0 = shared, s = screener, D = joules of a call of b rows ÷ b for deep-only, and
D = own deep ÷ transactions sent to the deep model for the cascade: `UnitCosts` has the formula of the saving, and the
break-even escalation rate, at which both services use the same energy.

An interval combines the measured intervals, each at its less favourable end, so that it is wider than any interval
that assumes independent errors. The ledger's own joules count as exact, because their error is the same on both sides.
Measured and modelled joules are compared separately. Joules of the whole machine (RAPL) are not compared, because they
cannot be divided.
"""

from __future__ import annotations

from collections.abc import Iterable

from cascade.ledger.comparable import MEASURE_AGAIN, check_service, compared_figures
from cascade.ledger.deep_cost import UNDIVIDED, DeepCost, Estimate
from cascade.ledger.energy import IDLE_METER, WORKER_METER
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.summary import Counterfactual, DeepOnly, EnergyComparison, EnergyFigure, LedgerSummary
from cascade.ledger.unit_costs import UnitCosts
from cascade.protocols import EnergyKind

# A sum of measured calls: (meter, index in DeepCost.calls) to the number of calls.
_Weights = dict[tuple[str, int], float]


def deep_only(summary: LedgerSummary, cost: DeepCost) -> Counterfactual:
    """Compares the cascade of `summary` with deep-only, at the measured `cost` of a deep call.

    Raises CounterfactualError if the cost was measured for another machine, bundle, backend, wattage, meter or kind of
    energy, if it lacks calls of the needed size, or if the ledger has no transaction.
    """
    transactions = _transactions(summary)
    if transactions <= 0 or summary.elapsed_s <= 0:
        raise CounterfactualError("deep-only: no transaction went through the models; choose a ledger with decisions")
    check_service(summary, cost)
    figures = compared_figures(summary, cost)
    limit_ms = escalated_limit_ms(summary)
    return Counterfactual(
        transactions=transactions,
        asked=_escalated(summary),
        per_second=summary.per_second,
        limit_ms=limit_ms,
        comparisons=tuple(
            _comparison(kind, [figure for figure in figures if figure.kind == kind], summary, cost, limit_ms)
            for kind in dict.fromkeys(figure.kind for figure in figures if figure.kind is not None)
        ),
        undivided=tuple(figure.meter for figure in summary.energy if figure.meter in UNDIVIDED),
        measured_at=cost.measured_at,
        server=cost.server,
        rounds=cost.rounds,
        method=cost.method,
    )


def escalated_limit_ms(summary: LedgerSummary) -> float | None:
    """The strictest latency limit of the escalated path, ms; None without one."""
    return min(
        (result.limit for result in summary.objectives if result.name.endswith(" of escalated")),
        default=None,
    )


def _transactions(summary: LedgerSummary) -> int:
    """The transactions that went through the models: all but duplicates."""
    return summary.transactions - summary.paths["duplicate"].decisions


def _escalated(summary: LedgerSummary) -> int:
    """The transactions that were sent to the deep model, in time or not."""
    return summary.paths["escalated"].decisions + summary.paths["degraded"].decisions


def _comparison(
    kind: EnergyKind, figures: list[EnergyFigure], summary: LedgerSummary, cost: DeepCost, limit_ms: float | None
) -> EnergyComparison:
    """Compares the joules of one kind, by its meters: of the worker, of reserved idle cores, or of the model server."""
    transactions = _transactions(summary)
    metered_j = {figure.meter: figure.energy_j or 0.0 for figure in figures}
    cascade_j = sum(metered_j.values())
    screener_j = summary.stages["screener"].cpu_s * cost.watts_per_core if WORKER_METER in metered_j else 0.0
    serving = [meter for meter in metered_j if meter not in (WORKER_METER, IDLE_METER)]
    calling = [meter for meter in metered_j if meter != IDLE_METER]
    serving_j = sum(metered_j[meter] for meter in serving)
    idle_j = [_idle_j(meter, metered_j[meter], summary.elapsed_s, cost) for meter in serving]
    rows, calls = summary.deep.rows_per_call, summary.deep.calls
    client = _call_weights(cost, rows, calls, [meter for meter in calling if meter == WORKER_METER])
    own = _sum(cost, client, serving_j, [Estimate(-idle.value, -idle.high, -idle.low) for idle in idle_j])
    # shared joules, before the client's part of the cascade's own calls is taken off
    base_j, less_client = cascade_j - screener_j - serving_j, {key: -weight for key, weight in client.items()}

    shared = _sum(cost, less_client, base_j, idle_j)
    idle = _sum(cost, {}, metered_j.get(IDLE_METER, 0.0), idle_j)
    asked = _escalated(summary)

    def at(rows: float) -> DeepOnly:
        weights = _call_weights(cost, rows, transactions / rows, calling)
        added = {key: weights.get(key, 0.0) + less_client.get(key, 0.0) for key in weights | less_client}
        energy, calls_j = _sum(cost, added, base_j, idle_j), _sum(cost, weights)
        unit = UnitCosts(
            shared_mj=_mj_each(shared, transactions),
            idle_mj=_mj_each(idle, transactions),
            screener_mj=1e3 * screener_j / transactions,
            deep_only_mj=_mj_each(calls_j, transactions),
            own_deep_mj=_mj_each(own, asked) if asked else None,
        )
        return _deep_only(rows, energy, calls_j, cascade_j, unit, asked / transactions)

    return EnergyComparison(
        kind=kind,
        meters=tuple(metered_j),
        cascade_j=cascade_j,
        screener_j=screener_j,
        own_deep_j=own,
        own_deep_priced_j=None if rows is None else _sum(cost, _call_weights(cost, rows, calls, calling)),
        shared_j=shared,
        idle_j=idle,
        filled=at(filled_rows(cost, summary.per_second, limit_ms)),
        as_called=None if rows is None else at(rows),
    )


def _deep_only(
    rows: float, energy: Estimate, calls: Estimate, cascade_j: float, unit: UnitCosts, share: float
) -> DeepOnly:
    """The figures of deep-only. `energy`: its J. `calls`: J of its calls alone. `share`: escalated by the cascade."""
    if calls.low <= 0 or energy.low <= 0 or cascade_j <= 0:
        raise CounterfactualError(
            "deep-only: the meters do not show that a deep call needs more than idle; measure on the device that runs "
            "the model, in longer or more rounds"
        )
    return DeepOnly(
        rows_per_call=rows,
        energy_j=energy,
        ratio=energy.map(lambda energy_j: energy_j / cascade_j),
        ratio_without_idle=unit.saving_without_idle(share),
        saving_j=energy.map(lambda energy_j: energy_j - cascade_j),
        saving_share=energy.map(lambda energy_j: 1 - cascade_j / energy_j),
        break_even_share=unit.even_share(),
        unit_costs=unit,
    )


def _mj_each(joules: Estimate, transactions: int) -> Estimate:
    return joules.map(lambda energy_j: 1e3 * energy_j / transactions)


def filled_rows(cost: DeepCost, per_second: float, limit_ms: float | None) -> int:
    """The rows of the largest measured call that fills and answers within the limit.

    If none does, deep-only misses its limit with calls of any size, so the largest that fills within the limit counts.

    per_second: transactions per second. limit_ms: latency limit of the escalated path; None without one.
    """
    if limit_ms is None:
        return cost.rows[-1]
    filled_ms = {call.rows: 1e3 * (call.rows - 1) / per_second for call in cost.calls}
    answered = [call.rows for call in cost.calls if filled_ms[call.rows] + call.unhindered_ms <= limit_ms]
    filled = [rows for rows, fill_ms in filled_ms.items() if fill_ms <= limit_ms]
    return max(answered or filled, default=cost.rows[0])


def _call_weights(cost: DeepCost, rows: float | None, calls: float, meters: Iterable[str]) -> _Weights:
    """A number of calls of `rows` rows, by the given meters, as a sum of measured calls; empty if `rows` is None."""
    if rows is None:
        return {}
    weights = cost.weights(rows)
    if weights is None:
        raise CounterfactualError(
            f"deep-only: the deep calls of the stream have {rows:.1f} transactions each, but calls of "
            f"{cost.rows[0]} to {cost.rows[-1]} were measured; {MEASURE_AGAIN} with --rows"
        )
    return {(meter, index): calls * weight for meter in meters for index, weight in weights.items()}


def _sum(cost: DeepCost, weights: _Weights, fixed_j: float = 0.0, more: Iterable[Estimate] = ()) -> Estimate:
    """Joules of measured calls, of `fixed_j` and of `more`.

    Each measured call occurs once, with the sum of its weights, so that calls that cancel leave no uncertainty.
    """
    value = low = high = fixed_j
    for (meter, index), weight in weights.items():
        call = cost.calls[index].energy_mj[meter]
        value += weight * call.value / 1e3
        low += weight * (call.low if weight > 0 else call.high) / 1e3
        high += weight * (call.high if weight > 0 else call.low) / 1e3
    for estimate in more:
        value, low, high = value + estimate.value, low + estimate.low, high + estimate.high
    return Estimate(value, low, high)


def _idle_j(meter: str, metered_j: float, seconds: float, cost: DeepCost) -> Estimate:
    """Joules that a meter of the model server counts without any call, at most all that it has counted."""
    watts = next(found.idle_w for found in cost.meters if found.meter == meter)
    return watts.map(lambda idle_w: min(max(idle_w, 0.0) * seconds, metered_j))
