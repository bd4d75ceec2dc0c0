"""One run: a schedule of faults, then no more faults, then the oracle's checks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog

from bench.faults.broker import SimBroker
from bench.faults.disk import SimDisk
from bench.faults.oracle import Oracle, committed
from bench.faults.process import SimProcess
from bench.faults.schedule import Options, derive
from bench.faults.traffic import LABEL_S_MAX, REPEAT_S_MAX, send_last, send_traffic
from bench.faults.world import ROUNDS_MAX, SimTooLong, World
from streaming.kafka import Partition
from streaming.worker.snapshots import Header

RESTART_S_MAX = 0.3
SUPERVISE_S = 0.05
# Deleted records are restored after this long at the earliest, and after twice as long at the latest.
RESTORE_S = 0.5
# A worker that has rebuilt all is ready within this time.
READY_S_MAX = 2.0
_LABELS_TO_READ = " has labels to read"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one seed.

    `fired`: number of faults by kind. `problems`: broken promises, a line each. `trace`: (seconds, actor, event).
    `seconds`: simulated time.
    """

    seed: int
    fired: Counter[str]
    problems: list[str]
    trace: list[tuple[float, str, str]]
    seconds: float


class Simulation:
    """One run: the world, the broker, the disk, and the processes in their worker slots."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.world = World(options.seed)
        self.broker = SimBroker(self.world, options.broker)
        self.disk = SimDisk(self.world, options.disk)
        self.processes: list[SimProcess] = []
        self._closing = False
        send_traffic(self.world, self.broker, options)
        for slot in range(options.workers):
            self.world.at(0.05 * self.world.chance.random(), partial(self._start, slot))
        self._plan_faults()

    def run(self) -> list[str]:
        """Run the faults, then wait until the workers have caught up; returns the problems, a line each."""
        world, options = self.world, self.options
        faulty_s = options.traffic.seconds + 1.5 * world.chance.random()
        world.wait(faulty_s)
        self._calm_down()
        settled = self._settle()
        problems = [problem for process in self.processes for problem in process.problems]
        if not settled:
            problems.append(f"the lag remains {options.settle_s:g} s after the last fault: {self._lag()}")
            return problems
        problems += self._waiting_for_state()
        oracle = Oracle(options, self.broker, self.processes)
        problems += oracle.check_states()
        problems += self._stop_all()
        problems += [problem for process in self.processes for problem in process.problems if problem not in problems]
        return problems + oracle.check_logs()

    # --- processes ----------------------------------------------------------------------------------------------

    def live(self) -> list[SimProcess]:
        """The processes that have not ended."""
        return [process for process in self.processes if not process.ended]

    def _start(self, slot: int) -> None:
        if self._closing:
            return
        process = SimProcess(self.world, self.broker, self.disk, self.options, slot, len(self.processes))
        self.processes.append(process)
        self.world.processes.append(process)
        self.world.log(process.life.name, "started")

    def _supervise(self) -> None:
        """Act as orchestrator and operator: restart ended processes, replace some frozen ones, restore the logs."""
        world, chance = self.world, self.world.chance
        for slot in range(self.options.workers):
            in_slot = [process for process in self.processes if process.slot == slot and not process.replaced]
            if not in_slot:
                continue
            last = in_slot[-1]
            if last.needs_operator:
                last.needs_operator = False
                self.broker.restore_records()
            if last.ended or (last.life.frozen and last.replaced_while_frozen):
                last.replaced = True
                world.at(RESTART_S_MAX * chance.random(), partial(self._start, slot))
        world.at(SUPERVISE_S, self._supervise)

    # --- faults -------------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        faults, world = self.options.processes, self.world
        span_s = self.options.traffic.seconds + 0.5
        for count, strike in (
            (faults.clock_jumps, self._jump_clock),
            (faults.clogs, self._clog),
            (faults.fencings, self._fence_producer),
            (faults.stops, self._stop_worker),
            (faults.log_deletions, self._delete_records),
            (faults.rebalances, self._rebalance),
        ):
            for _ in range(count):
                world.at(span_s * world.chance.random(), strike)
        world.at(SUPERVISE_S, self._supervise)

    def _jump_clock(self) -> None:
        for process in self._random_live():
            self.world.fire("clock-jump")
            process.clock.jump(self.world.chance.choice([-3_600.0, -5.0, -0.1, 0.1, 5.0, 3_600.0]))

    def _clog(self) -> None:
        chance = self.world.chance
        self.broker.network.clog(chance.randint(1, 6), self.options.processes.clog_s)

    def _fence_producer(self) -> None:
        """Initialise another producer with a worker's transactional id."""
        if self.options.config.delivery == "exactly-once":
            for process in self._random_live():
                self.broker.transactions.initialise(f"faults-{process.identity}")

    def _stop_worker(self) -> None:
        for process in self._random_live():
            self.world.fire("restarted")
            process.stopping = True

    def _rebalance(self) -> None:
        if len(self.broker.group.members) > 1:
            self.world.fire("rebalance")
            self.broker.group.rebalance(shuffle=True)

    def _delete_records(self) -> None:
        """Delete records that some snapshots need, and kill all processes, so that they restore from snapshots."""
        world, group = self.world, self.broker.group
        spans = {
            partition: (min(offsets) + 1, group.offsets[partition][0])
            for partition, offsets in self._snapshot_offsets().items()
            if partition in group.offsets and min(offsets) < group.offsets[partition][0]
        }
        if not spans:
            return
        partition = world.chance.choice(sorted(spans))
        self.broker.delete_records(partition, world.chance.randint(*spans[partition]))
        for process in self.live():
            process.kill()
        world.at(RESTORE_S * (1 + world.chance.random()), self.broker.restore_records)

    def _snapshot_offsets(self) -> dict[Partition, list[int]]:
        """The offsets of each partition's snapshots, damaged ones included."""
        offsets: dict[Partition, list[int]] = {}
        for octets in self.disk.content.values():
            lines = octets.split(b"\n", 2)
            if len(lines) == 3:
                for topic, number, offset in msgspec.json.decode(lines[1], type=Header).transactions:
                    offsets.setdefault((topic, number), []).append(offset)
        return offsets

    def _random_live(self) -> list[SimProcess]:
        live = self.live()
        return [self.world.chance.choice(live)] if live else []

    # --- calm ---------------------------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        self.world.calm = True
        self.world.log("faults", "stop")
        self.broker.restore_records()
        for process in self.live():
            if process.replaced:
                process.kill()
        self.broker.network.release_all()

    def _settle(self) -> bool:
        """Wait until every input record is decided and committed; returns whether that happened in time."""
        world = self.world
        end_s = world.now_s + self.options.settle_s
        world.wait(max(world.now_s, self.options.traffic.seconds + LABEL_S_MAX + REPEAT_S_MAX))
        send_last(self.broker, self.options)
        half_s, again = (world.now_s + end_s) / 2, False
        while world.now_s < end_s:
            world.wait(world.now_s + 0.2)
            lag = self._lag()
            if not lag:
                return True
            # A restore that a rebalance has ended took a worker back in the labels. Labels that are aligned with
            # transactions are read before the next one, and there was none since.
            if not again and world.now_s > half_s and all(line.endswith(_LABELS_TO_READ) for line in lag):
                send_last(self.broker, self.options)
                again = True
        return False

    def _lag(self) -> list[str]:
        """What the run still waits for, a line each."""
        logs, topic = self.broker.logs, self.options.config.kafka.topics.transactions
        lag = [line for partition in self.broker.partitions(topic) for line in self._partition_lag(partition)]
        lag += [line for process in self.live() for line in self._process_lag(process)]
        lag += [f"{partition} has an open transaction" for partition, log in logs.items() if log.open]
        return [*lag, "the group is rebalancing"] if self.broker.group.rebalancing else lag

    def _partition_lag(self, partition: Partition) -> Iterator[str]:
        last = max((record.offset for record in self.broker.logs[partition].committed_records()), default=-1)
        offset, metadata = committed(self.broker.group, partition, self.options.config.delivery == "exactly-once")
        if offset <= last or metadata:
            yield f"{partition}: committed {offset}, the last record is {last}"
        positions = {
            process.life.name: process.worker.positions[partition]
            for process in self.live()
            if process.worker is not None and partition in process.worker.positions
        }
        if len(positions) != 1 or min(positions.values()) <= last:
            yield f"{partition}: the positions are {positions}, the last record is {last}"

    def _process_lag(self, process: SimProcess) -> Iterator[str]:
        if process.worker is None or process.running:
            yield f"{process.life.name} has no session"
        elif process.worker.positions:
            labels = process.consumers[1]
            logs = self.broker.logs
            if any(labels.position(partition) < logs[partition].stable_end for partition in labels.assignment()):
                yield f"{process.life.name}{_LABELS_TO_READ}"

    def _waiting_for_state(self) -> list[str]:
        """The processes that do not get ready although all is rebuilt, a line each."""

        def waiting() -> list[str]:
            return [process.life.name for process in self.live() if process.health.waits("state")]

        self.world.wait(self.world.now_s + READY_S_MAX, lambda: not waiting())
        return [f"{name} waits for its state, which is rebuilt" for name in waiting()]

    def _stop_all(self) -> list[str]:
        self._closing = True
        for process in self.live():
            process.stopping = True
        if not self.world.wait(self.world.now_s + self.options.settle_s, lambda: not self.live()):
            return [f"{process.life.name} does not stop" for process in self.live()]
        return []


def simulate(seed: int) -> Outcome:
    """Run one seed."""
    simulation = Simulation(derive(seed))
    world = simulation.world
    with captured_logs(world):
        try:
            problems = simulation.run()
        except SimTooLong:
            problems = [f"the run does not end within {ROUNDS_MAX:,} rounds"]
    return Outcome(seed, world.fired, problems, world.trace, world.now_s)


@contextmanager
def captured_logs(world: World) -> Iterator[None]:
    """Write the service's log events to the trace only."""

    def trace(logger: object, method: str, event: MutableMapping[str, object]) -> str:
        world.log("log", " ".join(str(value) for value in event.values()))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[trace], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    try:
        yield
    finally:
        structlog.configure(**before)
