"""Several workers on one machine: processes of a consumer group, under a supervisor.

The supervisor decides no transaction. It checks the configuration, creates topics, starts the workers, restarts a
worker that ended or hangs, and stops all of them at SIGTERM. Its health, metrics and ledger cover all workers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cascade.bundle import load_bundle
from cascade.config import Config
from cascade.errors import BrokerError, SettingError, WorkerEndedError
from cascade.ledger import (
    Account,
    EnergySampler,
    Ledger,
    LedgerSummary,
    energy_metrics,
    merge_accounts,
    summarise,
)
from cascade.local_parts import OwnedProcess
from streaming.health_state import HealthState
from streaming.kafka import make_consumer
from streaming.kafka.static_members import remove_members
from streaming.pipeline.privacy import CardHasher
from streaming.service.journal import journal_written
from streaming.service.otel import otel_exported
from streaming.service.serve import configure_log, health_served, service_ledger
from streaming.service.standby import Standby
from streaming.service.waiting import Stopping, await_broker, await_topics, stop_signals
from streaming.service.worker_memory import WorkerMemory
from streaming.service.worker_metrics import Groups, workers_registry
from streaming.service.worker_report import WorkerSlot, worker_environment, worker_instance

log = structlog.get_logger()
# After so many short lives in a row another start does not help.
SHORT_LIVES_MAX = 5
SHORT_LIFE_S = 60.0
# The first restart is at once: as a static member the worker gets its partitions back without a rebalance, and nobody
# else decides their transactions meanwhile. Pauses begin with the second short life in a row.
PAUSE_S_FIRST, PAUSE_S_SECOND, PAUSE_S_MAX = 0.0, 0.5, 8.0
WATCH_S = 0.2
# A longer pause of the supervisor means that the machine itself was suspended.
SUSPENDED_S = 5.0
# A worker reports every second. One that is silent for this long is not ready.
SILENT_S = 3.0
# A worker that reports itself as not alive for this long hangs.
HANGS_S = 3.0
# A hung worker hardly drains; its undecided records stay in the log, as after any kill.
HUNG_GRACE_S = 5.0
# A worker closes its connections after its drain timeout.
CLOSING_S = 6.0
# At the end, for the workers' memberships; after the session timeout the group removes them itself.
LEAVE_S_MAX = 5.0
# The label `worker` of the GPU, the processor package, Triton and the supervisor.
SHARED = "shared"


def supervise(config: Config, create_topics: int = 0) -> LedgerSummary:
    """Runs `worker.processes` workers until SIGTERM or SIGINT; returns the summary of all their ledgers.

    `create_topics`: see `serve`. Before any worker starts, raises CascadeError, a line with the remedy; later
    WorkerEndedError, if a worker ends at each start.
    """
    configure_log(config.log)
    bundle = load_bundle(Path(config.bundle.path))
    CardHasher.from_settings(config.privacy, os.environ)
    health = HealthState(config.health.stall_s_max)
    with ExitStack() as stack, stop_signals() as stopping:
        ledger = service_ledger(config, bundle)
        stack.enter_context(EnergySampler(ledger.sample_energy))
        config = _with_instance(config, stack)
        environment = worker_environment(config)
        drain_s = config.worker.drain_timeout_ms / 1e3 + CLOSING_S
        slots = [WorkerSlot(number, WorkerMemory.create()) for number in range(config.worker.processes)]
        standby = _standby(slots, environment)
        stack.callback(standby.stop)
        take = standby.take if config.worker.standby else None
        workers = [
            SupervisedWorker(slot, _command(slot), environment, drain_s, health, stopping, take) for slot in slots
        ]

        def account() -> Account:
            of_workers = [found for worker in workers if (found := worker.account()) is not None]
            return merge_accounts([ledger.account(), *of_workers])

        stack.enter_context(journal_written(config.ledger, account))
        registry = workers_registry(lambda: _metrics(workers, ledger, standby))
        stack.enter_context(otel_exported(config, registry.collect, ledger.started.timestamp()))
        stack.enter_context(health_served(config.health, registry, health))
        await_broker(config, health, stopping)
        await_topics(config, create_topics, health, stopping)
        if not stopping.is_set():
            _check_partitions(config)
            for part in ("broker", "topics"):
                health.forget(part)
            log.info("starting workers", workers=len(workers))
            run_workers(workers, health, stopping, standby.start if config.worker.standby else None)
        summary = summarise(account())
    restarts = sum(worker.restarts for worker in workers)
    log.info("stopped", workers=len(workers), restarts=restarts, transactions=summary.transactions)
    return msgspec.structs.replace(summary, processes=len(workers), restarts=restarts)


def run_workers(
    workers: Sequence[SupervisedWorker],
    health: HealthState,
    stopping: Stopping,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Runs all workers until `stopping` and their end; raises the WorkerEndedError of a worker that cannot run.

    `on_ready`: called again and again while all workers are ready.
    """
    with ThreadPoolExecutor(len(workers), "supervise") as pool:
        tending = [pool.submit(worker.run) for worker in workers]
        for task in tending:
            # without this worker the others would get its partitions, and they may not have the capacity
            task.add_done_callback(lambda _: stopping.set())
        while wait(tending, WATCH_S).not_done:
            health.progress()
            if on_ready is not None and not stopping.is_set() and not health.not_ready():
                on_ready()
    for task in tending:
        task.result()


