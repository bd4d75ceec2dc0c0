"""`cascade chaos`: workers killed again and again, brokers and Triton in trouble, and then everything is counted.

Real parts: three nodes of Apache Kafka, a Triton, workers as processes. A cycle kills one worker (SIGKILL) under a
steady load and waits until every partition has decisions again for what came after the kill. At the end both topics are
read from their beginning, and each partition's state is held against a fold of its log without any interruption.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import (
    Check,
    Follower,
    SteadyLoad,
    apart,
    check,
    ends_of,
    escalating_bundle,
    origin,
    read_decisions,
    read_transactions,
    simulated,
    wait_until_all_committed,
    write_json,
)
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory
from bench.states import PartitionState, compare_states
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.errors import BrokerError, CascadeError, LocalPartError
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from stages.deep.local_triton import LocalTriton
from streaming.local_broker import LocalBroker

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
NODES = 3
ESCALATED_SHARE = 0.1
# Far from the edge on two cores that nine processes share: what is tested is that nothing is lost, not the deadline.
BUDGET_MS = 500
SNAPSHOT_INTERVAL_S = 5.0
# A partition without decisions for this long after a kill does not come back: the run ends and fails.
RECOVERY_S_MAX = 120.0
SETTLE_S_MAX = 180.0
# The broker takes a silent member for dead after 10 s: a pause beyond it moves the partitions to the others.
PAUSES_S = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.5, 4.0), (0.5, 4.0), (11.0, 13.0))
POLL_S = 0.2
PULSE_STOPPED_S, PULSE_RUNNING_S = 0.2, 0.05

Fault = Literal[
    "broker killed", "broker stopped", "broker frozen", "triton stopped", "triton killed", "triton slowed",
    "triton hung",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = (
    "broker killed", "broker stopped", "broker frozen", "triton stopped", "triton killed", "triton slowed",
    "triton hung",
)  # fmt: skip


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One cycle, as the seed wants it.

    `worker` is killed `lead_s` seconds after `fault` (None: the kill alone) began on broker node `node`, and started
    again after `pause_s`; the fault ends after `fault_s`.
    """

    worker: int
    pause_s: float
    fault: Fault | None
    node: int
    lead_s: float
    fault_s: float


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a plan; None where it took too long.

    `recovery_s`: from the kill until every partition had decisions of what came after it. `ready_s`: until the worker
    was ready again, with partitions of its own.
    """

    plan: Plan
    recovery_s: float | None
    ready_s: float | None


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """Recovery times in seconds of some kills."""

    kills: int
    p50_s: float
    p99_s: float
    max_s: float


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade chaos` saw.

    `faults`: how often each fired. `ended_by_themselves`: parts that ended without being killed, with what a worker
    said last; they were started again. `settled`: all was decided and committed within the bound after the load's
    end. `per_second`: transactions over the whole of the load, kills included. `recovery`: of all kills, of those
    alone, of those whose worker came back at once, of those beside a fault of broker or Triton.
    """

    ok: bool
    cycles: int
    kills: int
    faults: dict[str, int]
    ended_by_themselves: list[str]
    settled: bool
    check: Check
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
    """The cycles of a seed: half with the kill alone, half with one of the faults, each fault equally often."""
    chance = np.random.default_rng(seed)
    deck: list[Fault | None] = []
    found = []
    for _ in range(cycles):
        if not deck:
            cards: list[Fault | None] = [*FAULTS, *(None for _ in FAULTS)]
            deck = [cards[position] for position in chance.permutation(len(cards))]
        shortest, longest = PAUSES_S[chance.integers(len(PAUSES_S))]
        found.append(
            Plan(
                worker=int(chance.integers(workers)),
                pause_s=round(float(chance.uniform(shortest, longest)), 2),
                fault=deck.pop(),
                node=int(chance.integers(NODES)),
                lead_s=round(float(chance.uniform(0.0, 1.0)), 2),
                fault_s=round(float(chance.uniform(1.5, 4.5)), 2),
            )
        )
    return found


# --- faults -----------------------------------------------------------------------------------------------------------


class Trouble(Protocol):
    """One fault of one part, between `begin` and `end`."""

    def begin(self) -> None:
        """Make trouble."""

    def end(self) -> None:
        """Make good, and wait until the part serves again."""


