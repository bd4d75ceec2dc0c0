"""Checks that the cost of a deep call was measured for the service of a ledger.

Bundle, backend, machine, meters and wattage must be the same: for any other, the comparison would be a guess.
"""

from __future__ import annotations

from typing import Final

from cascade.ledger.deep_cost import UNDIVIDED, DeepCost
from cascade.ledger.energy import IDLE_METER, WORKER_METER
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.machine import Machine
from cascade.ledger.summary import EnergyFigure, LedgerSummary

MEASURE_AGAIN: Final = "run `cascade bench deep-calls` for this service"
# Packages that run a deep call: another version may have another cost.
_PACKAGES: Final = ("numpy", "onnxruntime", "tritonclient")


def check_service(summary: LedgerSummary, cost: DeepCost) -> None:
    """Raises CounterfactualError if bundle, backend or machine differ."""
    if summary.bundle_version != cost.bundle_version:
        raise CounterfactualError(
            f"deep-only: the ledger has bundle {summary.bundle_version or 'unknown'}, but the cost of a deep call was "
            f"measured with {cost.bundle_version}; {MEASURE_AGAIN}"
        )
    if summary.deep_backend != cost.backend:
        raise CounterfactualError(
            f"deep-only: the ledger's deep model ran on {summary.deep_backend or 'an unknown backend'}, but the cost "
            f"of a deep call was measured on {cost.backend}; {MEASURE_AGAIN}"
        )
    measured = _identity(cost.machine)
    for machine in (summary.machine, *summary.other_machines):
        for name, found in _identity(machine).items():
            if found != measured[name]:
                raise CounterfactualError(
                    f"deep-only: the cost of a deep call was measured on another machine: {name} {measured[name]} when "
                    f"measured, {found} in the ledger; {MEASURE_AGAIN} on its machine"
                )


def _identity(machine: Machine) -> dict[str, str]:
    """The properties of a machine that change the cost of a deep call."""
    return {
        "processor": machine.processor,
        "cores": str(machine.cores),
        "memory GiB": f"{machine.memory_gib:g}",
        "system": machine.system,
        "Python": machine.python,
    } | {name: machine.packages.get(name, "absent") for name in _PACKAGES}


def compared_figures(summary: LedgerSummary, cost: DeepCost) -> list[EnergyFigure]:
    """The meters of the ledger to compare: those with joules of the service alone.

    Raises CounterfactualError if the cost of a deep call was measured with other meters.
    """
    figures = [figure for figure in summary.energy if figure.meter not in UNDIVIDED]
    if not figures:
        raise CounterfactualError("deep-only: the ledger has no energy of the service alone; set up a meter, [energy]")
    for figure in figures:
        if figure.energy_j is None:
            raise CounterfactualError(
                f"deep-only: the meter {figure.meter} was lost ({figure.problem}); choose a time in which it worked"
            )
    _check_meters({figure.meter: figure for figure in figures if figure.meter != IDLE_METER}, cost)
    if summary.deep_backend == "triton" and {figure.meter for figure in figures} <= {WORKER_METER, IDLE_METER}:
        raise CounterfactualError(
            "deep-only: no meter measures the Triton that runs the deep model; run it on the service's machine"
        )
    if any(figure.kind == "modelled" for figure in figures) and summary.watts_per_core != cost.watts_per_core:
        raise CounterfactualError(
            f"deep-only: the ledger models {summary.watts_per_core or 'unknown'} W per busy core, the cost of a deep "
            f"call {cost.watts_per_core:g} W; {MEASURE_AGAIN} with the same [energy]"
        )
    return figures


def _check_meters(ledger_meters: dict[str, EnergyFigure], cost: DeepCost) -> None:
    """Raises CounterfactualError if the meters, their kinds or their devices differ."""
    cost_meters = {meter.meter: meter for meter in cost.meters if meter.meter not in UNDIVIDED}
    for name in sorted(ledger_meters.keys() | cost_meters.keys()):
        figure, meter = ledger_meters.get(name), cost_meters.get(name)
        if figure is None or meter is None:
            where = "the ledger" if figure is None else "the cost of a deep call"
            raise CounterfactualError(
                f"deep-only: {where} lacks the meter {name}; meter the same processes and devices, and {MEASURE_AGAIN}"
            )
        if figure.kind != meter.kind:
            raise CounterfactualError(
                f"deep-only: {name} is {figure.kind} in the ledger and {meter.kind} in the cost of a deep call, and "
                f"the two kinds are never compared; {MEASURE_AGAIN}"
            )
        device = meter.source.rpartition(" of ")[2]
        if meter.kind == "measured" and device not in figure.source:
            raise CounterfactualError(
                f"deep-only: {name} was {device} when measured, {figure.source} in the ledger; {MEASURE_AGAIN}"
            )
