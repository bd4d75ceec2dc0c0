"""`cascade doctor`: is everything in place? Each failing line says what to do."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
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
from cascade.protocols import DeepInputs
from stages.assembly import deep_signature, make_deep_stage, make_engine
from stages.deep import local_triton
from stages.deep.answers import probe_inputs
from streaming import local_broker
from streaming.clients import make_consumer, make_producer
from streaming.clients.topics import missing_topics, wait_for_broker
from streaming.codecs.schema_sources import make_schemas
from streaming.dead_letters import HEADER_PREFIX
from streaming.files import FsspecFiles
from streaming.locked_memory import REMEDY, locking_problem
from streaming.service import topic_specs
from streaming.snapshots import SUFFIX

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Status = Literal["ok", "warning", "failed"]
# Deadlines count from the broker's clock: an error of this size is a fifth of the screened limit.
CLOCK_SKEW_MS_MAX = 100.0
# Sockets to brokers and Triton, the model files, the log: a few dozen; a container with less than this is mistaken.
OPEN_FILES_MIN = 1_024
FREE_BYTES_MIN = 1 << 30
PROBE_TIMEOUT_S = 10.0
# Asked for to see whether a registry answers; none has so many.
SCHEMA_NUMBER_MAX = 2**31 - 1
# A time that no broker would stamp: where it comes back, the topic keeps its producers' times.
UNSTAMPED_MS = 1


class Finding(msgspec.Struct, frozen=True):
    """One line of the check-up."""

    check: str
    status: Status
    text: str


@dataclass(slots=True)
class Examination:
    """What the checks share: later ones need what earlier ones have found."""

    config_path: Path
    config: Config | None = None
    bundle: Bundle | None = None
    broker_answers: bool = False


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="Configuration file of the service.")] = Path("cascade.toml"),
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check configuration, bundle, broker, topics, schemas, clocks, Triton, model, energy meters and limits.

    Exit status 0 where the service can run, 1 where a line has failed.
    """
    console = Console(stderr=json)
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not json:
            mark = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}[
                finding.status
            ]
            console.print(f"{mark} {finding.check:<14} {finding.text}", soft_wrap=True, highlight=False)
    if json:
        print(msgspec.json.encode(findings).decode())
    if any(finding.status == "failed" for finding in findings):
        raise typer.Exit(1)


