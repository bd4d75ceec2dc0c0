"""The service: builds a worker and its collaborators from the configuration, and runs it."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog
from prometheus_client import CollectorRegistry

from cascade.bundle import Bundle, load_bundle
from cascade.compilation import compilations
from cascade.config import Config, HealthSettings, LogSettings
from cascade.engine import Engine
from cascade.ledger import (
    CertifiedRecall,
    CpuModelMeter,
    EnergySampler,
    LatencyObjective,
    Ledger,
    LedgerSummary,
    ServiceLevel,
    find_meters,
    ledger_registry,
    make_carbon,
    watts_per_core,
)
from cascade.protocols import DeepStage, EnergyMeter, Replicated, SystemClock
from stages.assembly import make_deep_stage, make_engine
from streaming.codecs import topic_codec
from streaming.health_state import HealthState
from streaming.kafka import ProducerClient, make_consumer, make_producer
from streaming.pipeline.deep_replicas import ReplicaCollector
from streaming.pipeline.privacy import CardHasher
from streaming.pipeline.watch import RecallWatch
from streaming.service.health import HealthServer
from streaming.service.journal import journal_written
from streaming.service.kernel_compilation import compile_kernels
from streaming.service.lag import LagCollector, LagWatch, Positions
from streaming.service.live import live_routes
from streaming.service.locked_memory import lock_memory
from streaming.service.otel import otel_exported
from streaming.service.waiting import await_broker, await_model, await_topics, stop_signals
from streaming.service.worker_report import WorkerSlot
from streaming.worker.files import FsspecFiles
from streaming.worker.loop import Worker
from streaming.worker.opening import Ports, open_worker
from streaming.worker.sessions import Sessions
from streaming.worker.snapshots import SnapshotStore, fingerprint

log = structlog.get_logger()
# The loop and the clients' threads take turns in the interpreter; Python's default of 5 ms is a whole latency limit.
THREAD_SWITCH_S = 0.0005
# Of a standby that replaces a worker. The other workers decide without the model too where it is away, and transactions
# wait for this one.
MODEL_WAIT_S_MAX = 1.0
# A collection visits the objects that are alive and not frozen, and a micro-batch leaves none behind: rare collections
# take no longer than frequent ones. At a thousand transactions a second a full one comes every few seconds.
GC_THRESHOLDS = (20_000, 5, 5)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker loads before it needs the broker: the bundle, and the engine with its kernels."""

    bundle: Bundle
    engine: Engine


def load(config: Config) -> Loaded:
    """Loads the bundle, the client library and all kernels; raises CascadeError."""
    bundle = load_bundle(Path(config.bundle.path))
    engine = make_engine(bundle)
    # for the modules that these import
    make_deep_stage(bundle, config.deep).close()
    compile_kernels(engine, config, [config.kafka.codec])
    _settle_interpreter()
    return Loaded(bundle, engine)


