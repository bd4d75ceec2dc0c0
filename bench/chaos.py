"""`cascade chaos`: kills workers under load, disturbs Kafka and Triton, and counts what was lost or decided twice.

The parts are real: three nodes of Apache Kafka, a Triton, and one service with several workers, as a machine in
production runs it. A cycle kills one worker (SIGKILL) under a steady load, and waits until every partition has
decisions about transactions that came after the kill. Some cycles kill the standby too, and some suspend the
supervisor, so that the worker is away for seconds or its partitions move. At the end the check reads both topics from
their beginning, and compares each partition's state with an uninterrupted fold of its log.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
import typer
from rich.console import Console

from bench.cluster import (
    Check,
    Follower,
    SteadyLoad,
    check_log,
    end_offsets,
    escalating_bundle,
    origin,
    separate_terminals,
    simulated,
    wait_until_all_committed,
)
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory
from bench.states import PartitionState, compare_states
from bench.supervised import Supervised
from bench.tables import figure_table, print_table, publish
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.errors import BrokerError, CascadeError, LocalPartError
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
NODES = 3
ESCALATED_SHARE = 0.1
# Generous, since nine processes may share two cores: the run tests that nothing is lost, not the deadline.
BUDGET_MS = 500
SNAPSHOT_INTERVAL_S = 5.0
# The run fails if a partition has no decision for this long after a kill.
RECOVERY_S_MAX = 120.0
SETTLE_S_MAX = 180.0
# Bounds of the pauses before a restart, and whether the standby survives. The session timeout is 10 s: after it the
# partitions move to other workers.
RESTARTS = (
    (0.0, 0.0, True),
    (0.0, 0.0, True),
    (0.0, 0.0, False),
    (0.5, 4.0, True),
    (0.5, 4.0, False),
    (11.0, 13.0, True),
)
AWAY_S = 10.0
POLL_S = 0.2
PULSE_STOPPED_S, PULSE_RUNNING_S = 0.2, 0.05

Fault = Literal[
    "broker killed",
    "broker stopped",
    "broker frozen",
    "triton stopped",
    "triton killed",
    "triton slowed",
    "triton hung",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of one cycle. Times in seconds.

    `fault` (None: no fault beside the kill) begins, on broker node `node` if it is a broker fault. `worker` is killed
    `lead_s` later, together with the standby unless `standby`. The supervisor is suspended for the first `pause_s`
    after that, and then restarts it. The fault ends `fault_s` after it began.
    """

    worker: int
    pause_s: float
    standby: bool
    fault: Fault | None
    node: int
    lead_s: float
    fault_s: float


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a plan; times in seconds from the kill, None if over RECOVERY_S_MAX.

    `recovery_s`: until every partition had decisions about transactions that came after the kill. `ready_s`: until all
    workers were ready again; `waits_for`: what the service waited for if they were not, by its `/readyz`.
    """

    plan: Plan
    recovery_s: float | None
    ready_s: float | None
    waits_for: str | None


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles of the recovery times of a group of kills, seconds."""

    kills: int
    p50_s: float
    p99_s: float
    max_s: float


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `cascade chaos`.

    `aborted_shown`: decisions that some node served as committed, and others as aborted; `check` is without them.
    `faults`: how often each struck. `ended_by_themselves`: parts that ended without a kill and were restarted, the
    service with the end of its log. `settled`: all transactions were decided and committed within SETTLE_S_MAX after
    the load. `load_s`: duration of the load, s. `per_second`: transactions a second over that time, kills included.
    `recovery`: by kind of cycle. `rate`: transactions a second that the load sent.
    """

    ok: bool
    cycles: int
    kills: int
    faults: dict[str, int]
    ended_by_themselves: list[str]
    settled: bool
    check: Check
    aborted_shown: int
    states: list[PartitionState]
    states_equal: bool
    recovery: dict[str, Recovery]
    load_s: float
    per_second: float
    workers: int
    partitions: int
    rate: float
    share_terminals: bool
    seed: int
    machine: Machine
    elapsed_s: float
    details: list[Cycle]


def plans(seed: int, cycles: int, workers: int) -> list[Plan]:
    """The plans of a seed: half of the cycles have a fault beside the kill, each fault equally often."""
    chance = np.random.default_rng(seed)
    deck: list[Fault | None] = []
    found = []
    for _ in range(cycles):
        if not deck:
            cards: list[Fault | None] = [*FAULTS, *(None for _ in FAULTS)]
            deck = [cards[position] for position in chance.permutation(len(cards))]
        shortest, longest, standby = RESTARTS[chance.integers(len(RESTARTS))]
        found.append(
            Plan(
                worker=int(chance.integers(workers)),
                pause_s=round(float(chance.uniform(shortest, longest)), 2),
                standby=standby,
                fault=deck.pop(),
                node=int(chance.integers(NODES)),
                lead_s=round(float(chance.uniform(0.0, 1.0)), 2),
                fault_s=round(float(chance.uniform(1.5, 4.5)), 2),
            )
        )
    return found


# --- faults -----------------------------------------------------------------------------------------------------------


@contextmanager
def active_fault(parts: EmbeddedParts, plan: Plan) -> Iterator[None]:
    """Lets the fault of a plan strike, `lead_s` before the body, and repairs the part afterwards, even after an error.

    The fault lasts `fault_s` or as long as the body, if that is longer. Does nothing for a plan without a fault. Raises
    CascadeError unless broker and Triton are embedded.
    """
    if plan.fault is None:
        yield
        return
    strike, repair = _broker_fault(parts, plan) if plan.fault.startswith("broker") else _triton_fault(parts, plan)
    began_s = time.monotonic()
    strike()
    try:
        time.sleep(plan.lead_s)
        yield
    finally:
        time.sleep(max(began_s + plan.fault_s - time.monotonic(), 0.0))
        repair()


def _broker_fault(parts: EmbeddedParts, plan: Plan) -> tuple[Callable[[], None], Callable[[], None]]:
    """How the fault of a broker node strikes, and how it is repaired."""
    if parts.broker is None:
        raise CascadeError("KAFKA_BOOTSTRAP is set; unset it, since chaos kills nodes of its own broker only")
    strike, repair = {
        "broker killed": (parts.broker.kill_node, parts.broker.start_node),
        "broker stopped": (parts.broker.stop_node, parts.broker.start_node),
        "broker frozen": (parts.broker.freeze_node, parts.broker.thaw_node),
    }[plan.fault or ""]
    return partial(strike, plan.node), partial(repair, plan.node)


def _triton_fault(parts: EmbeddedParts, plan: Plan) -> tuple[Callable[[], None], Callable[[], None]]:
    """How the fault of Triton strikes, and how it is repaired; a slowed Triton is frozen four fifths of the time."""
    if (triton := parts.triton) is None:
        raise CascadeError("there is no embedded Triton")
    ended = threading.Event()

    def pulse() -> None:
        while not ended.wait(PULSE_RUNNING_S):
            triton.freeze()
            ended.wait(PULSE_STOPPED_S)
            triton.thaw()

    pulses = threading.Thread(target=pulse, name="pulses", daemon=True)
    strikes = {"triton stopped": triton.stop, "triton killed": triton.kill, "triton hung": triton.freeze}

    def repair() -> None:
        if pulses.ident is not None:
            ended.set()
            pulses.join()
        triton.thaw()
        triton.start()

    return strikes.get(plan.fault or "", pulses.start), repair


# --- cycles -----------------------------------------------------------------------------------------------------------


class Conductor:
    """Executes plans on running parts, in sequence. Restarts parts that end by themselves, and takes note of them."""

    def __init__(
        self, parts: EmbeddedParts, service: ServiceProcess, processes: Supervised, follower: Follower
    ) -> None:
        self._parts = parts
        self._service, self._processes = service, processes
        self._follower = follower
        self.ended_by_themselves: list[str] = []

    def run(self, plan: Plan) -> Cycle:
        """Execute a plan and wait for the recovery; raises LocalPartError if a part does not start again."""
        self.restart_ended()
        if plan.standby and not self._await(self._processes.standby_ready, time.monotonic() + RECOVERY_S_MAX):
            raise LocalPartError(f"no standby within {RECOVERY_S_MAX:.0f} s")
        with active_fault(self._parts, plan), self._suspended(plan.pause_s > 0):
            self._processes.kill(plan.worker, with_standby=not plan.standby)
            killed_s = time.monotonic()
            # transactions from these offsets on came after the kill
            watch = self._follower.watch(self._ends())
            time.sleep(max(killed_s + plan.pause_s - time.monotonic(), 0.0))
        give_up_s = killed_s + RECOVERY_S_MAX
        recovered = self._await(lambda: watch.done, give_up_s)
        # the next kill must hit a ready worker
        ready = self._await(lambda: self._service.waiting_for() is None, give_up_s)
        ready_s = time.monotonic() - killed_s
        return Cycle(
            plan=plan,
            recovery_s=watch.seen_s - killed_s if recovered else None,
            ready_s=ready_s if ready else None,
            waits_for=None if ready else self._service.waiting_for(),
        )

    @contextmanager
    def _suspended(self, wanted: bool) -> Iterator[None]:
        """Suspend the supervisor, if that is wanted."""
        if not wanted:
            yield
            return
        self._processes.freeze()
        try:
            yield
        finally:
            self._processes.thaw()

    def restart_ended(self) -> None:
        """Restart the parts that ended by themselves, and take note of them; the supervisor restarts workers."""
        if not self._service.running:
            self.ended_by_themselves.append(f"service: {self._service.log_tail()}")
            self._service.start()
        triton, broker = self._parts.triton, self._parts.broker
        if triton is not None and triton.pid is None:
            self.ended_by_themselves.append("Triton")
            triton.start()
        if broker is not None and len(broker.pids) < broker.nodes:
            self.ended_by_themselves.append("broker node")
            for node in range(broker.nodes):
                broker.start_node(node)

    def note_restarts(self, unexplained: int) -> None:
        """Take note of the restarts of workers that were not killed."""
        self.ended_by_themselves += ["worker"] * unexplained

    def _await(self, condition: Callable[[], bool], give_up_s: float) -> bool:
        """Wait for a condition; returns whether it held in time. Restarts parts that end meanwhile."""
        while not condition():
            if time.monotonic() > give_up_s:
                return False
            self.restart_ended()
            time.sleep(POLL_S)
        return True

    def _ends(self) -> dict[int, int]:
        give_up_s = time.monotonic() + RECOVERY_S_MAX
        while True:
            try:
                return end_offsets(self._service.config, self._service.config.kafka.topics.transactions)
            except BrokerError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(POLL_S)


def _back_at_once(plan: Plan) -> bool:
    return plan.fault is None and plan.pause_s == 0


def _recovered(cycle: Cycle) -> bool:
    return cycle.recovery_s is not None and cycle.ready_s is not None


def recoveries(cycles: Sequence[Cycle]) -> dict[str, Recovery]:
    """Recovery times by kind of cycle, for the kinds that occur."""
    kinds: dict[str, Callable[[Plan], bool]] = {
        "all": lambda plan: True,
        "kill alone": lambda plan: plan.fault is None,
        "kill alone, back at once": lambda plan: _back_at_once(plan) and plan.standby,
        "kill alone, back at once without a standby": lambda plan: _back_at_once(plan) and not plan.standby,
        "kill alone, back in its session": lambda plan: plan.fault is None and 0 < plan.pause_s < AWAY_S,
        "kill alone, back after its session": lambda plan: plan.fault is None and plan.pause_s >= AWAY_S,
        "with a broker fault": lambda plan: (plan.fault or "").startswith("broker"),
        "with a Triton fault": lambda plan: (plan.fault or "").startswith("triton"),
    }
    found = {}
    for name, belongs in kinds.items():
        times_s = np.array([each.recovery_s for each in cycles if belongs(each.plan) and each.recovery_s is not None])
        if len(times_s):
            p50, p99 = np.quantile(times_s, [0.5, 0.99], method="higher")
            found[name] = Recovery(kills=len(times_s), p50_s=float(p50), p99_s=float(p99), max_s=float(times_s.max()))
    return found


@app.command()
def chaos(
    cycles: Annotated[int, typer.Option(min=1, max=10_000, help="Number of kills, in sequence.")] = 200,
    workers: Annotated[int, typer.Option(min=2, max=16, help="Worker processes of the service.")] = 3,
    partitions: Annotated[int, typer.Option(min=1, max=64, help="Partitions of the transactions topic.")] = 6,
    rate: Annotated[float, typer.Option(min=1.0, help="Transactions a second.")] = 300.0,
    share_terminals: Annotated[bool, typer.Option(help="Workers exchange terminal summaries.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the faults.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/chaos"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Kill workers under load, disturb Kafka and Triton, and count what was lost or decided twice.

    The exit status is 1 if a transaction was lost or decided twice, or if a partition's state is wrong.
    """
    report = run_chaos(out, cycles, workers, partitions, rate, seed, share_terminals)
    publish(report, show, json)
    if not report.ok:
        raise typer.Exit(1)