class BrokerTrouble:
    """A node that is killed, stopped or frozen."""

    def __init__(self, broker: LocalBroker, node: int, kind: Fault) -> None:
        self._broker, self._node, self._kind = broker, node, kind

    def begin(self) -> None:
        """See Trouble."""
        work = {
            "broker killed": self._broker.kill_node,
            "broker stopped": self._broker.stop_node,
            "broker frozen": self._broker.freeze_node,
        }[self._kind]
        work(self._node)

    def end(self) -> None:
        """See Trouble."""
        if self._kind == "broker frozen":
            self._broker.thaw_node(self._node)
        else:
            self._broker.start_node(self._node)


class TritonTrouble:
    """A Triton that is stopped, killed, hung (frozen), or slowed: frozen four fifths of the time."""

    def __init__(self, triton: LocalTriton, kind: Fault) -> None:
        self._triton, self._kind = triton, kind
        self._stop = threading.Event()
        self._pulses = threading.Thread(target=self._pulse, name="pulses", daemon=True)

    def begin(self) -> None:
        """See Trouble."""
        if self._kind == "triton stopped":
            self._triton.stop()
        elif self._kind == "triton killed":
            self._triton.kill()
        elif self._kind == "triton hung":
            self._triton.freeze()
        else:
            self._pulses.start()

    def end(self) -> None:
        """See Trouble."""
        if self._pulses.ident is not None:
            self._stop.set()
            self._pulses.join()
        self._triton.thaw()
        self._triton.start()

    def _pulse(self) -> None:
        while not self._stop.wait(PULSE_RUNNING_S):
            self._triton.freeze()
            self._stop.wait(PULSE_STOPPED_S)
            self._triton.thaw()


def trouble(parts: EmbeddedParts, plan: Plan) -> Trouble | None:
    """The fault of a plan; None where it has none."""
    if plan.fault is None:
        return None
    if plan.fault.startswith("broker"):
        if parts.broker is None:
            raise CascadeError("KAFKA_BOOTSTRAP names another's broker, which is not ours to kill; unset it")
        return BrokerTrouble(parts.broker, plan.node, plan.fault)
    if parts.triton is None:
        raise CascadeError("no Triton was started")
    return TritonTrouble(parts.triton, plan.fault)


# --- cycles -----------------------------------------------------------------------------------------------------------


class Conductor:
    """Carries out plans on running parts, one after the other; what ends by itself is started again and noted."""

    def __init__(self, parts: EmbeddedParts, services: Sequence[ServiceProcess], follower: Follower) -> None:
        self._parts = parts
        self._services = services
        self._follower = follower
        self.ended_by_themselves: list[str] = []

    def run(self, plan: Plan) -> Cycle:
        """Kill, start again, wait for the recovery; raises LocalPartError where a part does not come back."""
        self.revive()
        service, fault = self._services[plan.worker], trouble(self._parts, plan)
        began_s = time.monotonic()
        if fault is not None:
            fault.begin()
        try:
            time.sleep(plan.lead_s if fault is not None else 0.0)
            service.kill()
            killed_s = time.monotonic()
            # what is appended from here on came after the kill
            watch = self._follower.watch(self._ends())
            time.sleep(plan.pause_s)
            service.start()
        finally:
            if fault is not None:
                time.sleep(max(began_s + plan.fault_s - time.monotonic(), 0.0))
                fault.end()
        give_up_s = killed_s + RECOVERY_S_MAX
        recovered = self._await(lambda: watch.done, give_up_s)
        # the next kill must hit a worker that works
        ready = self._await(lambda: service.waiting_for() is None, give_up_s)
        ready_s = time.monotonic() - killed_s
        return Cycle(
            plan=plan,
            recovery_s=watch.seen_s - killed_s if recovered else None,
            ready_s=ready_s if ready else None,
        )

    def revive(self) -> None:
        """Start what ended by itself, and keep what it said."""
        for service in self._services:
            if not service.running:
                self.ended_by_themselves.append(f"worker: {service.log_tail()}")
                service.start()
        triton, broker = self._parts.triton, self._parts.broker
        if triton is not None and triton.pid is None:
            self.ended_by_themselves.append("Triton")
            triton.start()
        if broker is not None and len(broker.pids) < broker.nodes:
            self.ended_by_themselves.append("broker node")
            for node in range(broker.nodes):
                broker.start_node(node)

    def _await(self, holds: Callable[[], bool], give_up_s: float) -> bool:
        """Whether it holds in time; what ends meanwhile is started again."""
        while not holds():
            if time.monotonic() > give_up_s:
                return False
            self.revive()
            time.sleep(POLL_S)
        return True

    def _ends(self) -> dict[int, int]:
        give_up_s = time.monotonic() + RECOVERY_S_MAX
        while True:
            try:
                return ends_of(self._services[0].config, self._services[0].config.kafka.topics.transactions)
            except BrokerError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(POLL_S)


