"""A day under the autoscaler, simulated: Triton on slices of one profile, and what each rule of scaling costs.

The day has a curve by the hour, and a flash crowd on top: within a minute the rate rises to a multiple, stays there,
and falls as fast. Every `STEP_S` seconds each ready replica has its share of the calls, and the queueing model gives
its late calls, its calls in flight and those that wait. (A queue reaches its steady state within some batches, so
within milliseconds.) A replica that is asked for more than it can compute counts all its calls as late.

The autoscaler sees what Prometheus shows it: means over `WINDOW_S`. A new pod serves calls after `start_s`. A GPU
counts while one of its slices is in use; the slices of the fewest GPUs are used first.
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
from cascade.mig.evaluation import QUANTILE, Evaluation, Server
from cascade.mig.gpus import Gpu, Profile
from cascade.mig.hpa import SYNC_S, Autoscaler, Behavior
from cascade.mig.service_time import Part, ServiceTime

STEP_S: Final = 5.0
WINDOW_S: Final = 120.0
DAY_S: Final = 86_400.0
# Rates between which a replica's figures are not computed anew.
_RATE_STEP: Final = 0.03
# Share of the highest rate at which the planner's targets are set: the rest is for the pods that start.
TARGET_SHARE: Final = 0.5

# ASSUMED: card payments by the hour, as shares of the busiest hour.
HOURLY: Final = (
    *(0.22, 0.15, 0.11, 0.09, 0.09, 0.12, 0.20, 0.35, 0.50, 0.62, 0.72, 0.82),
    *(0.92, 0.90, 0.84, 0.82, 0.86, 0.94, 1.00, 0.95, 0.82, 0.65, 0.48, 0.33),
)


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """A flash crowd: the rate is `factor` times the curve's from `start_h` on, for `minutes`; `rise_s` up and down."""

    factor: float
    start_h: float
    minutes: float
    rise_s: float = 60.0


def day_rates(peak_per_s: float, crowd: Crowd | None) -> Float64:
    """Float64 [steps of a day]: calls a second, `peak_per_s` in the busiest hour without the crowd."""
    at_s = np.arange(0.0, DAY_S, STEP_S)
    hours = np.arange(25) * 3_600.0
    rates = peak_per_s * np.interp(at_s, hours, (*HOURLY, HOURLY[0]))
    if crowd is not None:
        start_s, end_s = crowd.start_h * 3_600.0, crowd.start_h * 3_600.0 + crowd.minutes * 60.0
        edges = (start_s, start_s + crowd.rise_s, end_s, end_s + crowd.rise_s)
        rates = rates * np.interp(at_s, edges, (1.0, crowd.factor, crowd.factor, 1.0))
    return np.asarray(rates)


class ReplicaState(msgspec.Struct, frozen=True):
    """A replica at a rate: share of its calls that are late, calls in flight and waiting (mean), dynamic watts."""

    late_share: float
    in_flight: float
    waiting: float
    work_w: float


