"""A variant's turn on its own topics: a backlog at full speed, then an open-loop load."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.embedded import EmbeddedParts, records_in
from bench.load import LoadReport, Plan, departures
from bench.open_loop import PathLatency, Service, run_open_loop
from bench.pipeline.processes import cpu_s_of, page_faults_of, suspended
from bench.pipeline.scenario import Live, Objectives, Scenario, Variant
from bench.traffic import FILL_ROWS, Traffic
from cascade.bundle import Bundle
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.ledger import LedgerSummary
from streaming.kafka import make_consumer, make_producer
from streaming.kafka.limits import LINGER_MS

# A pilot of this many transactions measures the rate, from which the length of the backlog follows.
PILOT_ROWS = 10_000
PILOT_S_MAX = 120.0
SAMPLE_S = 0.02
# A backlog that ended before it could be timed is repeated with this many times its length.
LONGER = 4
# A turn fails after this long without a new decision.
STALL_S = 20.0
CASCADE_SETTINGS: dict[str, Any] = {
    # the append times of a backlog are long past
    "deadline": {"start": "fetch", "budget_ms": 1_000},
    # overload must not lower the escalation rate that is compared
    "overload": {"factor_min": 1.0},
}
DEEP_ONLY_SETTINGS: dict[str, Any] = {
    "deadline": {"start": "fetch", "budget_ms": 60_000},
    "overload": {"factor_min": 1.0},
    "worker": {"in_flight_card_max": 4_096},
}


class LiveFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures under an open-loop load of `rate` transactions a second.

    `missing`: transactions without a decision. `load`: how late the load was against its schedule. `cpu_us`: CPU time
    of each process for a transaction, µs, waiting for work included.
    """

    rate: float
    paths: dict[str, PathLatency]
    degraded_share: float
    missing: int
    cpu_us: dict[str, float]
    load: LoadReport

    def meets(self, objectives: Objectives) -> bool:
        """Whether the objectives are met; a path without decisions meets its limit."""
        limits = {"screened": objectives.screened_p99_ms, "escalated": objectives.escalated_p99_ms}
        within = all(self.paths[path].p99_ms <= limit for path, limit in limits.items() if path in self.paths)
        return within and self.degraded_share <= objectives.degraded_share_max and not self.missing


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a turn.

    On the backlog: `per_second` decisions; `cpu_us`, CPU time for a transaction by process (`service`, `triton`,
    `broker`), µs; `page_faults_per_1000` transactions, of the service. From the service's ledger, over its whole life:
    `stages_us`, CPU time for a transaction by stage, µs, and `degraded_share` of all decisions; without a ledger empty
    and None. `highest_rate`: the highest that met the objectives; None without a search, whose runs are `tried`.
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
    """Figures at full speed; see Turn."""

    transactions: int
    per_second: float
    cpu_us: dict[str, float]
    page_faults_per_1000: float


def run_turn(
    variant: Variant,
    number: int,
    round_: int,
    scenario: Scenario,
    parts: EmbeddedParts,
    traffic: Traffic,
    bundle: Bundle,
    make_service: Callable[[Path], Service],
) -> Turn:
    """Measures a variant. Raises CascadeError where its service ends or makes no progress.

    variant: what is measured.
    number: of the turn in the run; names its topics and files.
    round_: number of the round.
    scenario: the load.
    parts: broker and Triton.
    traffic: the messages.
    bundle: models and policy of the variant.
    make_service: makes the service for a configuration file.
    """
    settings = _settings(variant, number, bundle, parts.directory / f"turn-{number}-journal")
    path = parts.write_config(f"turn-{number}.toml", settings, scenario.partitions)
    # load and observer are the same for all variants, and use the quicker client
    harness = {**settings, "kafka": {**settings["kafka"], "client": "librdkafka"}}
    harness_path = parts.write_config(f"turn-{number}-harness.toml", harness, scenario.partitions)
    steps = _Turn(variant, scenario, parts, traffic, harness_path, load_config(harness_path), make_service(path))
    return steps.run(round_)