def _came_back(cycle: Cycle) -> bool:
    return cycle.recovery_s is not None and cycle.ready_s is not None


def recoveries(cycles: Sequence[Cycle]) -> dict[str, Recovery]:
    """Recovery times by kind of cycle; kinds without any are left out."""
    groups = {
        "all": list(cycles),
        "kill alone": [one for one in cycles if one.plan.fault is None],
        "kill alone, back at once": [one for one in cycles if one.plan.fault is None and one.plan.pause_s == 0],
        "with a broker fault": [one for one in cycles if (one.plan.fault or "").startswith("broker")],
        "with a Triton fault": [one for one in cycles if (one.plan.fault or "").startswith("triton")],
    }
    found = {}
    for name, group in groups.items():
        times = np.array([one.recovery_s for one in group if one.recovery_s is not None])
        if len(times):
            p50, p99 = np.quantile(times, [0.5, 0.99], method="higher")
            found[name] = Recovery(kills=len(times), p50_s=float(p50), p99_s=float(p99), max_s=float(times.max()))
    return found


@app.command()
def chaos(
    cycles: Annotated[int, typer.Option(min=1, max=10_000, help="Kills, one after the other.")] = 200,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes of one group.")] = 3,
    partitions: Annotated[int, typer.Option(min=1, max=64, help="Of the transactions topic.")] = 6,
    rate: Annotated[float, typer.Option(min=1.0, help="Transactions a second.")] = 300.0,
    share_terminals: Annotated[bool, typer.Option(help="Workers tell each other of terminals.")] = False,
    seed: Annotated[int, typer.Option(help="Of the data and of the order of troubles.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/chaos"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Kill workers under load, disturb Kafka and Triton meanwhile, and count what was lost or decided twice."""
    report = run_chaos(out, cycles, workers, partitions, rate, seed, share_terminals)
    if json is not None:
        write_json(json, report)
    show(report, Console())
    if not report.ok:
        raise typer.Exit(1)


def run_chaos(
    out: Path, cycles: int, workers: int, partitions: int, rate: float, seed: int, share_terminals: bool = False
) -> ChaosReport:
    """See `chaos`."""
    started_s = time.monotonic()
    directory = fresh_directory(out)
    schema = load_bundle(SHIPPED_BUNDLE).schema
    data = apart(simulated(schema, cards=3_000, terminals=500, days=30, seed=seed), schema, partitions)
    bundle = escalating_bundle(directory / "bundle", ESCALATED_SHARE, data)
    with Steps() as progress, ExitStack() as stack:
        progress("start Kafka and Triton", 0.0)
        parts = stack.enter_context(EmbeddedParts(directory, bundle, nodes=NODES))
        progress("start Kafka and Triton", 1.0)
        paths = [_worker_config(parts, directory, number, partitions, share_terminals) for number in range(workers)]
        services = [stack.enter_context(ServiceProcess(path)) for path in paths]
        config = services[0].config
        for service in services:
            service.wait_ready()
        load = SteadyLoad(config, bundle.schema, data, rate)
        follower = Follower(config)
        stack.callback(follower.close)
        conductor = Conductor(parts, services, follower)
        load_began_s = time.monotonic()
        load.start()
        done: list[Cycle] = []
        for plan in plans(seed, cycles, workers):
            load.check()
            done.append(conductor.run(plan))
            progress("kill and recover", len(done) / cycles)
            if not _came_back(done[-1]):
                break
        sent = load.stop()
        load_s = time.monotonic() - load_began_s
        progress("decide the rest", 0.0)
        conductor.revive()
        settled = wait_until_all_committed(config, SETTLE_S_MAX)
        progress("decide the rest", 1.0)
        _stop_all(services, conductor)
        progress("read and compare", 0.0)
        result = check(read_transactions(config, bundle.schema), read_decisions(config), sent)
        states = compare_states(config, bundle)
        progress("read and compare", 1.0)
    faults = Counter(one.plan.fault for one in done if one.plan.fault is not None)
    equal = bool(states) and all(one.equal for one in states)
    nothing_wrong = not (result.lost or result.twice or result.strays or result.order_violations)
    return ChaosReport(
        ok=nothing_wrong and equal and settled and len(done) == cycles and _came_back(done[-1]),
        cycles=len(done),
        kills=len(done),
        faults={name: faults[name] for name in FAULTS},
        ended_by_themselves=conductor.ended_by_themselves,
        settled=settled,
        check=result,
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


def _worker_config(parts: EmbeddedParts, directory: Path, number: int, partitions: int, share_terminals: bool) -> Path:
    return parts.write_config(
        f"worker-{number}.toml",
        {
            "delivery": "exactly-once",
            "kafka": {"instance": f"worker-{number}"},
            "deadline": {"budget_ms": BUDGET_MS},
            # labels act in the order in which they were sent, whoever folds them and when: else states differ rightly
            "labels": {"alignment": "exact"},
            "state": {"snapshots": str(directory / "snapshots"), "interval_s": SNAPSHOT_INTERVAL_S},
            "terminals": {"share": share_terminals},
        },
        partitions,
    )


def _stop_all(services: Sequence[ServiceProcess], conductor: Conductor) -> None:
    """SIGTERM to all at once, so that none takes over what another leaves."""

    def stop(service: ServiceProcess) -> None:
        try:
            service.stop()
        except LocalPartError as error:
            conductor.ended_by_themselves.append(str(error))

    with ThreadPoolExecutor(len(services)) as stopping:
        list(stopping.map(stop, services))


def show(report: ChaosReport, console: Console) -> None:
    """Print the report."""
    found = report.check
    kinds = ", ".join(f"{name} {count}" for name, count in report.faults.items())
    console.print(
        f"\n {report.kills} kills of {report.workers} workers, {report.partitions} partitions,"
        f" {found.sent:,} transactions at {report.per_second:,.0f}/s; beside them: {kinds}\n",
        highlight=False,
    )
    table = _table("what was found", "count", "must be")
    for name, count, wanted in (
        ("transactions lost", found.lost, "0"),
        ("transactions decided twice", found.twice, "0"),
        ("decisions of no transaction", found.strays, "0"),
        ("screened decisions out of their card's order", found.order_violations, "0"),
        ("partitions whose state differs", sum(not one.equal for one in report.states), "0"),
        ("partitions whose state was compared", len(report.states), f"{report.partitions}"),
        ("escalated decisions behind later ones of their card", found.escalated_behind, "any: by design"),
        ("parts that ended by themselves, and were started again", len(report.ended_by_themselves), "-"),
    ):
        table.add_row(name, f"{count:,}", wanted)
    console.print(table)
    times = _table("recovery, kill to decisions", "kills", "p50 s", "p99 s", "max s")
    for name, one in report.recovery.items():
        times.add_row(name, f"{one.kills:,}", f"{one.p50_s:.1f}", f"{one.p99_s:.1f}", f"{one.max_s:.1f}")
    console.print(times)
    console.print(
        f" {found.escalated / max(found.decisions, 1):.1%} escalated; {found.degraded_share:.1%} degraded;"
        f" {'all decided and committed' if report.settled else 'NOT all decided in time'};"
        f" {'nothing wrong' if report.ok else 'FAILED'}; {report.elapsed_s:,.0f} s in all\n"
        f" {origin(report.machine, report.seed)}",
        highlight=False,
    )
    for line in report.ended_by_themselves:
        console.print(f" ended by itself: {line}", highlight=False, style="yellow")


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    table.add_column(first, min_width=24)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
