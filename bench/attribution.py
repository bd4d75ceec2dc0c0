"""How well the joules of MIG slices are attributed: each method on synthetic devices whose true joules are known.

A device draws idle power and, for each slice, activity × SMs × the watts of an SM under its workload. Those watts
differ between workloads, which no attribution by activity can see, and near the power limit they grow less than in
proportion. The readings of the counter and of the activities carry noise. The true joules of a slice are those of its
own work and idle by its provisioned size; those of empty slices and of stranded SMs are idle alone. The error is the
share of the device's joules that a method puts on a wrong line.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from rich.console import Console

from bench.tables import figure_table, print_table
from cascade.ledger.slices import EMPTY, METHODS, STRANDED, Method, Slice, Window, attribute_windows

# An A100: MIG gives 98 of its 108 SMs to slices. NVIDIA states no idle power; 60 W is a usual reading.
SMS, IDLE_W, DYNAMIC_W = 108, 60.0, 250.0
WINDOW_S, WINDOWS = 5.0, 120
COUNTER_NOISE, ACTIVITY_NOISE = 0.005, 0.03
# Watts of an active SM by workload, relative to the mean: from memory-bound kernels to dense matrix products.
WORKLOADS = (0.8, 1.2)
POWER_LIMIT_W = 300.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A partitioned device: SMs and mean activity of each slice; None is an empty slice."""

    name: str
    slices: tuple[tuple[int, float | None], ...]


SCENARIOS = (
    Scenario(name="7 × 1g, equal load", slices=((14, 0.5),) * 7),
    Scenario(name="7 × 1g, unequal load", slices=tuple((14, share) for share in (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05))),
    Scenario(name="7 × 1g, 3 empty", slices=((14, 0.6), (14, 0.4), (14, 0.8), (14, 0.2), *((14, None),) * 3)),
    Scenario(name="3g + 2g + 1g, 1g empty", slices=((42, 0.5), (28, 0.5), (14, 0.5), (14, None))),
    Scenario(name="4g + 2g + 1g, 1g busy", slices=((56, 0.1), (28, 0.2), (14, 0.95))),
    Scenario(name="single 1g", slices=((14, 0.7),)),
    Scenario(name="nearly idle", slices=((42, 0.01), (42, 0.02))),
)


class AttributionError(msgspec.Struct, frozen=True, kw_only=True):
    """The error of a method in a scenario, as shares of the device's joules.

    `wrong_share`: on a wrong line. `missing_share`: on no line; negative where joules are counted twice.
    """

    scenario: str
    method: Method
    wrong_share: float
    missing_share: float


class AttributionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench attribution`."""

    errors: list[AttributionError]
    seed: int


def simulate(scenario: Scenario, seed: int) -> tuple[list[Window], dict[str, float]]:
    """The windows as a meter would read them, and the true joules by line."""
    chance = np.random.default_rng(seed)
    sizes = np.array([sms for sms, _ in scenario.slices])
    means = np.array([mean or 0.0 for _, mean in scenario.slices])
    used = [mean is not None for _, mean in scenario.slices]
    factor = chance.uniform(*WORKLOADS, len(sizes))
    names = [f"slice-{position}" for position in range(len(sizes))]
    truth = dict.fromkeys([*(name for name, in_use in zip(names, used, strict=True) if in_use), EMPTY, STRANDED], 0.0)
    windows = []
    for _ in range(WINDOWS):
        activity = np.clip(means * chance.uniform(0.5, 1.5, len(sizes)), 0.0, 1.0)
        drawn_w = DYNAMIC_W * activity * sizes / SMS * factor
        limit = min(1.0, (POWER_LIMIT_W - IDLE_W) / max(drawn_w.sum(), 1e-9))
        drawn_j = drawn_w * limit * WINDOW_S
        idle_j = IDLE_W * WINDOW_S
        for name, sms, own_j, in_use in zip(names, sizes, drawn_j, used, strict=True):
            truth[name if in_use else EMPTY] += idle_j * sms / SMS + own_j
        truth[STRANDED] += idle_j * (SMS - sizes.sum()) / SMS
        total_j = idle_j + drawn_j.sum()
        readings = np.clip(activity * (1 + chance.normal(0, ACTIVITY_NOISE, len(sizes))), 0.0, 1.0)
        slices = tuple(
            Slice(name=name, sms=int(sms), activity=float(reading) if in_use else None)
            for name, sms, reading, in_use in zip(names, sizes, readings, used, strict=True)
        )
        energy_j = total_j * (1 + chance.normal(0, COUNTER_NOISE))
        windows.append(
            Window(
                device=scenario.name,
                seconds=WINDOW_S,
                energy_j=energy_j,
                idle_w=IDLE_W,
                sms=SMS,
                check_j=total_j,
                slices=slices,
            )
        )
    return windows, truth


def attribution_errors(seed: int, scenarios: Sequence[Scenario] = SCENARIOS) -> list[AttributionError]:
    """The error of every method in every scenario."""
    errors = []
    for scenario in scenarios:
        windows, truth = simulate(scenario, seed)
        for method in METHODS:
            (books,) = attribute_windows(windows, method)
            lines = {row.name: row.energy_j for row in books.rows}
            wrong_j = sum(abs(lines.get(name, 0.0) - truth.get(name, 0.0)) for name in lines.keys() | truth.keys())
            wrong, missing = float(wrong_j / sum(truth.values()) / 2), float(books.residual_share)
            errors.append(
                AttributionError(scenario=scenario.name, method=method, wrong_share=wrong, missing_share=missing)
            )
    return errors


def show_attribution(report: AttributionReport, console: Console) -> None:
    """Print the errors as a table, a row a scenario."""
    table = figure_table("joules on a wrong line", *METHODS)
    for scenario in dict.fromkeys(error.scenario for error in report.errors):
        found = [error for error in report.errors if error.scenario == scenario]
        table.add_row(scenario, *(f"{error.wrong_share:.1%} ({max(error.missing_share, 0.0):5.1%})" for error in found))
    print_table(
        console,
        table,
        "in brackets: joules on no line",
        "activity-size: Cascade's method",
        "activity: without size and idle, as Kepler does it",
        "occupied: by size, nothing for empty slices, as CEEMS does it",
        f"synthetic A100: {IDLE_W:g} W idle, {DYNAMIC_W:g} W dynamic, {WINDOWS} windows of {WINDOW_S:g} s",
        f"noise: {COUNTER_NOISE:.1%} of the counter, {ACTIVITY_NOISE:.0%} of the activities",
        f"workloads: {WORKLOADS[0]:g} to {WORKLOADS[1]:g} × the mean watts of an SM",
    )