def serve(
    config: Config, create_topics: int = 0, slot: WorkerSlot | None = None, loaded: Loaded | None = None
) -> LedgerSummary:
    """Runs a worker until SIGTERM or SIGINT; returns the ledger's summary.

    config: the worker's own settings. create_topics: creates missing topics with this many partitions; 0: waits until
    others have created them. slot: of a supervised worker. loaded: of a standby; not used if the bundle is another one
    now. Raises CascadeError, a line with the remedy.
    """
    configure_log(config.log, None if slot is None else slot.number)
    if config.worker.lock_memory:
        lock_memory()
    bundle = load_bundle(Path(config.bundle.path))
    engine = loaded.engine if loaded is not None and loaded.bundle.version == bundle.version else make_engine(bundle)
    health = HealthState(config.health.stall_s_max)
    with ExitStack() as stack, stop_signals() as stopping:
        for part in ("kernels", "state", "broker", "topics", "deep model", "partitions"):
            health.waiting(part, "starting")
        deep = make_deep_stage(bundle, config.deep)
        stack.callback(deep.close)
        ledger = service_ledger(
            config, bundle, worker=slot is not None, screener=engine.screener_method, deep_backend=config.deep.backend
        )
        registry = ledger_registry(ledger)
        if isinstance(deep, Replicated):
            registry.register(ReplicaCollector(deep))
        if slot is None:
            stack.enter_context(EnergySampler(ledger.sample_energy))
            stack.enter_context(journal_written(config.ledger, ledger.account))
            stack.enter_context(otel_exported(config, registry.collect, ledger.started.timestamp()))
        else:
            stack.enter_context(slot.reported(ledger, registry, health))
        stack.enter_context(health_served(config.health, registry, health))
        clock = SystemClock()
        snapshots = _snapshot_store(config, bundle, clock, stack)
        hasher = CardHasher.from_settings(config.privacy, os.environ)
        _compile_kernels(engine, config, health)
        health.ok("state")
        await_broker(config, health, stopping)
        await_model(deep, health, stopping, _model_wait_s_max(config, loaded))
        await_topics(config, create_topics, health, stopping)
        if stopping.is_set():
            return ledger.summary()
        present = _PresentWorker()
        stopping.on_set(present.stop)
        stack.enter_context(_lag_watched(config, health, registry, present))

        certificate = bundle.certificate()
        watch = None if certificate is None else RecallWatch(certificate, bundle.schema, ledger, health, clock)
        ports = _ports(config, bundle, engine, deep, ledger, health, snapshots, hasher, clock, watch)

        def open_session(session: ExitStack) -> Worker | None:
            # the first connections were waited for above
            await_broker(config, health, stopping, config.kafka.lost_s_max)
            if stopping.is_set():
                return None
            worker = open_worker(ports, session)
            present.set(worker)
            session.callback(present.set, None)
            if stopping.is_set():  # while it connected
                worker.stop()
            return worker

        _settle_interpreter()
        log.info(
            "running",
            bundle=bundle.version,
            deep=config.deep.backend,
            group=config.kafka.group,
            delivery=config.delivery,
        )
        Sessions(open_session, config.kafka, ledger, health, clock, stopping.is_set).run(stopping.wait)
        summary = ledger.summary()
    log.info("stopped", transactions=summary.transactions)
    return summary


def _model_wait_s_max(config: Config, loaded: Loaded | None) -> float:
    return config.deep.start_wait_s_max if loaded is None else min(config.deep.start_wait_s_max, MODEL_WAIT_S_MAX)


class _PresentWorker:
    """The worker of the present session; there is none between sessions. For any thread.

    Other threads ask while a session ends, so each method reads `_worker` once.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def set(self, worker: Worker | None) -> None:
        """A session begins or ends."""
        self._worker = worker

    def positions(self) -> Positions | None:
        """The worker's `positions`; None without a worker."""
        worker = self._worker
        return None if worker is None else worker.positions

    def stop(self) -> None:
        """See Worker."""
        worker = self._worker
        if worker is not None:
            worker.stop()

    def lose(self, reason: str) -> None:
        """See Worker."""
        worker = self._worker
        if worker is not None:
            worker.lose(reason)


@contextmanager
def _lag_watched(
    config: Config, health: HealthState, registry: CollectorRegistry, present: _PresentWorker
) -> Iterator[None]:
    """Watches the lag of the present worker."""
    watch = LagWatch(
        connect=lambda: make_consumer(config.kafka, None),
        topic=config.kafka.topics.transactions,
        positions=present.positions,
        health=health,
        stall_s_max=config.health.stall_s_max,
        lost=present.lose,
    )
    registry.register(LagCollector(present.positions, watch.lags))
    watch.start()
    try:
        yield
    finally:
        watch.close()


def _compile_kernels(engine: Engine, config: Config, health: HealthState) -> None:
    """Compiles the kernels before the worker joins its group, so that no transaction waits for them."""
    health.waiting("kernels", "compiling, half a minute at the first start")
    log.info("compiling kernels")
    started_s = time.monotonic()
    compile_kernels(engine, config, [config.kafka.codec], health.progress)
    health.ok("kernels")
    log.info("kernels are compiled", seconds=round(time.monotonic() - started_s, 1), compiled=compilations())


def _snapshot_store(config: Config, bundle: Bundle, clock: SystemClock, stack: ExitStack) -> SnapshotStore | None:
    if not config.state.snapshots:
        return None
    writer = ThreadPoolExecutor(1, "cascade-snapshots")
    stack.callback(writer.shutdown)
    # a worker without an instance name gets a new name, so that it never overwrites the files of another
    name = config.kafka.instance or uuid.uuid4().hex[:12]
    files = FsspecFiles(config.state.snapshots)
    store = SnapshotStore(files, config.state.keep, fingerprint(bundle), name, clock, writer.submit)
    store.read_ahead()
    return store


