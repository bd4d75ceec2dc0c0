"""`cascade doctor`: checks everything that the service needs. Each failed check has its remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console

from cascade.bundle import Bundle, load_bundle
from cascade.config import Config, load_config, with_config_path
from cascade.errors import BrokerError, CascadeError
from cascade.ledger import find_meters, watts_per_core
from stages.assembly import deep_signature, make_deep_stage, make_engine
from stages.deep import local_triton
from stages.deep.answers import probe_inputs
from streaming.codecs.schema_sources import make_schemas
from streaming.kafka import client_named, local_broker, make_consumer, make_producer
from streaming.kafka.topics import missing_topics, wait_for_broker
from streaming.pipeline.dead_letters import HEADER_PREFIX
from streaming.pipeline.deep_replicas import replica_states, replicas_text
from streaming.service.locked_memory import REMEDY, locking_problem
from streaming.service.topics import topic_specs
from streaming.worker.files import FsspecFiles
from streaming.worker.snapshots import SUFFIX

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Status = Literal["ok", "warning", "failed"]
MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}
# Deadlines count from the broker's clock: an error of this size is a fifth of the screened limit.
CLOCK_SKEW_MS_MAX = 100.0
# The service needs a few dozen: sockets to brokers and Triton, model files, the log. A lower limit is a mistake.
OPEN_FILES_MIN = 1_024
FREE_BYTES_MIN = 1 << 30
PROBE_TIMEOUT_S = 10.0
# The doctor asks for this schema to see whether the registry answers; no registry has so many.
SCHEMA_NUMBER_MAX = 2**31 - 1
# The timestamp of the doctor's record. If it is read back, the topic has CreateTime.
UNSTAMPED_MS = 1


class Finding(msgspec.Struct, frozen=True):
    """The result of a check."""

    check: str
    status: Status
    text: str


class _NotCheckedError(Exception):
    """A check needs the result of one that failed."""


@dataclass(slots=True)
class Examination:
    """The results that later checks need; reading one that is absent raises _NotCheckedError."""

    config_path: Path
    loaded: Config | None = None
    read_bundle: Bundle | None = None
    broker_answers: bool = False

    @property
    def config(self) -> Config:
        """The configuration."""
        if self.loaded is None:
            raise _NotCheckedError("not checked: the configuration must be valid first")
        return self.loaded

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        if self.read_bundle is None:
            raise _NotCheckedError("not checked: the bundle must be readable first")
        return self.read_bundle

    @property
    def reached(self) -> Config:
        """The configuration of a broker that answers."""
        if not self.broker_answers:
            raise _NotCheckedError("not checked: the broker must answer first")
        return self.config


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="Configuration file of the service.")] = Path("cascade.toml"),
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check configuration, bundle, broker, topics, schemas, clocks, Triton, model, energy meters and limits.

    Exit status: 0 if the service can run, 1 if a check failed.
    """
    console = Console(stderr=json)
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not json:
            console.print(
                f"{MARKS[finding.status]} {finding.check:<14} {finding.text}", soft_wrap=True, highlight=False
            )
    if json:
        print(msgspec.json.encode(findings).decode())
    if any(finding.status == "failed" for finding in findings):
        raise typer.Exit(1)


def examine(config_path: Path) -> Iterator[Finding]:
    """Runs all checks, in an order in which each failure is reported once, at its cause."""
    found = Examination(config_path)
    checks: dict[str, Callable[[Examination], tuple[Status, str]]] = {
        "configuration": _configuration,
        "bundle": _bundle,
        "client": _client,
        "broker": _broker,
        "topics": _topics,
        "messages": _messages,
        "clock": _clock,
        "delivery": _delivery,
        "state": _state,
        "deep model": _deep_model,
        "energy": _energy,
        "limits": _limits,
        "local parts": _local_parts,
    }
    for name, check in checks.items():
        try:
            with with_config_path(config_path):
                status, text = check(found)
        except _NotCheckedError as error:
            status, text = "warning", str(error)
        except CascadeError as error:
            status, text = "failed", str(error)
        yield Finding(name, status, text)


def _configuration(found: Examination) -> tuple[Status, str]:
    found.loaded = load_config(found.config_path)
    return "ok", str(found.config_path)