class SupervisedWorker:
    """A worker and its processes, one after another.

    slot: its number and memory. command, environment: of a process. drain_s: time between SIGTERM and SIGKILL. health:
    shows the worker as a component. stopping: stops the worker. take_standby: returns a process that is the worker with
    this number from now on, if there is one. `restarts`: how often a process ended without being stopped.
    """

    def __init__(
        self,
        slot: WorkerSlot,
        command: Sequence[str],
        environment: Mapping[str, str],
        drain_s: float,
        health: HealthState,
        stopping: Stopping,
        take_standby: Callable[[int], OwnedProcess | None] | None = None,
    ) -> None:
        self.slot = slot
        self.restarts = 0
        self._ended: Account | None = None
        self._accounting = threading.Lock()
        self._name = f"worker {slot.number}"
        self._command, self._environment = command, environment
        self._process = self._new_process()
        self._take_standby = take_standby
        self._was_ready = False
        self._drain_s = drain_s
        self._health, self._stopping = health, stopping
        health.waiting(self._name, "not started yet")

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self._process.running

    def account(self) -> Account | None:
        """The account of all its processes, at most a second old; None if they wrote none."""
        with self._accounting:
            return self._total()

    def run(self) -> None:
        """Runs and restarts its process until `stopping`; raises WorkerEndedError after SHORT_LIVES_MAX short lives."""
        short_lives, pause_s = 0, PAUSE_S_FIRST
        while not self._stopping.is_set():
            lived_s = self._live()
            if self._stopping.is_set():
                return
            status = self._process.exit_status
            # a worker that was ready and then killed from outside can run
            short = lived_s < SHORT_LIFE_S and not (self._was_ready and status == -signal.SIGKILL)
            short_lives, pause_s = (short_lives + 1, pause_s) if short else (0, PAUSE_S_FIRST)
            how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
            ended = f"{self._name} ended with {how}"
            if short_lives >= SHORT_LIVES_MAX:
                raise WorkerEndedError(
                    f"{ended}, for the {short_lives}th time in a row within {SHORT_LIFE_S:.0f} s of its start; see its"
                    " log lines above"
                )
            log.error("worker ended: restarting it", worker=self.slot.number, ended=ended, pause_s=pause_s)
            self._health.failed(self._name, f"{ended}; restarting it")
            self.restarts += 1
            self._stopping.wait(pause_s)
            pause_s = min(max(2 * pause_s, PAUSE_S_SECOND), PAUSE_S_MAX)

    def _new_process(self) -> OwnedProcess:
        # in a session of its own: Ctrl-C in a terminal reaches only the supervisor, which stops the workers
        return OwnedProcess(self._name, self._command, None, self._environment, [self.slot.memory.fd])

    def _start(self) -> None:
        """Starts a process, or takes the standby for one that ended."""
        self._was_ready = False
        standby = self._take_standby(self.slot.number) if self.restarts and self._take_standby is not None else None
        self._process = standby or self._new_process()
        if standby is None:
            self._process.start()

    def _live(self) -> float:
        """Runs a process from its start to its end; returns how long it ran, in seconds."""
        started_s, grace_s = time.monotonic(), self._drain_s
        try:
            self._start()
            self._health.waiting(self._name, "starting")
            hangs = self._watch()
            if hangs:
                log.error("worker hangs: stopping it", worker=self.slot.number, reason=hangs)
                self._health.failed(self._name, f"{hangs}; stopping it")
                # its end is no kill from outside
                self._was_ready = False
                grace_s = min(grace_s, HUNG_GRACE_S)
            lived_s = time.monotonic() - started_s
        finally:
            if not self._process.stop(grace_s):
                log.error("worker did not stop in time: killed", worker=self.slot.number)
            self._add_account()
        return lived_s

    def _watch(self) -> str:
        """Returns when the process has ended, must stop, or hangs: then the reason, else an empty text.

        It hangs if it reports itself as not alive for HANGS_S, or reports nothing for `health.stall_s_max`. A process
        that has not reported yet is starting.
        """
        seen, failing_s, reported_s = 0, None, time.monotonic()
        looked_s = reported_s
        while self._process.running and not self._stopping.is_set():
            now_s, number = time.monotonic(), self.slot.memory.number
            if now_s - looked_s > SUSPENDED_S or number == 0:
                reported_s, failing_s = now_s, None
            looked_s = now_s
            if number != seen:
                seen, reported_s = number, now_s
                reasons = self.slot.show_health(self._name, self._health)
                self._was_ready = self._was_ready or not (reasons or self._health.waits(self._name))
                failing_s = (failing_s or now_s) if reasons else None
                if failing_s is not None and now_s - failing_s > HANGS_S:
                    return "; ".join(reasons)
            elif now_s - reported_s > self._health.stall_s_max:
                return f"no answer for {now_s - reported_s:.0f} s"
            elif now_s - reported_s > SILENT_S:
                self._health.waiting(self._name, "no answer")
            self._stopping.wait(WATCH_S)
        return ""

    def _add_account(self) -> None:
        """Adds the account of a process that ended to the worker's, and removes its report."""
        with self._accounting:
            self._ended = self._total()
            self.slot.memory.clear()

    def _total(self) -> Account | None:
        found = [account for account in (self._ended, self.slot.account()) if account is not None]
        return merge_accounts(found) if found else None


