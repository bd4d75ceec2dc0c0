"""The queueing model beside the simulation, for layouts and rates of which a user can judge it: `cascade mig check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from cascade.ledger.render import number_text
from cascade.mig.arrivals import Bursts
from cascade.mig.demand import Demand
from cascade.mig.evaluation import Evaluation
from cascade.mig.gpus import Gpu
from cascade.mig.placement import place
from cascade.mig.plan import Planner
from cascade.mig.plan_report import Check, check, slices_text
from cascade.mig.queueing import Batching
from cascade.mig.service_time import ServiceTimes

ERROR_MAX: Final = 0.10
RATES: Final = (100.0, 500.0, 2_000.0, 5_000.0, 9_000.0)


class CheckedLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A layout of one GPU at a rate, with `check` of its calls."""

    slices: dict[str, int]
    calls_per_s: float
    batch_calls: float
    check: Check


class Checks(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade mig check`."""

    gpu: str
    seed: int
    bursts: Bursts | None
    layouts: tuple[CheckedLayout, ...]

    @property
    def error_max(self) -> float:
        """The largest error at p99, in either direction."""
        return max(abs(found.check.error or 0.0) for found in self.layouts)


def checked_slices(gpu: Gpu) -> tuple[dict[str, int], ...]:
    """One small slice, as many of them as fit, two of middle size, and a mix of sizes."""
    small, two, three, four = (gpu.profiles[0], *(gpu.profiles[number] for number in (2, 3, 4)))
    return (
        {small.name: 1},
        {small.name: small.count_max},
        {three.name: 2},
        {small.name: 1, two.name: 1, four.name: 1},
    )


def run_checks(
    gpu: Gpu,
    times: ServiceTimes,
    rates: Sequence[float],
    calls: int,
    clients: int,
    bursts: Bursts | None,
    seed: int,
    slices: Sequence[dict[str, int]] | None = None,
) -> Checks:
    """Computes and simulates every layout at every rate that it can carry.

    gpu, times: of the slices.
    rates: calls a second.
    calls, clients, seed: of the simulation.
    bursts: about each rate; None for none.
    slices: of each layout, all on one GPU; None for those of `checked_slices`.
    """
    found = []
    for counts in checked_slices(gpu) if slices is None else slices:
        layout = place(gpu, counts)
        assert layout is not None, f"{counts} fit on {gpu.key}"  # noqa: S101
        for rate in rates:
            demand = Demand(calls_per_s=rate, calls_per_s_mean=rate, bursts=bursts, p99_s=1.0)
            evaluation = Evaluation(demand, times, Batching(), seed)
            planner = Planner(gpu, 1, [evaluation])
            if rate / sum(counts.values()) >= min(evaluation.capacity(planner.servers[name]) for name in counts):
                continue
            (model,) = planner.describe([layout], [counts]).models
            checked = check(planner, evaluation, model, calls, seed, clients)
            found.append(CheckedLayout(slices=counts, calls_per_s=rate, batch_calls=model.batch_calls, check=checked))
    return Checks(gpu=gpu.key, seed=seed, bursts=bursts, layouts=tuple(found))


def show_checks(checks: Checks, console: Console) -> None:
    """Prints the table, and the largest error under it."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("slices", no_wrap=True)
    for name in ("calls/s", "batch", "p99 ms", "sim. ms", "error", "busy", "sim."):
        table.add_column(name, justify="right", no_wrap=True)
    before: dict[str, int] = {}
    for found in checks.layouts:
        checked = found.check
        table.add_row(
            slices_text(found.slices).replace(" ", "") if found.slices != before else "",
            f"{found.calls_per_s:,.0f}",
            f"{found.batch_calls:.1f}",
            number_text(checked.p99_ms),
            number_text(checked.p99_ms_simulated),
            "–" if checked.error is None else f"{checked.error:+.1%}",
            f"{checked.busy_share:.1%}",
            "–" if checked.busy_share_simulated is None else f"{checked.busy_share_simulated:.1%}",
        )
        before = found.slices
    console.print()
    console.print(table)
    missing = max((found.check.calls_min for found in checks.layouts if found.check.error is None), default=0)
    if missing:
        console.print(f"\n –: too few bursts among the calls; take --calls {missing:,}", highlight=False)
    console.print(
        f"\n largest error at p99: {checks.error_max:.1%}; at most {ERROR_MAX:.0%} is allowed", highlight=False
    )