def _bundle(found: Examination) -> tuple[Status, str]:
    bundle = load_bundle(Path(found.config.bundle.path))
    engine = make_engine(bundle)
    found.read_bundle = bundle
    state_gb = engine.features.state_bytes_max() / 1e9
    return "ok", (
        f"{bundle.version}: screener by {engine.screener_method}, {engine.features.width} features, state of at most"
        f" {state_gb:.1f} GB ({bundle.spec.limits.keys_max:,} keys)"
    )


def _client(found: Examination) -> tuple[Status, str]:
    name = found.config.kafka.client
    client = client_named(name)
    version = importlib.metadata.version(client.distribution)
    if client.limits:
        return "warning", f"{name}, by {client.distribution} {version}: {client.limits}"
    return "ok", f"{name}, by {client.distribution} {version}"


def _broker(found: Examination) -> tuple[Status, str]:
    wait_for_broker(found.config.kafka, PROBE_TIMEOUT_S, lambda text: None)
    found.broker_answers = True
    return "ok", f"Kafka answers at {found.config.kafka.bootstrap} ({found.config.kafka.security.protocol})"


def _topics(found: Examination) -> tuple[Status, str]:
    config = found.reached
    names = [spec.name for spec in topic_specs(config, 1)]
    missing = missing_topics(config.kafka, names)
    if missing:
        return "failed", f"missing: {', '.join(missing)}; `cascade topics --partitions N` creates them"
    with closing(make_consumer(config.kafka, None)) as consumer:
        partitions = {name: len(consumer.partitions_for(name)) for name in names}
    return "ok", ", ".join(f"{name} ({count})" for name, count in partitions.items())


def _messages(found: Examination) -> tuple[Status, str]:
    """A codec with schemas needs the schema registry: it must answer, and accept this user."""
    kafka = found.config.kafka
    if not kafka.uses_schemas:
        return "ok", f"{kafka.codec}, without a schema registry"
    make_schemas(kafka.schema_registry, kafka.topics.decisions).text(SCHEMA_NUMBER_MAX)
    if kafka.schema_registry.directory:
        return "ok", f"{kafka.codec}, schemas in {kafka.schema_registry.directory}"
    return "ok", f"{kafka.codec}, the schema registry at {kafka.schema_registry.url} answers"


def _clock(found: Examination) -> tuple[Status, str]:
    """Produces a record, consumes it, and compares the broker's append time with this machine's clock."""
    config = found.reached
    topic = config.kafka.topics.dead_letters
    if missing_topics(config.kafka, [topic]):
        return "warning", "not checked: the topics must exist first"
    sent_ms, acknowledged_ms, appended_ms = _append_time(config, topic)
    if appended_ms == UNSTAMPED_MS:
        return "warning", (
            f"topic {topic} has its producers' timestamps, so the clocks cannot be compared; set message.timestamp.type"
            " to LogAppendTime for this topic and the transactions topic"
        )
    # clocks that agree show the append between both
    skew_ms = appended_ms - min(max(appended_ms, sent_ms), acknowledged_ms)
    if abs(skew_ms) > CLOCK_SKEW_MS_MAX:
        return "failed", (
            f"the broker's clock differs from this machine's by {skew_ms:+.0f} ms; deadlines count from the broker's"
            " append times: synchronise both clocks (chrony, ntpd)"
        )
    return "ok", f"a record was produced and consumed; the broker's clock differs by {skew_ms:+.0f} ms"


def _append_time(config: Config, topic: str) -> tuple[float, float, float]:
    """When a marked dead letter was sent and acknowledged, and its timestamp, in ms."""
    producer, consumer = make_producer(config.kafka), make_consumer(config.kafka, None)
    try:
        partitions = consumer.partitions_for(topic)
        consumer.assign(partitions)
        for partition, end in consumer.end_offsets(partitions).items():
            consumer.seek(partition, end)
        headers = [(f"{HEADER_PREFIX}reason", b"doctor")]
        before_ms = time.time() * 1e3
        producer.send(topic, b"doctor", b"", headers, timestamp_ms=UNSTAMPED_MS)
        producer.flush(PROBE_TIMEOUT_S)
        acknowledged_ms = time.time() * 1e3
        give_up_s = time.monotonic() + PROBE_TIMEOUT_S
        while time.monotonic() < give_up_s:
            for fetched in consumer.poll(0.2, 100):
                for key, time_ms in zip(fetched.keys, fetched.timestamps_ms, strict=True):
                    if key == b"doctor":
                        return before_ms, acknowledged_ms, float(time_ms)
        raise BrokerError("a record was produced but could not be consumed; check the broker's logs")
    finally:
        producer.close(1.0)
        consumer.close()