def run_chaos(
    out: Path, cycles: int, workers: int, partitions: int, rate: float, seed: int, share_terminals: bool = False
) -> ChaosReport:
    """Run `cascade chaos`; the command's options explain the arguments."""
    started_s = time.monotonic()
    directory = fresh_directory(out)
    schema = load_bundle(SHIPPED_BUNDLE).schema
    data = separate_terminals(simulated(schema, cards=3_000, terminals=500, days=30, seed=seed), schema, partitions)
    bundle = escalating_bundle(directory / "bundle", ESCALATED_SHARE, data)
    with Steps() as progress, ExitStack() as stack:
        progress("start Kafka and Triton", 0.0)
        parts = stack.enter_context(EmbeddedParts(directory, bundle, nodes=NODES))
        progress("start Kafka and Triton", 1.0)
        path = _service_config(parts, directory, workers, partitions, share_terminals)
        service = stack.enter_context(ServiceProcess(path))
        config = service.config
        service.wait_ready()
        load = SteadyLoad(config, bundle.schema, data, rate)
        follower = Follower(config)
        stack.callback(follower.close)
        conductor = Conductor(parts, service, Supervised(service), follower)
        load_began_s = time.monotonic()
        load.start()
        done: list[Cycle] = []
        for plan in plans(seed, cycles, workers):
            load.check()
            done.append(conductor.run(plan))
            progress("kill and recover", len(done) / cycles)
            if not _recovered(done[-1]):
                break
        sent = load.stop()
        load_s = time.monotonic() - load_began_s
        progress("decide the rest", 0.0)
        conductor.restart_ended()
        settled = wait_until_all_committed(config, SETTLE_S_MAX)
        progress("decide the rest", 1.0)
        conductor.note_restarts(_restarts(service, conductor) - len(done))
        progress("read and compare", 0.0)
        result, shown = check_log(config, bundle.schema, sent, parts.broker)
        states = compare_states(config, bundle)
        progress("read and compare", 1.0)
    faults = Counter(cycle.plan.fault for cycle in done if cycle.plan.fault is not None)
    equal = bool(states) and all(state.equal for state in states)
    nothing_wrong = not (result.lost or result.twice or result.strays or result.order_violations)
    return ChaosReport(
        ok=nothing_wrong and equal and settled and len(done) == cycles and _recovered(done[-1]),
        cycles=len(done),
        kills=len(done),
        faults={name: faults[name] for name in FAULTS},
        ended_by_themselves=conductor.ended_by_themselves,
        settled=settled,
        check=result,
        aborted_shown=shown,
        states=states,
        states_equal=equal,
        recovery=recoveries(done),
        load_s=load_s,
        per_second=sent / load_s,
        workers=workers,
        partitions=partitions,
        rate=rate,
        share_terminals=share_terminals,
        seed=seed,
        machine=describe_machine(),
        elapsed_s=time.monotonic() - started_s,
        details=done,
    )


