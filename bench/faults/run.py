"""One run: a schedule of faults, then calm, then the oracle's judgement."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import structlog

from bench.faults.broker import SimBroker
from bench.faults.disk import SimDisk
from bench.faults.oracle import Oracle, committed, kept
from bench.faults.process import SimProcess
from bench.faults.schedule import Options, derive
from bench.faults.traffic import LABEL_S_MAX, REPEAT_S_MAX, send_last, send_traffic
from bench.faults.world import SimEndless, World
from streaming.clients import Partition
from streaming.snapshots import Header

RESTART_S_MAX = 0.3
LOOK_S = 0.05
# An operator who is asked to choose restores the log.
RESTORE_S_MAX = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one seed. `fired` counts faults by kind; `problems` is empty where all is well.

    `trace`: (seconds, who, what) of everything that happened. `seconds`: simulated.
    """

    seed: int
    fired: Counter[str]
    problems: list[str]
    trace: list[tuple[float, str, str]]
    seconds: float


class Simulation:
    """Everything of one run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.world = World(options.seed)
        self.broker = SimBroker(self.world, options.broker)
        self.disk = SimDisk(self.world, options.disk)
        self.processes: list[SimProcess] = []
        self._all: list[SimProcess] = []
        self._closing = False
        send_traffic(self.world, self.broker, options)
        for place in range(options.workers):
            self.world.at(0.05 * self.world.chance.random(), self._starter(place))
        self._plan_faults()

    def run(self) -> list[str]:
        """Faults, then calm; returns the problems."""
        world, options = self.world, self.options
        faulty_s = options.traffic.seconds + 1.5 * world.chance.random()
        world.wait(faulty_s)
        self._calm_down()
        settled = self._settle()
        problems = [problem for process in self._all for problem in process.problems]
        if not settled:
            problems.append(f"lag is not gone {options.settle_s:g} s after the faults stopped: {self._lag()}")
            return problems
        oracle = Oracle(options, self.broker, self._all)
        problems += oracle.judge_state()
        problems += self._stop_all()
        problems += [problem for process in self._all for problem in process.problems if problem not in problems]
        return problems + oracle.judge()

    # --- processes ----------------------------------------------------------------------------------------------

    def live(self) -> list[SimProcess]:
        """The processes that have not ended."""
        return [one for one in self._all if not one.ended]

    def _starter(self, place: int) -> Callable[[], None]:
        return lambda: self._start(place)

    def _start(self, place: int) -> None:
        if self._closing:
            return
        process = SimProcess(self.world, self.broker, self.disk, self.options, place, len(self._all))
        self._all.append(process)
        self.world.turns.append(process)
        self.world.tell(process.life.name, "started")

    def _look_after(self) -> None:
        """What an orchestrator does: processes that ended are started again, some that stand still are replaced."""
        world, chance = self.world, self.world.chance
        for place in range(self.options.workers):
            here = [one for one in self._all if one.place == place and not one.superseded]
            if not here:
                continue
            last = here[-1]
            if last.refused:
                last.refused = False
                self.broker.restore()
            if last.ended or (last.life.frozen and last.stands_for_good):
                last.superseded = True
                world.at(RESTART_S_MAX * chance.random(), self._starter(place))
        world.at(LOOK_S, self._look_after)

    # --- faults -------------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        faults, world = self.options.processes, self.world
        span_s = self.options.traffic.seconds + 0.5
        for count, strike in (
            (faults.clock_jumps, self._jump_clock),
            (faults.clogs, self._clog),
            (faults.intruders, self._intrude),
            (faults.stops, self._stop_one),
            (faults.cuts, self._cut_log),
            (faults.shuffles, self._rebalance),
        ):
            for _ in range(count):
                world.at(span_s * world.chance.random(), strike)
        world.at(LOOK_S, self._look_after)

    def _jump_clock(self) -> None:
        for process in self._some_live():
            self.world.fire("clock-jump")
            process.clock.jump(self.world.chance.choice([-3_600.0, -5.0, -0.1, 0.1, 5.0, 3_600.0]))

    def _clog(self) -> None:
        chance = self.world.chance
        self.broker.network.clog(chance.randint(1, 6), self.options.processes.clog_s)

    def _intrude(self) -> None:
        """Someone else begins with a worker's transactional id."""
        if self.options.config.delivery == "exactly-once":
            for process in self._some_live():
                self.broker.transactions.initialise(f"faults-{process.identity}")

    def _stop_one(self) -> None:
        for process in self._some_live():
            self.world.fire("restarted")
            process.stopping = True

    def _rebalance(self) -> None:
        if len(self.broker.group.members) > 1:
            self.world.fire("rebalance")
            self.broker.group.rebalance(shuffle=True)

    def _cut_log(self) -> None:
        """A part of the log that some snapshots need is deleted, and everyone must start anew."""
        world, group = self.world, self.broker.group
        spans = {
            partition: (min(offsets) + 1, group.offsets[partition][0])
            for partition, offsets in self._snapshot_offsets().items()
            if partition in group.offsets and min(offsets) < group.offsets[partition][0]
        }
        if not spans:
            return
        partition = world.chance.choice(sorted(spans))
        self.broker.cut(partition, world.chance.randint(*spans[partition]))
        for process in self.live():
            process.kill()
        world.at(RESTORE_S_MAX * (1 + world.chance.random()), self.broker.restore)

    def _snapshot_offsets(self) -> dict[Partition, list[int]]:
        """Where the snapshots of each partition stand, damaged ones too."""
        offsets: dict[Partition, list[int]] = {}
        for octets in self.disk.content.values():
            lines = octets.split(b"\n", 2)
            if len(lines) == 3:
                for topic, number, offset in msgspec.json.decode(lines[1], type=Header).transactions:
                    offsets.setdefault((topic, number), []).append(offset)
        return offsets

    def _some_live(self) -> list[SimProcess]:
        live = self.live()
        return [self.world.chance.choice(live)] if live else []

    # --- calm ---------------------------------------------------------------------------------------------------

    def _calm_down(self) -> None:
        self.world.calm = True
        self.world.tell("faults", "stop")
        self.broker.restore()
        for process in self.live():
            if process.superseded:
                process.kill()
        self.broker.network.release_all()

    def _settle(self) -> bool:
        """Wait until everything that came in is decided and committed; False where it takes too long."""
        world = self.world
        end_s = world.now_s + self.options.settle_s
        world.wait(max(world.now_s, self.options.traffic.seconds + LABEL_S_MAX + REPEAT_S_MAX))
        send_last(self.broker, self.options)
        while world.now_s < end_s:
            world.wait(world.now_s + 0.2)
            if not self._lag():
                return True
        return False

    def _lag(self) -> list[str]:
        """What is not yet as it must be in the end, a line each."""
        logs, topic = self.broker.logs, self.options.config.kafka.topics.transactions
        lag = [line for one in self.broker.partitions(topic) for line in self._partition_lag(one)]
        lag += [line for process in self.live() for line in self._process_lag(process)]
        lag += [f"{partition} has an open transaction" for partition, log in logs.items() if log.open]
        return [*lag, "the group is rebalancing"] if self.broker.group.rebalancing else lag

    def _partition_lag(self, partition: Partition) -> Iterator[str]:
        last = max((one.offset for one in kept(self.broker.logs[partition])), default=-1)
        offset, metadata = committed(self.broker.group, partition, self.options.config.delivery == "exactly-once")
        if offset <= last or metadata:
            yield f"{partition}: committed {offset}, the last record is {last}"
        positions = {
            one.life.name: one.worker.positions[partition]
            for one in self.live()
            if one.worker is not None and partition in one.worker.positions
        }
        if len(positions) != 1 or min(positions.values()) <= last:
            yield f"{partition}: the positions are {positions}, the last record is {last}"

    def _process_lag(self, process: SimProcess) -> Iterator[str]:
        if process.worker is None or process.running:
            yield f"{process.life.name} has no session"
        elif process.worker.positions:
            labels = process.consumers[1]
            if any(labels.position(one) < self.broker.logs[one].stable_end for one in labels.assignment()):
                yield f"{process.life.name} has labels to read"

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
    with logs_into(world):
        try:
            problems = simulation.run()
        except SimEndless:
            problems = ["the run does not end"]
    return Outcome(seed, world.fired, problems, world.trace, world.now_s)


@contextmanager
def logs_into(world: World) -> Iterator[None]:
    """Let what the service logs stand in the trace, and nowhere else."""

    def tell(logger: object, method: str, event: MutableMapping[str, object]) -> str:
        world.tell("log", " ".join(str(value) for value in event.values()))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[tell], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    try:
        yield
    finally:
        structlog.configure(**before)