def _ports(
    config: Config,
    bundle: Bundle,
    engine: Engine,
    deep: DeepStage,
    ledger: Ledger,
    health: HealthState,
    snapshots: SnapshotStore | None,
    hasher: CardHasher | None,
    clock: SystemClock,
    watch: RecallWatch | None,
) -> Ports:
    """What lies outside the worker: this process's parts, and connections to the configured broker."""

    def producer() -> ProducerClient:
        if config.delivery == "at-least-once":
            return make_producer(config.kafka)
        return make_producer(config.kafka, f"{config.kafka.group}-{config.kafka.instance or uuid.uuid4().hex}")

    bytes_max = config.worker.message_bytes_max
    return Ports(
        config=config,
        schema=bundle.schema,
        bundle_version=bundle.version,
        engine=engine,
        deep=deep,
        codec=topic_codec(config.kafka, config.kafka.topics.transactions, bundle.schema.fields, bytes_max),
        label_codec=topic_codec(config.kafka, config.kafka.topics.labels, bundle.schema.label_fields(), bytes_max),
        ledger=ledger,
        health=health,
        snapshots=snapshots,
        clock=clock,
        hasher=hasher,
        watch=watch,
        make_producer=producer,
        make_member=lambda: make_consumer(config.kafka, config.kafka.group),
        make_reader=lambda: make_consumer(config.kafka, None),
    )


def _settle_interpreter() -> None:
    """Keeps the interpreter's pauses far below the latency limits.

    A full garbage collection visits all objects of the libraries, 0.15 s; frozen objects are not visited.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(THREAD_SWITCH_S)


def service_level(config: Config) -> ServiceLevel:
    """The configured objectives, for the ledger."""
    return ServiceLevel(
        latency=(
            LatencyObjective(path="screened", limit_ms=config.sla.screened_p99_ms),
            LatencyObjective(path="escalated", limit_ms=config.sla.escalated_p99_ms),
        ),
        degraded_share_max=config.sla.degraded_share_max,
    )


def configure_log(settings: LogSettings, worker: int | None = None) -> None:
    """Logs to standard error, as text or JSON; the libraries log from level WARNING on.

    `worker`: the number of a supervised worker, which is added to each line.
    """
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    # kafka-python logs each reconnection attempt as an error that contains only the address
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("iso"),
        renderer,
    ]
    if worker is not None:
        processors.insert(0, lambda logger, method, event: {**event, "worker": worker})
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


@contextmanager
def health_served(settings: HealthSettings, registry: CollectorRegistry, health: HealthState) -> Iterator[None]:
    """Serves health, metrics and the live page, if that is enabled."""
    if not settings.enabled:
        yield
        return
    with HealthServer(health, registry, settings.host, settings.port, live_routes(registry, health)):
        yield


def service_ledger(
    config: Config, bundle: Bundle, worker: bool = False, screener: str = "", deep_backend: str = ""
) -> Ledger:
    """Makes the ledger of a process of the service.

    config, bundle: of the service. worker: supervised; it reads its own CPU only, since its supervisor reads the shared
    devices and has the embodied carbon. screener, deep_backend: the methods, if this process decides.
    """
    own_cpu = CpuModelMeter([os.getpid()], watts_per_core(config.energy))
    certificate = bundle.certificate()
    certified = None
    if certificate is not None:
        recall = certificate.recall
        certified = CertifiedRecall(recall.at_least, recall.alarm_level, certificate.expires)
    return Ledger(
        meters=[own_cpu] if worker else service_meters(config),
        service_level=service_level(config),
        watts_per_core=watts_per_core(config.energy),
        gpu_idle_watts=config.energy.gpu_idle_watts or None,
        bundle_version=bundle.version,
        carbon=make_carbon(config.carbon, embodied=not worker),
        screener=screener,
        deep_backend=deep_backend,
        certified=certified,
    )


def service_meters(config: Config) -> list[EnergyMeter]:
    """The meters of this process and of the Triton servers on this machine."""
    return find_meters(
        energy_pids(config),
        watts_per_core(config.energy),
        idle_watts_per_core=config.energy.idle_watts_per_core,
        registered=config.energy.meters,
    )


def energy_pids(config: Config) -> list[int]:
    """The processes whose energy counts for the service: this one, and the Triton servers on this machine."""
    ports = {port for host, port in config.deep.servers if host in LOOPBACK}
    if config.deep.backend != "triton" or not ports:
        return [os.getpid()]
    try:
        listening = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
        }
    except (psutil.Error, OSError):
        listening = set()
    return [os.getpid(), *sorted(pid for pid in listening if pid is not None)]
