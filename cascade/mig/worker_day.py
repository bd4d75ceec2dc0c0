"""The same day for the workers, which scale on consumer lag and on the cores that their loops use.

A worker decides `rate_max` transactions a second; what it does not reach waits in its partition. There are never more
workers than partitions. Rebalances and the restoring of state are not simulated: `start_s` stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cascade.columns import Float64
from cascade.ledger.render import number_text
from cascade.mig import shipped
from cascade.mig.autoscale import STEP_S, WINDOW_S, Fleet
from cascade.mig.hpa import SYNC_S, Behavior

# A transaction that waits longer in its partition counts as late.
WAIT_S_MAX: Final = 1.0


class WorkerDay(msgspec.Struct, frozen=True, kw_only=True):
    """A day of the workers under a rule. late_share: of all transactions. lag_max: records, of all partitions."""

    name: str
    late_share: float
    lag_max: float
    workers_min: int
    workers_max: int
    core_hours: float


def worker_behaviors(partitions: int, least: int, peak_per_s: float, rate_max: float) -> dict[str, Behavior]:
    """Static provisioning for the peak, the shipped behavior, and Kubernetes' own; all with at most `partitions`."""
    static = min(max(math.ceil(peak_per_s / (shipped.BUSY * rate_max)), least), partitions)
    return {
        "static, for the peak": Behavior(replicas_min=static, replicas_max=static),
        "k8s/ as shipped": shipped.worker_behavior(least, partitions),
        "HPA default": Behavior(replicas_min=least, replicas_max=partitions),
    }


def simulate_worker_day(rates: Float64, rate_max: float, name: str, behavior: Behavior, start_s: float) -> WorkerDay:
    """One day.

    rates: float64 [steps], transactions a second.
    rate_max: transactions a second that a worker decides.
    name, behavior: of the autoscaler, which begins with `behavior.replicas_min`.
    start_s: from the wish for a worker until it decides.
    """
    fleet = Fleet(behavior, behavior.replicas_min, start_s)
    window = int(WINDOW_S / STEP_S)
    busy, counts, lags = np.zeros(len(rates)), np.zeros(len(rates)), np.zeros(len(rates))
    lag = late = 0.0
    for step, rate in enumerate(rates):
        now_s = step * STEP_S
        if step and now_s % SYNC_S == 0.0:
            used = float(busy[max(step - window, 0) : step].mean())
            fleet.sync(now_s, [(lag, shipped.LAG), (used, shipped.BUSY)])
        fleet.advance(now_s)
        able = fleet.serving * rate_max
        decided = min(float(rate) * STEP_S + lag, able * STEP_S)
        if lag / able > WAIT_S_MAX:
            late += decided
        lag += float(rate) * STEP_S - decided
        busy[step], counts[step], lags[step] = decided / STEP_S / rate_max, fleet.count, lag
    return WorkerDay(
        name=name,
        late_share=late / (float(rates.sum()) * STEP_S),
        lag_max=float(lags.max()),
        workers_min=int(counts.min()),
        workers_max=int(counts.max()),
        core_hours=float(counts.sum()) * STEP_S / 3_600.0,
    )


def show_worker_days(days: Sequence[WorkerDay], partitions: int, rate_max: float, console: Console) -> None:
    """Prints the days as a table, a row a rule."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("workers", no_wrap=True)
    for name in ("from–to", "late", "lag at most", "core h"):
        table.add_column(name, justify="right", no_wrap=True)
    for day in days:
        span = f"{day.workers_min}–{day.workers_max}"
        table.add_row(day.name, span, f"{day.late_share:.2%}", number_text(day.lag_max), number_text(day.core_hours))
    console.print()
    console.print(table)
    note = (
        f"late: waits more than {WAIT_S_MAX:g} s in its partition; a worker decides {rate_max:,.0f}/s, so {partitions}"
        f" partitions at most {partitions * rate_max:,.0f}/s"
    )
    console.print(Padding(Text(note), (1, 1, 0, 1)))