def _delivery(found: Examination) -> tuple[Status, str]:
    """Begins and aborts a transaction: the broker must support transactions, and allow them for this user."""
    config = found.reached
    if config.delivery == "at-least-once":
        return "ok", "at-least-once: after a crash some transactions are decided again, with the same decision_id"
    producer = make_producer(config.kafka, f"{config.kafka.group}-doctor")
    try:
        producer.begin()
        producer.abort()
    finally:
        producer.close(1.0)
    name = config.kafka.instance or config.kafka.instance_env
    if not name:
        return "warning", (
            "exactly-once: a transaction was begun and aborted; kafka.instance is empty, so the open transaction of a"
            " killed worker delays readers for 15 s: set a permanent name for each worker, or kafka.instance_env"
        )
    return "ok", f"exactly-once as {name}: a transaction was begun and aborted"


def _state(found: Examination) -> tuple[Status, str]:
    """Writes a snapshot file, reads it back, and removes it."""
    url = found.config.state.snapshots
    if not url:
        return "warning", "state.snapshots is empty: each start folds the whole log"
    files, name = FsspecFiles(url), f"doctor-{os.getpid()}"
    try:
        files.write(name, b"doctor")
        same = files.read(name) == b"doctor"
        count = sum(name.endswith(SUFFIX) for name in files.names())
        files.remove(name)
    except OSError as error:
        return "failed", f"{url}: {error.strerror or error}; the service must be able to read and write there"
    if not same:
        return "failed", f"{url}: a file was read back with another content; check the store"
    return "ok", f"{url}: a file was written and read back; {count} snapshots"


def _deep_model(found: Examination) -> tuple[Status, str]:
    with closing(make_deep_stage(found.bundle, found.config.deep)) as stage:
        stage.wait_ready(PROBE_TIMEOUT_S)
        inputs = probe_inputs(deep_signature(found.bundle))
        started_s = time.perf_counter()
        stage.submit(inputs, PROBE_TIMEOUT_S).result()
        took_ms = (time.perf_counter() - started_s) * 1e3
        states = replica_states(stage)
    places = {"triton": f" {found.config.deep.url}", "onnxruntime": " in process"}
    text = f"{found.config.deep.backend}{places.get(found.config.deep.backend, '')} answers a probe in {took_ms:.1f} ms"
    if states is None:
        return "ok", text
    return "ok" if all(state.ready for state in states) else "warning", f"{text}; {replicas_text(states)}"


def _energy(found: Examination) -> tuple[Status, str]:
    energy = found.config.energy
    meters = find_meters([os.getpid()], watts_per_core(energy), registered=energy.meters)
    readings = [meter.read() for meter in meters]
    kinds = {reading.kind for reading in readings}
    sources = "; ".join(f"{reading.kind}: {reading.source}" for reading in readings)
    if kinds == {"modelled"}:
        return "warning", f"no hardware counter (NVML, RAPL), so all energy is modelled ({sources})"
    return "ok", sources


def _limits(found: Examination) -> tuple[Status, str]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = shutil.disk_usage(Path.cwd()).free
    if files < OPEN_FILES_MIN:
        return "failed", f"at most {files} open files are allowed; raise the limit to {OPEN_FILES_MIN} (ulimit -n)"
    if found.loaded is not None and found.loaded.worker.lock_memory and (problem := locking_problem()):
        return "failed", f"worker.lock_memory: {problem}; {REMEDY}"
    if free < FREE_BYTES_MIN:
        return "warning", f"only {free / 1e9:.1f} GB of disk space left in {Path.cwd()}"
    return "ok", f"{files:,} open files, {free / 1e9:.0f} GB of disk space"


def _local_parts(found: Examination) -> tuple[Status, str]:
    if importlib.util.find_spec("jgo") is None:
        return "ok", "not installed (the extra `local`); only `cascade demo` and `cascade local` need them"
    problems = (local_broker.missing_parts(), local_triton.missing_parts(), local_triton.missing_libpython())
    missing = [problem for problem in problems if problem is not None]
    if missing:
        return "warning", "; ".join(missing)
    return "ok", f"Kafka {local_broker.KAFKA_VERSION} and Triton {local_triton.TRITON_VERSION} are installed"
