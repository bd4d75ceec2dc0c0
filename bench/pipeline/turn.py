"""One variant's turn: a backlog at full speed, then transactions as they arrive, on topics of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from bench.cluster import EndlessData
from bench.embedded import EmbeddedParts, Settings, records_in
from bench.load import Load, LoadReport, Plan, departures
from bench.observer import DEEP, DEGRADED, SCREENED, Observations, Observer
from bench.pipeline.processes import Held, cpu_s_of, page_faults_of
from bench.pipeline.scenario import Live, Objectives, Scenario, Variant
from cascade.bundle import Bundle
from cascade.columns import Float64, Int64
from cascade.config import CodecName, Config, load_config
from cascade.errors import CascadeError
from cascade.ledger import LedgerSummary
from cascade.ledger.latency import LatencyHistogram
from cascade.schema import Schema
from streaming.clients import make_consumer, make_producer
from streaming.clients.partitioning import partition_of
from streaming.codecs import codec
from streaming.decisions import message_keys

# So many first: their rate says how many more make a backlog of the wanted length.
PILOT_ROWS = 10_000
PILOT_S_MAX = 120.0
FILL_ROWS = 20_000
SAMPLE_S = 0.02
# A backlog that was over before it could be timed is followed by one of so many times its length.
LONGER = 4
# Without a new decision for so long, a turn is over.
STALL_S = 20.0
# After the last departure; what has no decision by then is counted as missing.
LAST_DECISIONS_S = 15.0
PATHS = {"screened": SCREENED, "escalated": DEEP, "degraded": DEGRADED}
CURVE = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 1.0)
CASCADE_SETTINGS: dict[str, Any] = {
    # a backlog's append times are long past
    "deadline": {"start": "fetch", "budget_ms": 1_000},
    # what is measured is the variant's own rate of escalation
    "overload": {"raise_max": 0.0},
}
DEEP_ONLY_SETTINGS: dict[str, Any] = {
    "deadline": {"start": "fetch", "budget_ms": 60_000},
    "overload": {"raise_max": 0.0},
    "worker": {"in_flight_card_max": 4_096},
}


class Service(Protocol):
    """What a turn measures: a process that reads transactions and writes decisions."""

    @property
    def pid(self) -> int | None:
        """Its process, whose children belong to it."""
        ...

    def start(self) -> None:
        """Start it and return at once."""
        ...

    def wait_ready(self) -> None:
        """Return once it has its partitions; raises CascadeError where it does not come up."""
        ...

    def check_running(self) -> None:
        """Raise CascadeError where it has ended."""
        ...

    def stop(self) -> LedgerSummary | None:
        """End it; its own ledger, where it keeps one."""
        ...


class PathLatency(msgspec.Struct, frozen=True, kw_only=True):
    """From a transaction's scheduled departure until its decision is visible, ms; `curve`: by share of decisions."""

    count: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    curve: dict[str, float]


