"""Whether the cost of a deep call was measured for the service that a ledger tells of; where not, why.

The same bundle, backend, machine, meters and wattage: anything else would be a guess.
"""

from __future__ import annotations

from typing import Final

from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.energy import IDLE_METER, WORKER_METER
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.machine import Machine
from cascade.ledger.rapl import RaplMeter
from cascade.ledger.summary import EnergyFigure, LedgerSummary

# Meters of the whole machine: other processes are in them.
UNDIVIDED: Final = (RaplMeter.name,)
MEASURE_AGAIN: Final = "run `cascade bench deep-calls` for this service"
# Packages that a deep call runs in: with other versions of them it is another call.
_PACKAGES: Final = ("numpy", "onnxruntime", "tritonclient")


def check_service(summary: LedgerSummary, cost: DeepCost) -> None:
    """Raise CounterfactualError where bundle, backend or machine are others."""
    if summary.bundle_version != cost.bundle_version:
        raise CounterfactualError(
            f"deep-only: the ledger is of bundle {summary.bundle_version or 'unknown'}, the cost of a deep call was "
            f"measured with {cost.bundle_version}; {MEASURE_AGAIN}"
        )
    if summary.deep_backend != cost.backend:
        raise CounterfactualError(
            f"deep-only: the ledger's deep model ran on {summary.deep_backend or 'an unknown backend'}, the cost of a "
            f"deep call was measured on {cost.backend}; {MEASURE_AGAIN}"
        )
    for machine in (summary.machine, *summary.other_machines):
        differing = [name for name, text in _identity(machine).items() if text != _identity(cost.machine)[name]]
        if differing:
            name = differing[0]
            raise CounterfactualError(
                f"deep-only: not measured on the ledger's machine: {name} {_identity(cost.machine)[name]} when "
                f"measured, {_identity(machine)[name]} in the ledger; {MEASURE_AGAIN} there"
            )


def _identity(machine: Machine) -> dict[str, str]:
    """What makes a machine the same for a deep call."""
    return {
        "processor": machine.processor,
        "cores": str(machine.cores),
        "memory GiB": f"{machine.memory_gib:g}",
        "system": machine.system,
        "Python": machine.python,
    } | {name: machine.packages.get(name, "absent") for name in _PACKAGES}


def compared_figures(summary: LedgerSummary, cost: DeepCost) -> list[EnergyFigure]:
    """The ledger's meters to compare, all but those of the whole machine, each with its joules.

    Raises CounterfactualError where they are not the meters of the measurement.
    """
    figures = [one for one in summary.energy if one.meter not in UNDIVIDED]
    if not figures:
        raise CounterfactualError("deep-only: the ledger has no energy that belongs to the service; give it a meter")
    for one in figures:
        if one.energy_j is None:
            raise CounterfactualError(
                f"deep-only: the meter {one.meter} was lost ({one.problem}); take a time in which it was there"
            )
    _check_meters({one.meter: one for one in figures if one.meter != IDLE_METER}, cost)
    if summary.deep_backend == "triton" and {one.meter for one in figures} <= {WORKER_METER, IDLE_METER}:
        raise CounterfactualError(
            "deep-only: no meter sees the Triton that runs the deep model; run the service beside it on one machine"
        )
    if any(one.kind == "modelled" for one in figures) and summary.watts_per_core != cost.watts_per_core:
        raise CounterfactualError(
            f"deep-only: the ledger models {summary.watts_per_core or 'unknown'} W per busy core, the cost of a deep "
            f"call {cost.watts_per_core:g} W; {MEASURE_AGAIN} with the same [energy]"
        )
    return figures


def _check_meters(in_ledger: dict[str, EnergyFigure], cost: DeepCost) -> None:
    """The same meters, of the same kinds and the same devices."""
    measured = {one.meter: one for one in cost.meters if one.meter not in UNDIVIDED}
    for name in sorted(in_ledger.keys() | measured.keys()):
        ledgers, costs = in_ledger.get(name), measured.get(name)
        if ledgers is None or costs is None:
            where = "the ledger" if ledgers is None else "the cost of a deep call"
            raise CounterfactualError(
                f"deep-only: {where} lacks the meter {name}; meter the same processes and devices, and {MEASURE_AGAIN}"
            )
        if ledgers.kind != costs.kind:
            raise CounterfactualError(
                f"deep-only: {name} is {ledgers.kind} in the ledger and {costs.kind} in the cost of a deep call, which "
                f"are never compared; {MEASURE_AGAIN}"
            )
        device = costs.source.rpartition(" of ")[2]
        if costs.kind == "measured" and device not in ledgers.source:
            raise CounterfactualError(
                f"deep-only: {name} was {device} when measured, {ledgers.source} in the ledger; {MEASURE_AGAIN}"
            )