def _check_partitions(config: Config) -> None:
    """Raises SettingError if there are fewer partitions than workers.

    Spares take over from the workers of another machine; on the same one a dead worker is started again anyway.
    """
    topic, processes = config.kafka.topics.transactions, config.worker.processes
    with closing(make_consumer(config.kafka, None)) as consumer:
        partitions = len(consumer.partitions_for(topic))
    if partitions < processes:
        remedy = "set it to the number of partitions at most, or add partitions to the topic"
        problem = f"topic {topic} has {partitions} partitions"
        raise SettingError("configuration", "worker.processes", processes, problem, remedy)


def _command(slot: WorkerSlot) -> list[str]:
    # a new interpreter, never a fork: threads and gRPC do not survive a fork
    return [
        sys.executable, "-m", "cascade", "run",
        "--worker", str(slot.number), "--worker-memory", str(slot.memory.fd),
    ]  # fmt: skip


def _standby(slots: Sequence[WorkerSlot], environment: Mapping[str, str]) -> Standby:
    memory = WorkerMemory.create()
    descriptors = [memory.fd, *(slot.memory.fd for slot in slots)]
    command = [
        sys.executable, "-m", "cascade", "run", "--standby-memory", ",".join(map(str, descriptors)),
    ]  # fmt: skip
    return Standby(lambda: OwnedProcess("standby", command, None, environment, descriptors, reads=True), memory)


def _with_instance(config: Config, stack: ExitStack) -> Config:
    """The configuration with a `kafka.instance`: by default a name that lasts as long as this supervisor.

    A worker that is started again is then the same static member, which gets its partitions back at once, and the same
    transactional producer, whose open transaction is aborted at once. At the end the members leave the group, so that
    nobody waits for their session timeout. Without librdkafka nothing changes.
    """
    if config.kafka.instance or config.kafka.client != "librdkafka":
        return config
    instance = f"supervisor-{uuid.uuid4().hex[:12]}"
    config = msgspec.structs.replace(config, kafka=msgspec.structs.replace(config.kafka, instance=instance))
    stack.callback(_leave, config)
    return config


def _leave(config: Config) -> None:
    names = [worker_instance(config.kafka.instance, number) for number in range(config.worker.processes)]
    try:
        remove_members(config.kafka, config.kafka.group, names, LEAVE_S_MAX)
    except BrokerError as error:
        log.warning("the workers did not leave the group: their partitions wait for 10 s", reason=str(error))


def _metrics(workers: Sequence[SupervisedWorker], ledger: Ledger, standby: Standby) -> Groups:
    groups: dict[str, Iterable[Metric]] = {
        str(worker.slot.number): [*worker.slot.metrics(), *_state(worker)] for worker in workers
    }
    ready = GaugeMetricFamily(
        "cascade_standby_ready", "1 if a process has everything loaded and waits to replace a worker.", standby.ready
    )
    return groups | {SHARED: [*energy_metrics(ledger.sample_energy()), ready]}


def _state(worker: SupervisedWorker) -> list[Metric]:
    return [
        GaugeMetricFamily("cascade_worker_up", "1 if the worker's process runs.", float(worker.running)),
        CounterMetricFamily(
            "cascade_worker_restarts", "Times that the worker ended without being stopped.", worker.restarts
        ),
    ]