class LiveFigures(msgspec.Struct, frozen=True, kw_only=True):
    """As they arrive, at `rate` a second. `missing`: without a decision; `load`: how well the schedule was kept.

    `cpu_us`: CPU time of each process a transaction, µs, waiting for work included.
    """

    rate: float
    paths: dict[str, PathLatency]
    degraded_share: float
    missing: int
    cpu_us: dict[str, float]
    load: LoadReport

    def meets(self, wanted: Objectives) -> bool:
        """Whether it keeps the objectives; a path without decisions keeps its own."""
        limits = {"screened": wanted.screened_p99_ms, "escalated": wanted.escalated_p99_ms}
        within = all(self.paths[path].p99_ms <= limit for path, limit in limits.items() if path in self.paths)
        return within and self.degraded_share <= wanted.degraded_share_max and not self.missing


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn showed.

    `per_second`: decisions a second on the backlog; `cpu_us`: CPU time a transaction there, µs, by process (`service`,
    `triton`, `broker`); `page_faults_per_1000` transactions there, of the service. Where the service keeps a ledger,
    over its whole life: `stages_us`, its CPU time by stage, and `degraded_share`, of what should have been asked of the
    deep model and was not.
    `highest_rate`: the highest that met the objectives, with `tried` the runs that found it; None where not asked for.
    """

    variant: str
    round: int
    transactions: int
    per_second: float
    cpu_us: dict[str, float]
    stages_us: dict[str, float]
    live: LiveFigures | None
    highest_rate: float | None
    tried: list[LiveFigures]
    degraded_share: float | None = None
    page_faults_per_1000: float | None = None


class _Backlog(NamedTuple):
    """Decided at full speed; see Turn."""

    transactions: int
    per_second: float
    cpu_us: dict[str, float]
    page_faults_per_1000: float


@dataclass(slots=True)
class Traffic:
    """Endless transactions of a schema, and as messages; what was encoded once is kept for the next turn."""

    schema: Schema
    rows: EndlessData
    bytes_max: int = 65_536
    _kept: dict[CodecName, tuple[list[bytes], list[bytes]]] = field(default_factory=dict)

    def messages(self, name: CodecName, start: int, stop: int) -> tuple[list[bytes], list[bytes]]:
        """Keys and values of transactions at these positions."""
        keys, values = self._kept.setdefault(name, ([], []))
        encoder = codec(name, self.schema.fields, self.bytes_max)
        while len(values) < stop:
            batch = self.rows.rows(len(values), len(values) + FILL_ROWS).batch
            keys += message_keys(batch[self.schema.roles.card])
            values += encoder.encode(batch)
        return keys[start:stop], values[start:stop]


def run_turn(
    variant: Variant, number: int, round_: int, scenario: Scenario, parts: EmbeddedParts, traffic: Traffic,
    bundle: Bundle, make_service: Callable[[Path], Service],
) -> Turn:  # fmt: skip
    """Measure a variant once. Raises CascadeError where its service ends or stands still."""
    name, journal = f"turn-{number}", parts.directory / f"turn-{number}-journal"
    path = parts.write_config(f"{name}.toml", _settings(variant, number, bundle, journal), scenario.partitions)
    # load and observer are the same for all: the quicker client
    at = _settings(variant, number, bundle, journal, eyes=True)
    eyes = parts.write_config(f"{name}-eyes.toml", at, scenario.partitions)
    turn = _Turn(variant, scenario, parts, traffic, load_config(eyes), eyes, make_service(path))
    return turn.run(round_)


class _Turn:
    def __init__(
        self, variant: Variant, scenario: Scenario, parts: EmbeddedParts, traffic: Traffic, eyes: Config,
        eyes_path: Path, service: Service,
    ) -> None:  # fmt: skip
        self._variant, self._scenario, self._parts, self._traffic = variant, scenario, parts, traffic
        self._eyes, self._eyes_path, self._service = eyes, eyes_path, service
        self._sent = 0
        self._partitions = scenario.partitions

    def run(self, round_: int) -> Turn:
        self._service.start()
        try:
            self._service.wait_ready()
            self._fill(PILOT_ROWS)
            # a JVM compiles what it has seen often: the first backlog is not counted
            warm = self._backlog(self._pilot())
            found = self._backlog(warm.per_second)
            live: LiveFigures | None = None
            highest, tried = None, list[LiveFigures]()
            wanted = self._scenario.live
            if wanted is not None and self._variant.live:
                rate = wanted.rate or min(wanted.share * found.per_second, wanted.rate_max)
                live = self._live(wanted, rate, wanted.seconds, wanted.warm_up_s)
                highest, tried = self._highest(wanted, found.per_second)
        finally:
            ledger = self._service.stop()
        stages = {} if ledger is None else ledger.stages
        return Turn(
            variant=self._variant.name, round=round_, transactions=found.transactions, per_second=found.per_second,
            cpu_us=found.cpu_us, page_faults_per_1000=found.page_faults_per_1000,
            stages_us={name: one.cpu_us_per_transaction or 0.0 for name, one in stages.items()},
            live=live, highest_rate=highest, tried=tried,
            degraded_share=None if ledger is None else ledger.degraded_share,
        )  # fmt: skip

    # --- full speed ---------------------------------------------------------------------------------------------------

    def _pilot(self) -> float:
        """Decisions a second of the first transactions, from the first decision on."""
        with closing(make_consumer(self._eyes.kafka, None)) as consumer:
            seen = self._watch(consumer, self._sent, PILOT_S_MAX)
        started = next((one for one in seen if one[1] > 0), seen[-1])
        return max(seen[-1][1] - started[1], 1) / max(seen[-1][0] - started[0], SAMPLE_S)

    def _backlog(self, pilot_rate: float) -> _Backlog:
        """A backlog laid down while the service is held."""
        wanted = self._scenario.backlog
        rows = int(min(wanted.transactions_max, max(pilot_rate * wanted.seconds, PILOT_ROWS)))
        while (measured := self._backlog_of(rows)) is None:
            if rows == wanted.transactions_max:
                raise CascadeError(f"{self._variant.name}: decided {rows:,} transactions before they could be timed")
            rows = min(LONGER * rows, wanted.transactions_max)
        return measured

    def _backlog_of(self, rows: int) -> _Backlog | None:
        """None where all was over between two looks."""
        before = self._sent
        # encoded beforehand: a group misses members that are held for longer than its session
        self._traffic.messages(self._variant.codec, self._sent, self._sent + rows)
        with closing(make_consumer(self._eyes.kafka, None)) as consumer:
            self._watch(consumer, before, STALL_S)  # connected before the service goes on
            with Held(self._service.pid):
                self._fill(rows)
            first = before + int(rows * self._scenario.backlog.warm_up_share)
            started_s, started = self._watch(consumer, first, STALL_S)[-1]
            cpu_before, faults_before = self._cpu_s(), page_faults_of([self._service.pid])
            ended_s, ended = self._watch(consumer, self._sent, STALL_S)[-1]
            cpu_after, faults_after = self._cpu_s(), page_faults_of([self._service.pid])
        if ended < self._sent:
            raise CascadeError(f"{self._variant.name}: {ended:,} of {self._sent:,} decisions, and no more")
        count = ended - started
        if not count:
            return None
        cpu_us = {name: 1e6 * (cpu_after[name] - cpu_before[name]) / count for name in cpu_before}
        return _Backlog(count, count / (ended_s - started_s), cpu_us, 1e3 * (faults_after - faults_before) / count)

    def _watch(self, consumer: Any, until: int, stall_s: float) -> list[tuple[float, int]]:
        """(time, decisions) now and then, until there are so many, or no more come."""
        topics = self._eyes.kafka.topics
        partitions = consumer.partitions_for(topics.decisions)
        seen = [(time.monotonic(), 0)]
        moved_s = time.monotonic()
        while True:
            self._service.check_running()
            count = sum(consumer.end_offsets(partitions).values())
            now_s = time.monotonic()
            if count != seen[-1][1]:
                moved_s = now_s
            seen.append((now_s, count))
            if count >= until or now_s - moved_s > stall_s:
                return seen
            time.sleep(SAMPLE_S)

    def _fill(self, rows: int) -> None:
        topic = self._eyes.kafka.topics.transactions
        keys, values = self._traffic.messages(self._variant.codec, self._sent, self._sent + rows)
        producer = make_producer(self._eyes.kafka)
        try:
            for start in range(0, rows, FILL_ROWS):
                producer.send_many(topic, keys[start : start + FILL_ROWS], values[start : start + FILL_ROWS])
        finally:
            producer.close(60.0)
        self._sent += rows

    def _cpu_s(self) -> dict[str, float]:
        triton, broker = self._parts.triton, self._parts.broker
        found = {"service": cpu_s_of([self._service.pid])}
        if triton is not None and self._variant.backend == "triton":
            found["triton"] = cpu_s_of([triton.pid])
        if broker is not None:
            found["broker"] = cpu_s_of(broker.pids)
        return found

    # --- as they arrive -----------------------------------------------------------------------------------------------

    def _live(self, wanted: Live, rate: float, seconds: float, warm_up_s: float) -> LiveFigures:
        due_s = departures(wanted.arrivals, rate, seconds + warm_up_s, self._scenario.seed)
        keys, values = self._traffic.messages(self._variant.codec, self._sent, self._sent + len(due_s))
        base = self._ends()
        before = records_in(self._eyes, self._eyes.kafka.topics.decisions)
        plan = Plan(self._eyes.kafka.topics.transactions, due_s, keys, values)
        with Observer(self._eyes_path, latest=True) as observer, Load(self._eyes_path, plan) as load:
            start_s = load.begin()
            time.sleep(max(start_s + warm_up_s - time.time(), 0.0))
            cpu_before = self._cpu_s()
            report = load.wait()
            cpu_after = self._cpu_s()
            self._sent += len(due_s)
            self._wait_for(before + len(due_s))
            seen = observer.end()
        counted = int((due_s >= warm_up_s).sum())
        latency_s, path = self._latencies(plan, start_s, base, seen, warm_up_s)
        return LiveFigures(
            rate=rate,
            paths={name: found for name, code in PATHS.items() if (found := _path_latency(latency_s[path == code]))},
            degraded_share=float((path == DEGRADED).mean()) if len(path) else 0.0,
            missing=counted - len(path),
            cpu_us={name: 1e6 * (cpu_after[name] - cpu_before[name]) / max(counted, 1) for name in cpu_before},
            load=report,
        )

    def _highest(self, wanted: Live, per_second: float) -> tuple[float | None, list[LiveFigures]]:
        """The highest rate that meets the objectives, by halving between nothing and full speed."""
        steps, tried = self._scenario.highest, list[LiveFigures]()
        low, high = 0.0, min(per_second, wanted.rate_max)
        for _ in range(steps.steps):
            figures = self._live(wanted, (low + high) / 2, steps.seconds, wanted.warm_up_s)
            tried.append(figures)
            if figures.meets(self._scenario.objectives):
                low = figures.rate
            else:
                high = figures.rate
        return (low if steps.steps else None), tried

    def _ends(self) -> Int64:
        with closing(make_consumer(self._eyes.kafka, None)) as consumer:
            ends = consumer.end_offsets(consumer.partitions_for(self._eyes.kafka.topics.transactions))
        return np.array([ends[one] for one in sorted(ends)], np.int64)

    def _wait_for(self, decisions: int) -> None:
        give_up_s = time.monotonic() + LAST_DECISIONS_S
        while records_in(self._eyes, self._eyes.kafka.topics.decisions) < decisions:
            self._service.check_running()
            if time.monotonic() > give_up_s:
                return
            time.sleep(0.1)
        time.sleep(0.3)  # the observer's last fetch

    def _latencies(
        self, plan: Plan, start_s: float, base: Int64, seen: Observations, warm_up_s: float
    ) -> tuple[Float64, Int64]:
        """Seconds from departure to decision, and the path, of what was due after the warm-up."""
        number = np.array([partition_of(key, self._partitions) for key in plan.keys], np.int64)
        due = [plan.due_s[number == one] for one in range(self._partitions)]
        latency_s, paths = [], []
        for one in range(self._partitions):
            chosen = seen.partition == one
            position = seen.offset[chosen] - base[one]
            inside = (position >= 0) & (position < len(due[one]))
            due_s = due[one][position[inside]]
            kept = due_s >= warm_up_s
            latency_s.append((seen.seen_s[chosen][inside] - start_s - due_s)[kept])
            paths.append(seen.path[chosen][inside][kept])
        return np.concatenate(latency_s), np.concatenate(paths)


def _path_latency(latency_s: Float64) -> PathLatency | None:
    if not len(latency_s):
        return None
    histogram = LatencyHistogram()
    histogram.record(latency_s)
    return PathLatency(
        count=histogram.count, p50_ms=1e3 * histogram.quantile(0.5), p99_ms=1e3 * histogram.quantile(0.99),
        p999_ms=1e3 * histogram.quantile(0.999), max_ms=1e3 * histogram.max_s,
        curve={f"{share:g}": 1e3 * histogram.quantile(share) for share in CURVE},
    )  # fmt: skip


def _settings(variant: Variant, number: int, bundle: Bundle, journal: Path, eyes: bool = False) -> Settings:
    """A turn's configuration; `eyes`: of load and observer, which read and write the same topics."""
    names = {one: f"turn-{number}-{one}" for one in ("transactions", "labels", "decisions", "dead_letters")}
    settings: dict[str, Any] = dict(DEEP_ONLY_SETTINGS if variant.models == "deep-only" else CASCADE_SETTINGS)
    settings["bundle"] = {"path": str(bundle.directory)}
    settings["kafka"] = {
        "client": "librdkafka" if eyes else variant.client, "codec": variant.codec, "group": f"turn-{number}",
        "topics": names,
    }  # fmt: skip
    if variant.backend == "onnxruntime":
        settings["deep"] = {"backend": "onnxruntime"}
    if variant.ledger == "full":
        settings["ledger"] = {"directory": str(journal), "interval_s": 1.0}
        settings["carbon"] = {"region": "DEU"}
    if variant.processes > 1:
        settings["worker"] = settings.get("worker", {}) | {"processes": variant.processes}
        settings["terminals"] = {"share": True}
    return settings