def _service_config(
    parts: EmbeddedParts, directory: Path, workers: int, partitions: int, share_terminals: bool
) -> Path:
    return parts.write_config(
        "service.toml",
        {
            "delivery": "exactly-once",
            "kafka": {"instance": "chaos"},
            "worker": {"processes": workers},
            "deadline": {"budget_ms": BUDGET_MS},
            # else the state depends on when a worker reads a label, and states could not be compared
            "labels": {"alignment": "exact"},
            "state": {"snapshots": str(directory / "snapshots"), "interval_s": SNAPSHOT_INTERVAL_S},
            "terminals": {"share": share_terminals},
        },
        partitions,
    )


def _restarts(service: ServiceProcess, conductor: Conductor) -> int:
    """Stop the service; returns how often its supervisor restarted a worker. All workers get SIGTERM at once."""
    try:
        return service.stop().restarts
    except LocalPartError as error:
        conductor.ended_by_themselves.append(str(error))
        return 0


def show(report: ChaosReport, console: Console) -> None:
    """Print the report."""
    found = report.check
    table = figure_table("check", "count", "must be")
    for name, count, expected in (
        ("transactions lost", found.lost, "0"),
        ("transactions decided twice", found.twice, "0"),
        ("decisions of no transaction", found.strays, "0"),
        ("screened decisions out of order within a card", found.order_violations, "0"),
        ("partitions whose state differs", sum(not state.equal for state in report.states), "0"),
        ("partitions whose state was compared", len(report.states), f"{report.partitions}"),
        ("escalated decisions out of order within a card", found.escalated_behind, "any"),
        ("aborted decisions that a node serves as committed", report.aborted_shown, "any"),
        ("parts that ended by themselves", len(report.ended_by_themselves), "any"),
    ):
        table.add_row(name, f"{count:,}", expected)
    print_table(console, table)
    table = figure_table("recovery, kill to decisions", "kills", "p50 s", "p99 s", "max s")
    for name, times in report.recovery.items():
        table.add_row(name, f"{times.kills:,}", f"{times.p50_s:.1f}", f"{times.p99_s:.1f}", f"{times.max_s:.1f}")
    print_table(
        console,
        table,
        f"{found.sent:,} transactions at {report.per_second:,.0f}/s; {report.kills} kills of {report.workers} workers;"
        f" {report.partitions} partitions; {report.elapsed_s:,.0f} s",
        "faults: " + ", ".join(f"{name} {count}" for name, count in report.faults.items()),
        f"escalated: {found.escalated / max(found.decisions, 1):.1%}; degraded: {found.degraded_share:.1%}",
        "all decided and committed" if report.settled else f"NOT all decided within {SETTLE_S_MAX:.0f} s",
        *(f"ended by itself: {part}" for part in report.ended_by_themselves),
        *(f"not ready after a kill: {cycle.waits_for}" for cycle in report.details if cycle.waits_for is not None),
        "passed" if report.ok else "FAILED",
        origin(report.machine, report.seed),
    )
