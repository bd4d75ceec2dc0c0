"""How well joules of MIG slices are attributed: synthetic devices whose truth is known, and the ways side by side.

A device draws idle power, and for each slice activity × SMs × watts a SM of its workload; how many watts that is
differs between workloads, which no attribution by activity can know, and grows less than in proportion where the device
is near its power limit. What is read of it carries noise: the counter, and the activities. The truth of a slice is what
its own work has drawn, and idle by its provisioned size; that of empty slices and stranded SMs is their idle. An error
is the share of the device's joules that stands on a wrong line.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from cascade.ledger.slices import EMPTY, METHODS, STRANDED, Method, Slice, Window, attribute_windows

# An A100's: its SMs, of which MIG leaves 98 to slices, and what it draws without work (NVIDIA states no figure; a usual
# reading), with the watts of its SMs at full activity.
SMS, IDLE_W, DYNAMIC_W = 108, 60.0, 250.0
WINDOW_S, WINDOWS = 5.0, 120
COUNTER_NOISE, ACTIVITY_NOISE = 0.005, 0.03
# Watts an active SM draws, by workload, against the mean: from memory-bound to dense matrix products.
WORKLOADS = (0.8, 1.2)
POWER_LIMIT_W = 300.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A device cut up: SMs and mean activity of each slice, None for an empty one."""

    name: str
    slices: tuple[tuple[int, float | None], ...]


SCENARIOS = (
    Scenario(name="7 × 1g, equal load", slices=((14, 0.5),) * 7),
    Scenario(name="7 × 1g, unequal load", slices=tuple((14, share) for share in (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05))),
    Scenario(name="7 × 1g, 3 empty", slices=((14, 0.6), (14, 0.4), (14, 0.8), (14, 0.2), *((14, None),) * 3)),
    Scenario(name="3g + 2g + 1g, 1g empty", slices=((42, 0.5), (28, 0.5), (14, 0.5), (14, None))),
    Scenario(name="4g + 2g + 1g, small one busy", slices=((56, 0.1), (28, 0.2), (14, 0.95))),
    Scenario(name="one 1g alone", slices=((14, 0.7),)),
    Scenario(name="nearly nothing to do", slices=((42, 0.01), (42, 0.02))),
)


class AttributionError(msgspec.Struct, frozen=True, kw_only=True):
    """Of one way in one scenario: shares of the device's joules. `wrong_share`: on a wrong line; `missing_share`: on
    none, or counted twice where negative.
    """

    scenario: str
    method: Method
    wrong_share: float
    missing_share: float


class AttributionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade bench attribution` saw."""

    errors: list[AttributionError]
    seed: int


def simulate(scenario: Scenario, seed: int) -> tuple[list[Window], dict[str, float]]:
    """Windows as they would be read, and the true joules by line."""
    chance = np.random.default_rng(seed)
    sizes = np.array([sms for sms, _ in scenario.slices])
    means = np.array([0.0 if mean is None else mean for _, mean in scenario.slices])
    used = np.array([mean is not None for _, mean in scenario.slices])
    factor = chance.uniform(*WORKLOADS, len(sizes))
    names = [f"slice-{place}" for place in range(len(sizes))]
    truth = dict.fromkeys([*(name for name, one in zip(names, used, strict=True) if one), EMPTY, STRANDED], 0.0)
    windows = []
    for _ in range(WINDOWS):
        activity = np.clip(means * chance.uniform(0.5, 1.5, len(sizes)), 0.0, 1.0)
        drawn_w = DYNAMIC_W * activity * sizes / SMS * factor
        limit = min(1.0, (POWER_LIMIT_W - IDLE_W) / max(drawn_w.sum(), 1e-9))
        drawn_j = drawn_w * limit * WINDOW_S
        idle_j = IDLE_W * WINDOW_S
        for name, sms, own_j, one in zip(names, sizes, drawn_j, used, strict=True):
            truth[name if one else EMPTY] += idle_j * sms / SMS + own_j
        truth[STRANDED] += idle_j * (SMS - sizes.sum()) / SMS
        total_j = idle_j + drawn_j.sum()
        read = np.clip(activity * (1 + chance.normal(0, ACTIVITY_NOISE, len(sizes))), 0.0, 1.0)
        windows.append(
            Window(
                device=scenario.name, seconds=WINDOW_S, energy_j=total_j * (1 + chance.normal(0, COUNTER_NOISE)),
                idle_w=IDLE_W, sms=SMS, check_j=total_j,
                slices=tuple(
                    Slice(name=name, sms=int(sms), activity=float(seen) if one else None)
                    for name, sms, seen, one in zip(names, sizes, read, used, strict=True)
                ),
            )
        )  # fmt: skip
    return windows, truth


def attribution_errors(seed: int, scenarios: Sequence[Scenario] = SCENARIOS) -> list[AttributionError]:
    """Every way in every scenario."""
    found = []
    for scenario in scenarios:
        windows, truth = simulate(scenario, seed)
        for method in METHODS:
            (books,) = attribute_windows(windows, method)
            told = {row.name: row.energy_j for row in books.rows}
            wrong_j = sum(abs(told.get(name, 0.0) - truth.get(name, 0.0)) for name in told.keys() | truth.keys())
            found.append(
                AttributionError(
                    scenario=scenario.name, method=method, wrong_share=wrong_j / sum(truth.values()) / 2,
                    missing_share=books.residual_share,
                )
            )  # fmt: skip
    return found


def show_attribution(errors: Sequence[AttributionError], console: Console) -> None:
    """Print the errors."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    table.add_column("% of joules on a wrong line (on none)", no_wrap=True)
    for method in METHODS:
        table.add_column(method, justify="right", no_wrap=True)
    for scenario in dict.fromkeys(one.scenario for one in errors):
        cells = [
            f"{one.wrong_share:6.1%} ({max(one.missing_share, 0.0):.1%})" for one in errors if one.scenario == scenario
        ]
        table.add_row(scenario, *cells)
    console.print()
    console.print(table)
    console.print(
        "\n activity-size: ours; activity: without size and idle, as Kepler; occupied: by size, empty slices free, as"
        f" CEEMS\n synthetic A100: {IDLE_W:g} W idle, {DYNAMIC_W:g} W dynamic, {WINDOWS} windows of {WINDOW_S:g} s,"
        f" noise {COUNTER_NOISE:.1%} of the counter and {ACTIVITY_NOISE:.0%} of activities, workloads of"
        f" {WORKLOADS[0]:g} to {WORKLOADS[1]:g} × the mean watts a SM",
        highlight=False,
    )
