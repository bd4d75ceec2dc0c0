"""An open-loop load on a service, and what a consumer downstream sees of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import numpy as np

from bench.cluster import end_offsets
from bench.load import Load, LoadReport, Plan
from bench.observer import DEEP, DEGRADED, SCREENED, Observations, Observer
from cascade.columns import Float64, Int64
from cascade.config import load_config
from cascade.ledger import LedgerSummary
from cascade.ledger.latency import LatencyHistogram
from streaming.kafka.partitioning import partition_of

# Counted from the last departure; a transaction without a decision by then is missing.
LAST_DECISIONS_S, CAUGHT_UP_POLL_S = 15.0, 0.1
# For the observer's last fetch.
OBSERVED_S = 0.3
PATHS = {"screened": SCREENED, "escalated": DEEP, "degraded": DEGRADED}
CURVE = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 1.0)
Reading = TypeVar("Reading")


class Service(Protocol):
    """What a turn measures: a process that reads transactions and writes decisions."""

    @property
    def pid(self) -> int | None:
        """Id of its process, whose children belong to it."""

    def start(self) -> None:
        """Starts the service and returns at once."""

    def wait_ready(self) -> None:
        """Returns when the service has its partitions; raises CascadeError where it does not get ready."""

    def check_running(self) -> None:
        """Raises CascadeError where the service has ended."""

    def stop(self) -> LedgerSummary | bool:
        """Stops the service; returns its ledger where it has one."""


class PathLatency(msgspec.Struct, frozen=True, kw_only=True):
    """Time from a transaction's scheduled departure until its decision is visible, ms; `curve`: by quantile."""

    count: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    curve: dict[str, float]


@dataclass(frozen=True, slots=True)
class OpenLoop(Generic[Reading]):
    """What was seen of the transactions that were due after the warm-up.

    `counted`: their number. `latency_s` (float64, [decided]): from scheduled departure to visible decision. `path`
    (int64, [decided]): as in `bench.observer`. `before`, `after`: the caller's readings, after the warm-up and when the
    broker has the last transaction. `load`: how late the load was against its schedule.
    """

    counted: int
    latency_s: Float64
    path: Int64
    before: Reading
    after: Reading
    load: LoadReport

    @property
    def missing(self) -> int:
        """Transactions without a decision."""
        return self.counted - len(self.path)

    def share_of(self, *paths: str) -> float:
        """Share of the decisions with these paths, by their names in PATHS."""
        return float(np.isin(self.path, [PATHS[name] for name in paths]).mean()) if len(self.path) else 0.0

    def path_latencies(self) -> dict[str, PathLatency]:
        """Latencies by path, without those that no transaction took."""
        by_path = {name: self.latency_s[self.path == code] for name, code in PATHS.items()}
        return {name: _path_latency(latency_s) for name, latency_s in by_path.items() if len(latency_s)}


def run_open_loop(
    harness_path: Path,
    plan: Plan,
    linger_ms: int,
    warm_up_s: float,
    service: Service,
    caught_up: Callable[[], bool],
    read: Callable[[], Reading],
) -> OpenLoop[Reading]:
    """Sends the plan's messages when they are due, and observes the decisions.

    Raises CascadeError where load, observer or service fails.

    harness_path: configuration of load and observer; names the topics of the service.
    plan: messages for the transactions topic.
    linger_ms: how long the load waits for more messages before it sends.
    warm_up_s: transactions that are due earlier do not count.
    service: decides; ready.
    caught_up: whether the service has decided all that was sent.
    read: reads the counters of the service.
    """
    ends = end_offsets(load_config(harness_path), plan.topic)
    base = np.array([ends[partition_id] for partition_id in sorted(ends)], np.int64)
    with Observer(harness_path, latest=True) as observer, Load(harness_path, plan, linger_ms) as load:
        start_s = load.begin()
        time.sleep(max(start_s + warm_up_s - time.time(), 0.0))
        before = read()
        report = load.wait()
        after = read()
        give_up_s = time.monotonic() + LAST_DECISIONS_S
        while not caught_up() and time.monotonic() < give_up_s:
            service.check_running()
            time.sleep(CAUGHT_UP_POLL_S)
        time.sleep(OBSERVED_S)
        seen = observer.end()
    latency_s, path = _latencies(plan, start_s, base, seen, warm_up_s)
    return OpenLoop(int((plan.due_s >= warm_up_s).sum()), latency_s, path, before, after, report)


def _latencies(plan: Plan, start_s: float, base: Int64, seen: Observations, warm_up_s: float) -> tuple[Float64, Int64]:
    """Latency and path of the decided transactions that were due after the warm-up; seconds from departure.

    plan: the load; start_s: when it began, seconds since the epoch.
    base: end offset of each partition before the load, int64 [partitions].
    seen: the observed decisions.
    warm_up_s: from the start.
    """
    partition_ids = np.array([partition_of(key, len(base)) for key in plan.keys], np.int64)
    latency_s, paths = [], []
    for partition_id in range(len(base)):
        due_s = plan.due_s[partition_ids == partition_id]
        chosen = seen.partition == partition_id
        position = seen.offset[chosen] - base[partition_id]
        inside = (position >= 0) & (position < len(due_s))
        decided_due_s = due_s[position[inside]]
        counted = decided_due_s >= warm_up_s
        latency_s.append((seen.seen_s[chosen][inside] - start_s - decided_due_s)[counted])
        paths.append(seen.path[chosen][inside][counted])
    return np.concatenate(latency_s), np.concatenate(paths)


def _path_latency(latency_s: Float64) -> PathLatency:
    histogram = LatencyHistogram()
    histogram.record(latency_s)
    return PathLatency(
        count=histogram.count,
        p50_ms=1e3 * histogram.quantile(0.5),
        p99_ms=1e3 * histogram.quantile(0.99),
        p999_ms=1e3 * histogram.quantile(0.999),
        max_ms=1e3 * histogram.max_s,
        curve={f"{share:g}": 1e3 * histogram.quantile(share) for share in CURVE},
    )