def examine(config_path: Path) -> Iterator[Finding]:
    """All checks, in an order in which each failure is told once, at its root."""
    found = Examination(config_path)
    checks: dict[str, Callable[[Examination], tuple[Status, str]]] = {
        "configuration": _configuration,
        "bundle": _bundle,
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
        except CascadeError as error:
            status, text = "failed", str(error)
        yield Finding(name, status, text)


def _configuration(found: Examination) -> tuple[Status, str]:
    found.config = load_config(found.config_path)
    return "ok", str(found.config_path)


def _bundle(found: Examination) -> tuple[Status, str]:
    if found.config is None:
        return "warning", "not checked: the configuration comes first"
    bundle = load_bundle(Path(found.config.bundle.path))
    engine = make_engine(bundle)
    found.bundle = bundle
    state_gb = engine.features.state_bytes_max() / 1e9
    return "ok", (
        f"{bundle.version}: screener by {engine.screener_method}, {engine.features.width} features, state of at most"
        f" {state_gb:.1f} GB ({bundle.spec.limits.keys_max:,} keys)"
    )


def _broker(found: Examination) -> tuple[Status, str]:
    if found.config is None:
        return "warning", "not checked: the configuration comes first"
    wait_for_broker(found.config.kafka, PROBE_TIMEOUT_S, lambda text: None)
    found.broker_answers = True
    return "ok", f"Kafka answers at {found.config.kafka.bootstrap} ({found.config.kafka.security.protocol})"


def _topics(found: Examination) -> tuple[Status, str]:
    if found.config is None or not found.broker_answers:
        return "warning", "not checked: the broker comes first"
    names = [spec.name for spec in topic_specs(found.config, 1)]
    missing = missing_topics(found.config.kafka, names)
    if missing:
        return "failed", f"missing: {', '.join(missing)}; `cascade run --create-topics PARTITIONS` makes them"
    consumer = make_consumer(found.config.kafka, None)
    try:
        partitions = {name: len(consumer.partitions_for(name)) for name in names}
    finally:
        consumer.close()
    return "ok", ", ".join(f"{name} ({count})" for name, count in partitions.items())


def _messages(found: Examination) -> tuple[Status, str]:
    """Avro needs its schemas: the registry must answer, and know this user."""
    if found.config is None:
        return "warning", "not checked: the configuration comes first"
    kafka = found.config.kafka
    if kafka.codec != "avro":
        return "ok", f"{kafka.codec}, without a schema registry"
    make_schemas(kafka.schema_registry, kafka.topics.decisions).text(SCHEMA_NUMBER_MAX)
    if kafka.schema_registry.directory:
        return "ok", f"avro, schemas in {kafka.schema_registry.directory}"
    return "ok", f"avro, the schema registry at {kafka.schema_registry.url} answers"


def _clock(found: Examination) -> tuple[Status, str]:
    """Produce a record, consume it again, and compare the broker's time of append with ours."""
    if found.config is None or not found.broker_answers:
        return "warning", "not checked: the broker comes first"
    topic = found.config.kafka.topics.dead_letters
    if missing_topics(found.config.kafka, [topic]):
        return "warning", "not checked: the topics come first"
    middle_ms, appended_ms = _append_time(found.config, topic)
    if appended_ms == UNSTAMPED_MS:
        return "warning", (
            f"topic {topic} keeps the producers' times, so the clocks were not compared; set message.timestamp.type"
            " to LogAppendTime there and on the transactions topic"
        )
    skew_ms = appended_ms - middle_ms
    if abs(skew_ms) > CLOCK_SKEW_MS_MAX:
        return "failed", (
            f"the broker's clock differs from ours by {skew_ms:+.0f} ms; deadlines count from its append times:"
            " synchronise both (chrony, ntpd)"
        )
    return "ok", f"a record was produced and consumed; the broker's clock differs from ours by {skew_ms:+.0f} ms"


def _append_time(config: Config, topic: str) -> tuple[float, float]:
    """(middle of our send and its confirmation, the record's time), in ms; the record is a marked dead letter."""
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
        middle_ms = (before_ms + time.time() * 1e3) / 2
        give_up_s = time.monotonic() + PROBE_TIMEOUT_S
        while time.monotonic() < give_up_s:
            for fetched in consumer.poll(0.2, 100):
                for key, time_ms in zip(fetched.keys, fetched.timestamps_ms, strict=True):
                    if key == b"doctor":
                        return middle_ms, float(time_ms)
        raise BrokerError("a record was produced but could not be consumed again; check the broker's logs")
    finally:
        producer.close(1.0)
        consumer.close()


def _delivery(found: Examination) -> tuple[Status, str]:
    """Open a transaction and undo it: the broker must have transactions, and let this user have them."""
    if found.config is None or not found.broker_answers:
        return "warning", "not checked: the broker comes first"
    if found.config.delivery == "at-least-once":
        return "ok", "at-least-once: after a crash some decisions come again, under the same decision_id"
    producer = make_producer(found.config.kafka, f"{found.config.kafka.group}-doctor")
    try:
        producer.begin()
        producer.abort()
    finally:
        producer.close(1.0)
    if not found.config.kafka.instance:
        return "warning", (
            "exactly-once: a transaction was begun and undone; kafka.instance is empty, so what a killed worker leaves"
            " open holds readers back for 15 s: give each worker a name that stays"
        )
    return "ok", f"exactly-once as {found.config.kafka.instance}: a transaction was begun and undone"


def _state(found: Examination) -> tuple[Status, str]:
    """Write a file to the snapshots' place, read it back, and remove it."""
    if found.config is None:
        return "warning", "not checked: the configuration comes first"
    place = found.config.state.snapshots
    if not place:
        return "warning", "state.snapshots is empty: each start folds the whole log"
    files, name = FsspecFiles(place), f"doctor-{os.getpid()}"
    try:
        files.write(name, b"doctor")
        same = files.read(name) == b"doctor"
        count = sum(name.endswith(SUFFIX) for name in files.names())
        files.remove(name)
    except OSError as error:
        return "failed", f"{place}: {error.strerror or error}; the service needs to write and read there"
    if not same:
        return "failed", f"{place}: what was written does not come back; check the store"
    return "ok", f"{place}: written and read back; {count} snapshots"


def _deep_model(found: Examination) -> tuple[Status, str]:
    if found.config is None or found.bundle is None:
        return "warning", "not checked: the bundle comes first"
    signature = deep_signature(found.bundle)
    stage = make_deep_stage(found.bundle, found.config.deep)
    try:
        stage.wait_ready(PROBE_TIMEOUT_S)
        inputs: DeepInputs = probe_inputs(signature)
        started_s = time.perf_counter()
        stage.submit(inputs, PROBE_TIMEOUT_S).result()
        took_ms = (time.perf_counter() - started_s) * 1e3
    finally:
        stage.close()
    where = found.config.deep.url if found.config.deep.backend == "triton" else "in process"
    return "ok", f"{found.config.deep.backend} {where} answers a probe in {took_ms:.1f} ms"


def _energy(found: Examination) -> tuple[Status, str]:
    if found.config is None:
        return "warning", "not checked: the configuration comes first"
    readings = [meter.read() for meter in find_meters([os.getpid()], watts_per_core(found.config.energy))]
    kinds = {reading.kind for reading in readings}
    told = "; ".join(f"{reading.kind}: {reading.source}" for reading in readings)
    if kinds == {"modelled"}:
        return "warning", f"no hardware counter (NVML, RAPL): energy is modelled, and the ledger says so ({told})"
    return "ok", told


def _limits(found: Examination) -> tuple[Status, str]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = shutil.disk_usage(Path.cwd()).free
    if files < OPEN_FILES_MIN:
        return "failed", f"{files} open files are allowed; raise it to {OPEN_FILES_MIN} (ulimit -n)"
    if found.config is not None and found.config.worker.lock_memory and (problem := locking_problem()):
        return "failed", f"worker.lock_memory: {problem}; {REMEDY}"
    if free < FREE_BYTES_MIN:
        return "warning", f"{free / 1e9:.1f} GB of disk are left in {Path.cwd()}"
    return "ok", f"{files:,} open files, {free / 1e9:.0f} GB of disk"


def _local_parts(found: Examination) -> tuple[Status, str]:
    if importlib.util.find_spec("jgo") is None:
        return "ok", "not installed (the extra `local`); only `cascade demo` and `cascade local` need them"
    problems = (local_broker.missing_parts(), local_triton.missing_parts(), local_triton.missing_libpython())
    told = [problem for problem in problems if problem is not None]
    if told:
        return "warning", "; ".join(told)
    return "ok", f"Kafka {local_broker.KAFKA_VERSION} and Triton {local_triton.TRITON_VERSION} are installed"
