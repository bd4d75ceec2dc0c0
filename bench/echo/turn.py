"""A variant's turn at one rate, on topics of its own: start, warm-up, an open-loop load, and a time without traffic."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from bench.cluster import committed_offsets, end_offsets
from bench.echo.variants import Variant
from bench.embedded import EmbeddedParts, new_names
from bench.load import LoadReport, Plan
from bench.open_loop import PathLatency, Service, run_open_loop
from bench.pipeline.processes import Switches, cpu_s_of, switches_between, switches_of
from cascade.bundle import Bundle
from cascade.columns import Float64
from cascade.config import load_config

PARTITIONS = 1
# Of the load: a millisecond would be as much as the echo's whole latency.
LINGER_MS = 0
# After the last decision: what follows it, the last commit for example, is no part of the idle time.
IDLE_AFTER_S = 2.0
# Overload must not lower the escalation rate that is compared; all else is as shipped.
SETTINGS: dict[str, Any] = {"overload": {"factor_min": 1.0}}


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """A process without traffic for `seconds`: `core_share`, its CPU time as a share of a core, and switches."""

    seconds: float
    core_share: float
    voluntary_per_s: float
    involuntary_per_s: float


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a turn.

    Of the process and its children, for a transaction: `cpu_us`, user and system time, µs; `voluntary` and
    `involuntary`, context switches of all threads. Of the `counted` transactions: `paths`, latencies by path;
    `escalated_share`, degraded ones included; `degraded_share`; `missing`, without a decision. `load`: how late the
    load was against its schedule. `idle`: None where it was not measured.
    """

    variant: str
    round: int
    rate: float
    counted: int
    cpu_us: float
    voluntary: float
    involuntary: float
    paths: dict[str, PathLatency]
    escalated_share: float
    degraded_share: float
    missing: int
    load: LoadReport
    idle: Idle | None


@dataclass(frozen=True, slots=True)
class RateLoad:
    """The load at a rate.

    rate: transactions a second.
    warm_up_s: transactions that are due earlier do not count.
    due_s, keys, values: see Plan.
    bundle: escalates the wanted share of these transactions.
    """

    rate: float
    warm_up_s: float
    due_s: Float64
    keys: list[bytes]
    values: list[bytes]
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children have used so far; see `bench.pipeline.processes`."""

    taken_s: float
    cpu_s: float
    switches: dict[int, Switches]

    @classmethod
    def of(cls, service: Service) -> Self:
        """The present usage."""
        return cls(time.monotonic(), cpu_s_of([service.pid]), switches_of([service.pid]))


def run_turn(variant: Variant, round_: int, load: RateLoad, parts: EmbeddedParts, idle_s: float) -> Turn:
    """Measures a variant. Raises CascadeError where its process ends or does not get ready.

    variant: what is measured.
    round_: number of the round.
    load: the load.
    parts: broker and Triton.
    idle_s: duration of the time without traffic afterwards; 0: none.
    """
    config_path, harness_path = _write_configs(variant, load.bundle, parts)
    harness = load_config(harness_path)
    topic = harness.kafka.topics.transactions
    service = variant.service(config_path)

    def caught_up() -> bool:
        return committed_offsets(harness) == end_offsets(harness, topic)

    service.start()
    try:
        service.wait_ready()
        plan = Plan(topic, load.due_s, load.keys, load.values)
        run = run_open_loop(
            harness_path, plan, LINGER_MS, load.warm_up_s, service, caught_up, lambda: Usage.of(service)
        )
        idle = _idle(service, idle_s) if idle_s else None
        service.check_running()
    finally:
        service.stop()
    switches = switches_between(run.before.switches, run.after.switches)
    return Turn(
        variant=variant.name,
        round=round_,
        rate=load.rate,
        counted=run.counted,
        cpu_us=1e6 * (run.after.cpu_s - run.before.cpu_s) / run.counted,
        voluntary=switches.voluntary / run.counted,
        involuntary=switches.involuntary / run.counted,
        paths=run.path_latencies(),
        escalated_share=run.share_of("escalated", "degraded"),
        degraded_share=run.share_of("degraded"),
        missing=run.missing,
        load=run.load,
        idle=idle,
    )


def _write_configs(variant: Variant, bundle: Bundle, parts: EmbeddedParts) -> tuple[Path, Path]:
    """Configuration files with new topics: of the service; and of load and observer, always on librdkafka."""
    settings = {**SETTINGS, **variant.settings(), "bundle": {"path": str(bundle.directory)}}
    kafka = {**settings["kafka"], **new_names()}
    name = f"{variant.name.replace(', ', '-')}-{kafka['group']}"
    service = parts.write_config(f"{name}.toml", {**settings, "kafka": kafka}, PARTITIONS)
    harness = {**settings, "kafka": {**kafka, "client": "librdkafka"}}
    return service, parts.write_config(f"{name}-harness.toml", harness, PARTITIONS)


def _idle(service: Service, seconds: float) -> Idle:
    time.sleep(IDLE_AFTER_S)
    before = Usage.of(service)
    time.sleep(seconds)
    after = Usage.of(service)
    elapsed_s, switches = after.taken_s - before.taken_s, switches_between(before.switches, after.switches)
    return Idle(
        seconds=elapsed_s,
        core_share=(after.cpu_s - before.cpu_s) / elapsed_s,
        voluntary_per_s=switches.voluntary / elapsed_s,
        involuntary_per_s=switches.involuntary / elapsed_s,
    )