class Replicas:
    """The states of a replica on a slice of `profile`, by its rate on a grid."""

    def __init__(self, gpu: Gpu, profile: Profile, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._server = Server(profile.name, Part.of(gpu, profile))
        self._states: dict[int, ReplicaState] = {}

    @property
    def service(self) -> ServiceTime:
        """The times of its batches."""
        return self._evaluation.service(self._server.part)

    @property
    def rate_max(self) -> float:
        """The highest rate of a replica that keeps the limit."""
        return self._evaluation.rate_max(self._server)

    def state(self, calls_per_s: float) -> ReplicaState:
        """The state at the next rate of the grid."""
        index = math.ceil(math.log(max(calls_per_s, 1e-3)) / math.log1p(_RATE_STEP) - 1e-9)
        if index not in self._states:
            self._states[index] = self._compute((1.0 + _RATE_STEP) ** index)
        return self._states[index]

    def _compute(self, calls_per_s: float) -> ReplicaState:
        evaluation, batching = self._evaluation, self._evaluation.batching
        queue = evaluation.queue(self._server, calls_per_s)
        if queue is None:
            full = evaluation.capacity(self._server) * 0.99
            work_w = full * evaluation.joules(self._server, full)
            return ReplicaState(1.0, 2.0 * batching.queue_max, batching.queue_max, work_w)
        calls = np.arange(1, len(queue.batch_shares) + 1)
        service = self.service
        rows = calls * evaluation.demand.rows_per_call
        seconds = np.array([service.seconds(float(count)) for count in rows])
        computing_s = float(queue.batch_shares @ (calls * seconds)) / queue.batch_mean
        return ReplicaState(
            late_share=queue.late_share(evaluation.demand.p99_s),
            in_flight=calls_per_s * queue.mean_s,
            waiting=calls_per_s * max(queue.mean_s - computing_s, 0.0),
            work_w=calls_per_s * evaluation.joules(self._server, calls_per_s),
        )


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A way to choose replicas. waiting, in_flight: targets for a pod; None: `behavior.replicas_max` all day."""

    name: str
    behavior: Behavior
    waiting: float | None = None
    in_flight: float | None = None


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """A day under a rule. late_share: of all calls. minutes_broken: minutes in which more than 1 % were late.

    replicas_min, replicas_max, replicas_mean: provisioned. gpu_hours, slice_hours: provisioned, summed over the day.
    energy_mj: joules a call, idle of the GPUs in use included.
    """

    rule: Rule
    late_share: float
    minutes_broken: int
    replicas_min: int
    replicas_max: int
    replicas_mean: float
    gpu_hours: float
    slice_hours: float
    energy_mj: float

    @property
    def kept(self) -> bool:
        """Whether 99 % of the day's calls were in time."""
        return self.late_share <= 1.0 - QUANTILE


def rules(replicas: Replicas, slices: int, least: int, calls_per_s_max: float) -> list[Rule]:
    """Static provisioning, the shipped autoscaler, and one with Kubernetes' behavior and the planner's targets.

    slices: that the replicas may use. least: replicas. calls_per_s_max: of the day.
    """
    static = min(max(math.ceil(calls_per_s_max / replicas.rate_max), least), slices)
    behavior = shipped.triton_behavior(least, slices)
    planned = replicas.state(replicas.rate_max * TARGET_SHARE)
    return [
        Rule(name="static, for the peak", behavior=Behavior(replicas_min=static, replicas_max=static)),
        Rule(name="k8s/ as shipped", behavior=behavior, waiting=shipped.WAITING, in_flight=shipped.IN_FLIGHT),
        Rule(name="k8s/, own target", behavior=behavior, in_flight=planned.in_flight),
        Rule(
            name="HPA default, own target",
            behavior=Behavior(replicas_min=least, replicas_max=slices),
            in_flight=planned.in_flight,
        ),
    ]


class Fleet:
    """The replicas that serve under an autoscaler; a wished one serves `start_s` later."""

    def __init__(self, behavior: Behavior, first: int, start_s: float) -> None:
        self._autoscaler = Autoscaler(behavior, first)
        self._start_s = start_s
        self._starting: list[float] = []
        self.serving = first

    @property
    def count(self) -> int:
        """The replicas that serve or start."""
        return self.serving + len(self._starting)

    def sync(self, now_s: float, metrics: Sequence[tuple[float, float]]) -> None:
        """Asks the autoscaler; what it takes away are first the replicas that start."""
        wanted = self._autoscaler.sync(now_s, metrics)
        new = [now_s + self._start_s] * (wanted - self.count)
        self._starting = [*self._starting, *new][: max(wanted - self.serving, 0)]
        self.serving = min(self.serving, wanted)

    def advance(self, now_s: float) -> None:
        """Lets those serve whose start has ended."""
        self.serving += sum(ready_s <= now_s for ready_s in self._starting)
        self._starting = [ready_s for ready_s in self._starting if ready_s > now_s]


def simulate_day(gpu: Gpu, profile: Profile, replicas: Replicas, rates: Float64, rule: Rule, start_s: float) -> Day:
    """One day. rates: float64 [steps], calls a second. start_s: from the wish for a pod until it serves calls."""
    behavior = rule.behavior
    static = rule.waiting is None and rule.in_flight is None
    first = behavior.replicas_max if static else behavior.replicas_min
    fleet = Fleet(behavior, first, start_s)
    window = int(WINDOW_S / STEP_S)
    waiting, in_flight = np.zeros(len(rates)), np.zeros(len(rates))
    late, counts, joules = np.zeros(len(rates)), np.zeros(len(rates)), 0.0
    for step, rate in enumerate(rates):
        now_s = step * STEP_S
        if not static and step and now_s % SYNC_S == 0.0:
            seen = slice(max(step - window, 0), step)
            metrics = _metrics(rule, float(waiting[seen].mean()), float(in_flight[seen].mean()))
            fleet.sync(now_s, metrics)
        fleet.advance(now_s)
        serving = fleet.serving
        state = replicas.state(float(rate) / serving)
        late[step] = rate * STEP_S * state.late_share
        waiting[step], in_flight[step] = serving * state.waiting, serving * state.in_flight
        counts[step] = fleet.count
        gpus = math.ceil(counts[step] / profile.count_max)
        joules += (gpus * gpu.idle_w + serving * state.work_w) * STEP_S
    calls = float(rates.sum()) * STEP_S
    minutes = int(60.0 / STEP_S)
    by_minute = late.reshape(-1, minutes).sum(axis=1) / (rates.reshape(-1, minutes).sum(axis=1) * STEP_S)
    return Day(
        rule=rule,
        late_share=float(late.sum()) / calls,
        minutes_broken=int((by_minute > 1.0 - QUANTILE).sum()),
        replicas_min=int(counts.min()),
        replicas_max=int(counts.max()),
        replicas_mean=float(counts.mean()),
        gpu_hours=float(np.ceil(counts / profile.count_max).sum()) * STEP_S / 3_600.0,
        slice_hours=float(counts.sum()) * STEP_S / 3_600.0,
        energy_mj=joules / calls * 1e3,
    )


def _metrics(rule: Rule, waiting: float, in_flight: float) -> Sequence[tuple[float, float]]:
    pairs = ((waiting, rule.waiting), (in_flight, rule.in_flight))
    return [(total, target) for total, target in pairs if target is not None]


def show_days(
    days: Sequence[Day], gpu: Gpu, profile: Profile, replicas: Replicas, calls_per_s_max: float, console: Console
) -> None:
    """Prints the days as a table, a row a rule, and what they rest on."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("replicas", no_wrap=True)
    for name in ("from–to", "late", "min.", "p99", "slice h", "GPU h", "mJ a call"):
        table.add_column(name, justify="right", no_wrap=True)
    for day in days:
        table.add_row(
            day.rule.name,
            f"{day.replicas_min}–{day.replicas_max}",
            f"{day.late_share:.2%}",
            str(day.minutes_broken),
            "kept" if day.kept else "missed",
            number_text(day.slice_hours),
            number_text(day.gpu_hours),
            number_text(day.energy_mj),
        )
    service = replicas.service
    target = next((day.rule.in_flight for day in reversed(days) if day.rule.in_flight is not None), None)
    notes = [
        "late: calls beyond the limit of p99; min.: minutes in which they were more than 1 %",
        f"busiest moment {calls_per_s_max:,.0f} calls/s; one {profile.name} keeps p99 up to {replicas.rate_max:,.0f}",
        f"own target: {number_text(target)} calls in flight a pod, those at {TARGET_SHARE:.0%} of that rate",
        f"times {service.basis.upper()}, joules {service.energy_basis.upper()}, curve of the day ASSUMED;"
        f" {gpu.idle_w:g} W idle for each GPU with a slice in use",
    ]
    console.print()
    console.print(table)
    console.print()
    for note in notes:
        console.print(Padding(Text(note), (0, 1)))