@dataclass(slots=True)
class _Turn:
    """The steps of a turn. `harness`: configuration of load and observer; `sent`: transactions so far."""

    variant: Variant
    scenario: Scenario
    parts: EmbeddedParts
    traffic: Traffic
    harness_path: Path
    harness: Config
    service: Service
    sent: int = 0

    def run(self, round_: int) -> Turn:
        self.service.start()
        try:
            self.service.wait_ready()
            self._fill(PILOT_ROWS)
            # a JVM compiles hot code while it runs, so the first backlog does not count
            warm_up = self._backlog(self._pilot())
            backlog = self._backlog(warm_up.per_second)
            live: LiveFigures | None = None
            highest, tried = None, list[LiveFigures]()
            load = self.scenario.live
            if load is not None and self.variant.live:
                rate = load.rate or min(load.share * backlog.per_second, load.rate_max)
                live = self._live(rate, load.seconds, load)
                highest, tried = self._highest(load, backlog.per_second)
        finally:
            stopped = self.service.stop()
        ledger = stopped if isinstance(stopped, LedgerSummary) else None
        stages = {} if ledger is None else ledger.stages
        return Turn(
            variant=self.variant.name,
            round=round_,
            **backlog._asdict(),
            stages_us={name: stage.cpu_us_per_transaction or 0.0 for name, stage in stages.items()},
            live=live,
            highest_rate=highest,
            tried=tried,
            degraded_share=None if ledger is None else ledger.degraded_share,
        )

    # --- full speed ---------------------------------------------------------------------------------------------------

    def _pilot(self) -> float:
        """Decisions a second of the pilot, from the first decision on."""
        with closing(make_consumer(self.harness.kafka, None)) as consumer:
            seen = self._watch(consumer, self.sent, PILOT_S_MAX)
        started = next((sample for sample in seen if sample[1] > 0), seen[-1])
        return max(seen[-1][1] - started[1], 1) / max(seen[-1][0] - started[0], SAMPLE_S)

    def _backlog(self, pilot_rate: float) -> _Backlog:
        """Figures of a backlog that takes about the scenario's time at `pilot_rate`."""
        backlog = self.scenario.backlog
        rows = int(min(backlog.transactions_max, max(pilot_rate * backlog.seconds, PILOT_ROWS)))
        while (measured := self._backlog_of(rows)) is None:
            if rows == backlog.transactions_max:
                raise CascadeError(f"{self.variant.name}: decided {rows:,} transactions before they could be timed")
            rows = min(LONGER * rows, backlog.transactions_max)
        return measured

    def _backlog_of(self, rows: int) -> _Backlog | None:
        """Figures of a backlog of `rows`; None where it ended between two samples."""
        before = self.sent
        # encoded before the service is suspended, which must be for less than its session timeout
        self.traffic.messages(self.variant.codec, self.sent, self.sent + rows)
        with closing(make_consumer(self.harness.kafka, None)) as consumer:
            self._watch(consumer, before, STALL_S)  # connects the consumer before the service continues
            with suspended(self.service.pid):
                self._fill(rows)
            first = before + int(rows * self.scenario.backlog.warm_up_share)
            started_s, started = self._watch(consumer, first, STALL_S)[-1]
            cpu_before, faults_before = self._cpu_s(), page_faults_of([self.service.pid])
            ended_s, ended = self._watch(consumer, self.sent, STALL_S)[-1]
            cpu_after, faults_after = self._cpu_s(), page_faults_of([self.service.pid])
        if ended < self.sent:
            raise CascadeError(
                f"{self.variant.name}: {ended:,} of {self.sent:,} decisions, and no new one for {STALL_S:.0f} s"
            )
        count = ended - started
        if not count:
            return None
        cpu_us = {name: 1e6 * (cpu_after[name] - cpu_before[name]) / count for name in cpu_before}
        return _Backlog(count, count / (ended_s - started_s), cpu_us, 1e3 * (faults_after - faults_before) / count)

    def _watch(self, consumer: Any, until: int, stall_s: float) -> list[tuple[float, int]]:
        """Samples of (time, decisions) until the topic has `until` decisions, or gets none for `stall_s`."""
        topics = self.harness.kafka.topics
        partitions = consumer.partitions_for(topics.decisions)
        seen = [(time.monotonic(), 0)]
        moved_s = time.monotonic()
        while True:
            self.service.check_running()
            count = sum(consumer.end_offsets(partitions).values())
            now_s = time.monotonic()
            if count != seen[-1][1]:
                moved_s = now_s
            seen.append((now_s, count))
            if count >= until or now_s - moved_s > stall_s:
                return seen
            time.sleep(SAMPLE_S)

    def _fill(self, rows: int) -> None:
        topic = self.harness.kafka.topics.transactions
        keys, values = self.traffic.messages(self.variant.codec, self.sent, self.sent + rows)
        producer = make_producer(self.harness.kafka)
        try:
            for start in range(0, rows, FILL_ROWS):
                producer.send_many(topic, keys[start : start + FILL_ROWS], values[start : start + FILL_ROWS])
        finally:
            producer.close(60.0)
        self.sent += rows

    def _cpu_s(self) -> dict[str, float]:
        triton, broker = self.parts.triton, self.parts.broker
        found = {"service": cpu_s_of([self.service.pid])}
        if triton is not None and self.variant.backend == "triton":
            found["triton"] = cpu_s_of([triton.pid])
        if broker is not None:
            found["broker"] = cpu_s_of(broker.pids)
        return found

    # --- open-loop load -----------------------------------------------------------------------------------------------

    def _live(self, rate: float, seconds: float, shape: Live) -> LiveFigures:
        """Figures under a load of `rate` for `seconds`, with the arrivals and the warm-up of `shape`."""
        due_s = departures(shape.arrivals, rate, seconds + shape.warm_up_s, self.scenario.seed)
        keys, values = self.traffic.messages(self.variant.codec, self.sent, self.sent + len(due_s))
        plan = Plan(self.harness.kafka.topics.transactions, due_s, keys, values)
        expected = self._decisions() + len(due_s)

        def caught_up() -> bool:
            return self._decisions() >= expected

        run = run_open_loop(self.harness_path, plan, LINGER_MS, shape.warm_up_s, self.service, caught_up, self._cpu_s)
        self.sent += len(due_s)
        return LiveFigures(
            rate=rate,
            paths=run.path_latencies(),
            degraded_share=run.share_of("degraded"),
            missing=run.missing,
            cpu_us={name: 1e6 * (run.after[name] - run.before[name]) / max(run.counted, 1) for name in run.before},
            load=run.load,
        )

    def _decisions(self) -> int:
        return records_in(self.harness, self.harness.kafka.topics.decisions)

    def _highest(self, shape: Live, per_second: float) -> tuple[float | None, list[LiveFigures]]:
        """The highest rate that meets the objectives, by bisection between 0 and full speed, and its runs."""
        search, tried = self.scenario.highest, list[LiveFigures]()
        low, high = 0.0, min(per_second, shape.rate_max)
        for _ in range(search.steps):
            figures = self._live((low + high) / 2, search.seconds, shape)
            tried.append(figures)
            if figures.meets(self.scenario.objectives):
                low = figures.rate
            else:
                high = figures.rate
        return (low if search.steps else None), tried


def _settings(variant: Variant, number: int, bundle: Bundle, journal: Path) -> dict[str, dict[str, Any]]:
    """The configuration of a turn's service; `journal`: directory of its ledger, if it is full."""
    topics = {topic: f"turn-{number}-{topic}" for topic in ("transactions", "labels", "decisions", "dead_letters")}
    settings: dict[str, dict[str, Any]] = dict(
        DEEP_ONLY_SETTINGS if variant.models == "deep-only" else CASCADE_SETTINGS
    )
    settings["bundle"] = {"path": str(bundle.directory)}
    kafka = {"client": variant.client, "codec": variant.codec, "group": f"turn-{number}", "topics": topics}
    settings["kafka"] = kafka
    if variant.backend == "onnxruntime":
        settings["deep"] = {"backend": "onnxruntime"}
    if variant.ledger == "full":
        settings["ledger"] = {"directory": str(journal), "interval_s": 1.0}
        settings["carbon"] = {"region": "DEU"}
    if variant.processes > 1:
        settings["worker"] = settings.get("worker", {}) | {"processes": variant.processes}
        settings["terminals"] = {"share": True}
    return settings
