"""A plan as data, and as tables and sentences for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cascade.ledger.render import number_text
from cascade.mig.alternatives import QUOTED, Alternative, Saving, mps, own_gpus, saving, whole_gpus
from cascade.mig.arrivals import ArrivalProcess
from cascade.mig.demand import Demand
from cascade.mig.evaluation import Evaluation
from cascade.mig.gpus import Gpu
from cascade.mig.plan import PlannedLayout, PlannedModel, Planner
from cascade.mig.service_time import Basis, least_certain
from cascade.mig.simulation import Load, simulate

PLAN_FORMAT: Final = 1
CLIENTS: Final = 4
# A simulation with fewer bursts says more about them than about the layout.
BURSTS_MIN: Final = 50
# A layout that leaves less than this share of its joules to other work is full.
_FILLED_MIN: Final = 0.01
_LEGEND: Final = (
    "×rate: the rate at which p99 breaks ÷ the rate at the peak; busy: share of the time in which a replica computes"
    " (larger batches carry more at 100%); stranded: SMs in no slice"
)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A model's p99 on a layout, computed and simulated with so many calls of `clients`.

    calls_min: that a comparison needs, so that there are enough bursts; with fewer, the simulated figures are None.
    """

    model: str
    calls: int
    calls_min: int
    clients: int
    p99_ms: float
    p99_ms_simulated: float | None
    busy_share: float
    busy_share_simulated: float | None

    @property
    def error(self) -> float | None:
        """By how much the computed p99 is above the simulated one, as a share."""
        return None if self.p99_ms_simulated is None else self.p99_ms / self.p99_ms_simulated - 1.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade mig plan`: the best layouts first.

    gpus: that the plan may use. basis, energy_basis: of times and joules of the first layout.
    whole, mps: None where no such GPUs keep the limits. own: only with several models. saving: None without `whole`.
    checks: empty if not simulated.
    """

    format: int = PLAN_FORMAT
    gpu: str
    gpus: int
    idle_w: float
    demands: tuple[Demand, ...]
    basis: Basis
    energy_basis: Basis
    sources: tuple[str, ...]
    layouts: tuple[PlannedLayout, ...]
    whole: Alternative | None
    mps: Alternative | None
    own: Alternative | None
    saving: Saving | None
    checks: tuple[Check, ...]


def make_plan(gpu: Gpu, gpus: int, evaluations: Sequence[Evaluation], count: int, calls: int, seed: int) -> Plan:
    """The plan with its alternatives. Raises DataError, which names the limit in the way, if it is impossible.

    count: layouts. calls: that are simulated for each model of the first layout; 0 for none.
    """
    planner = Planner(gpu, gpus, evaluations)
    layouts = planner.best(count)
    best = layouts[0]
    whole = whole_gpus(gpu, evaluations)
    sources = {
        evaluation.service(planner.servers[name].part).source
        for evaluation, model in zip(evaluations, best.models, strict=True)
        for name in model.replicas
    }
    pairs = zip(evaluations, best.models, strict=True)
    return Plan(
        gpu=gpu.key,
        gpus=gpus,
        idle_w=gpu.idle_w,
        demands=tuple(evaluation.demand for evaluation in evaluations),
        basis=least_certain(model.basis for model in best.models),
        energy_basis=least_certain(model.energy_basis for model in best.models),
        sources=tuple(sorted(sources)),
        layouts=tuple(layouts),
        whole=whole,
        mps=mps(gpu, evaluations),
        own=own_gpus(gpu, evaluations) if len(evaluations) > 1 else None,
        saving=saving(planner, best, whole) if whole is not None else None,
        checks=tuple(check(planner, *pair, calls, seed) for pair in pairs) if calls else (),
    )


def check(
    planner: Planner, evaluation: Evaluation, model: PlannedModel, calls: int, seed: int, clients: int = CLIENTS
) -> Check:
    """Simulates so many calls of `clients` to the replicas of a planned model. Raises DataError without simpy."""
    demand = evaluation.demand
    bursts = demand.bursts
    calls_min = 0 if bursts is None else math.ceil(BURSTS_MIN * bursts.mean_s / bursts.share * demand.calls_per_s)
    found = None
    if calls >= calls_min:
        load = Load(rate_per_s=demand.calls_per_s, rows_per_call=demand.rows_per_call, clients=clients, bursts=bursts)
        services = {name: evaluation.service(planner.servers[name].part) for name in model.replicas}
        times = [services[name].seconds for name, number in model.replicas.items() for _ in range(number)]
        found = simulate(load, times, evaluation.batching, calls, seed)
    return Check(
        model=demand.name,
        calls=calls,
        calls_min=calls_min,
        clients=clients,
        p99_ms=model.p99_ms,
        p99_ms_simulated=None if found is None else found.p99_s * 1e3,
        busy_share=model.busy_share,
        busy_share_simulated=None if found is None else found.busy_share,
    )


def show_plan(plan: Plan, gpu: Gpu, console: Console) -> None:
    """Prints a plan."""
    console.print()
    console.print(Text(_headline(plan, gpu), style="bold"))
    console.print()
    console.print(_table(plan))
    console.print()
    for note in [_LEGEND, "", *plan_notes(plan, gpu), "", *_quoted(plan)]:
        console.print(Padding(Text(note), (0, 1)))


def _headline(plan: Plan, gpu: Gpu) -> str:
    labels = f"times {plan.basis.upper()}, joules {plan.energy_basis.upper()}"
    return f" {gpu.name}, up to {plan.gpus}: {labels}"


def slices_text(counts: Mapping[str, int]) -> str:
    """Slices by profile in words.

    >>> slices_text({"1g.5gb": 3, "4g.20gb": 1})
    '3×1g.5gb + 4g.20gb'
    """
    return " + ".join(name if count == 1 else f"{count}×{name}" for name, count in counts.items())


def _table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("slices")
    for name in ("GPUs", "p99 ms", "×rate", "busy", "stranded", "mJ idle", "mJ a call"):
        table.add_column(name, justify="right", no_wrap=True)
    several = len(plan.demands) > 1
    for layout in plan.layouts:
        (first, *_) = layout.models
        figures = ("", "", "") if several else _model_cells(first)
        energy = (f"{layout.idle_mj:,.3g}", f"{layout.energy_mj:,.4g}")
        table.add_row(slices_text(layout.replicas), str(len(layout.gpus)), *figures, str(layout.stranded_sms), *energy)
        for model in layout.models if several else ():
            table.add_row(f"  {model.name}: {slices_text(model.replicas)}", "", *_model_cells(model), "", "", "")
    alternatives = [found for found in (plan.whole, plan.mps, plan.own) if found is not None]
    if alternatives:
        table.add_section()
    for found in alternatives:
        table.add_row(_alternative_name(found), str(found.gpus), *_alternative_cells(found))
    return table


def _model_cells(model: PlannedModel) -> tuple[str, str, str]:
    return f"{model.p99_ms:.2f}", f"{model.headroom:.2f}", f"{model.busy_share:.0%}"


def _alternative_name(found: Alternative) -> str:
    if found.kind == "MPS":
        return f"MPS, {found.replicas} Triton{'s' if found.replicas > 1 else ''}"
    return f"{found.kind}, {found.instances} instance{'s' if found.instances > 1 else ''}"


def _alternative_cells(found: Alternative) -> tuple[str, ...]:
    energy = (f"{found.idle_mj:,.3g}", f"{found.energy_mj:,.4g}")
    return f"{found.p99_ms:.2f}", f"{found.headroom:.2f}", f"{found.busy_share:.0%}", "0", *energy


def plan_notes(plan: Plan, gpu: Gpu) -> list[str]:
    """What a reader of the first layout must know: arrivals, check, GPUs left off, where the figures come from."""
    best = plan.layouts[0]
    notes = [_arrivals(demand) for demand in plan.demands]
    notes += [_checked(check) for check in plan.checks]
    off = plan.gpus - len(best.gpus)
    if off:
        notes.append(
            f"{off} of {plan.gpus} GPUs can be left off: their {off * plan.idle_w:,.0f} W idle are not counted"
        )
    if "assumed" in (plan.basis, plan.energy_basis):
        notes.append(
            "ASSUMED: nothing was measured for this plan. Measure with `cascade bench deep-calls` on a slice, and give"
            " the file: --measured PROFILE=FILE"
        )
    notes += [f"times: {source}" for source in plan.sources]
    notes += [assumption for assumption in gpu.assumptions if assumption.startswith("idle")]
    notes.append(
        "whole GPU: each instance computes as if all others were busy (worst case); MPS: no interference (best case)"
    )
    return notes


def _checked(check: Check) -> str:
    if check.p99_ms_simulated is None or check.error is None:
        return (
            f"{check.model}: not simulated: {check.calls:,} calls have fewer than {BURSTS_MIN} bursts; take"
            f" --simulate {check.calls_min:,}"
        )
    return (
        f"{check.model}: p99 of {check.calls:,} simulated calls of {check.clients} clients {check.p99_ms_simulated:.2f}"
        f" ms, the model's error {check.error:+.1%}"
    )


def _arrivals(demand: Demand) -> str:
    process = ArrivalProcess.at_replica(demand.calls_per_s, demand.bursts)
    bursts = ""
    if demand.bursts is not None:
        found = demand.bursts
        bursts = f", bursts ×{found.factor:g} for {found.mean_s:g} s, {found.share:.0%} of the time"
    peak, mean = number_text(demand.calls_per_s), number_text(demand.calls_per_s_mean)
    return (
        f"{demand.name}: {peak} calls/s at the peak, {mean} in the mean,"
        f" rows a call: {demand.rows_per_call:.3g}{bursts}; index of dispersion {number_text(process.dispersion)};"
        f" p99 at most {demand.p99_s * 1e3:g} ms, up to {demand.reserve:g} × the peak"
    )


def _quoted(plan: Plan) -> list[str]:
    """When MIG saves as much as is often quoted, from the plan's own figures."""
    title = f"When does the +{QUOTED:.0%} that is often quoted for MIG hold?"
    found, whole = plan.saving, plan.whole
    if found is None or whole is None:
        return [title, "No whole GPU without MIG keeps these limits, so there is nothing to compare with."]
    best = plan.layouts[0]
    change = f"MIG {'saves' if found.at_rate >= 0 else 'costs'} {abs(found.at_rate):.1%}"
    lines = [
        title,
        f"At these rates {change}: {best.energy_mj:,.4g} mJ a call against"
        f" {whole.energy_mj:,.4g} of the whole GPU. Idle power is {found.idle_share:.0%} of it, and all slices share"
        " the idle power of their chip.",
    ]
    if whole.gpus != len(best.gpus):
        lines.append(
            f"GPUs needed: {len(best.gpus)} in slices, {whole.gpus} as a whole, which is a worst case (above)."
        )
    others = (("MPS", plan.mps), ("a GPU of its own for each model", plan.own))
    for name, other in others:
        if other is not None:
            apart = best.energy_mj / other.energy_mj - 1
            lines.append(f"Against {name}, {other.energy_mj:,.4g} mJ: {apart:+z.1%}.")
    if found.mig_calls_per_s is not None and found.whole_calls_per_s is not None:
        lines.append(
            f"Within the limit one GPU carries {found.mig_calls_per_s:,.0f} calls/s in slices and"
            f" {found.whole_calls_per_s:,.0f} as a whole. {_range(found, plan.gpus)}"
        )
    if found.filled > found.at_rate + _FILLED_MIN:
        comparison = "less" if found.filled >= 0 else "more"
        lines.append(
            "If other work, which needs GPUs of its own without MIG, fills the slices left free here:"
            f" {abs(found.filled):.0%} {comparison} than whole GPUs for these calls alone."
        )
    return lines


def _range(found: Saving, gpus: int) -> str:
    on = "one GPU" if gpus == 1 else f"up to {gpus} GPUs"
    if found.quoted_from is None or found.quoted_to is None or found.quoted_rates_share is None:
        return f"So alone, on {on}, MIG saves {QUOTED:.0%} at no rate."
    return (
        f"So alone, on {on}, MIG saves {QUOTED:.0%} or more only between {found.quoted_from:,.0f} and"
        f" {found.quoted_to:,.0f} calls/s (at {found.quoted_rates_share:.0%} of the rates between), where it needs"
        " fewer GPUs."
    )
