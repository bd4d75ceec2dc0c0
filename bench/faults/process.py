"""One simulated process: the service's sessions and the real worker, with everything outside them simulated."""

from __future__ import annotations

import math
import traceback
from contextlib import ExitStack

import msgspec

from bench.faults.broker import SimBroker
from bench.faults.clock import SimClock
from bench.faults.consumer import SimConsumer
from bench.faults.disk import SimDisk, SimFiles, submitter
from bench.faults.model import SimDeepStage, SimScreener
from bench.faults.producer import SimProducer, SimTransactionalProducer
from bench.faults.schedule import Options
from bench.faults.traffic import SCHEMA, feature_spec, label_codec, transaction_codec
from bench.faults.world import CALL_S, NEVER_S, Life, SimCrash, World
from cascade.engine import Engine
from cascade.errors import StateError
from cascade.features import FeatureEngine
from cascade.ledger import Ledger
from cascade.policy import Calibration, Combination, Escalation, Policy
from streaming.health_state import HealthState
from streaming.worker.boundaries import InvariantError
from streaming.worker.loop import Worker
from streaming.worker.opening import Ports, open_worker
from streaming.worker.sessions import Sessions
from streaming.worker.snapshots import SnapshotStore

BUNDLE_VERSION = "faults"
# A fifth of the transactions is in the band, since the screener's log-odds are uniform over [-4, 4). The threshold
# stays where it is for the first SAMPLE_ROWS_MIN transactions of a process. The budget is the schedule's.
POLICY = Policy(
    escalation=Escalation(budget=0.2, rule="uncertainty", threshold=-0.8, centre=1.8),
    screener=Calibration(1.0, 0.0),
    combined=Combination(0.0, 1.0, -1.0),
    deep=Calibration(1.0, -1.0),
    review_from=0.5,
    decline_from=0.9,
)
# Much shorter than the service's, so that a run of a few seconds has many sessions.
SESSION_PAUSES_S = (0.1, 0.1)
HEALTH_STALL_S = 60.0


class SimProcess:
    """A process in one of the run's worker slots, from its start until it has `ended`.

    slot: index of the worker; the name of a static member.
    number: of the process among all processes of the run.

    `replaced`: the run has started another process in its slot. `replaced_while_frozen`: the run replaces it if it
    freezes. `needs_operator`: it ended because an operator must decide. `stopping`: it drains and ends. `problems`:
    what must not happen, a line each. `health`: of the worker. `consumers`: of the present session, the group member
    first, then the label reader. `sessions`: the group member of every session, by session name.
    """

    def __init__(
        self, world: World, broker: SimBroker, disk: SimDisk, options: Options, slot: int, number: int
    ) -> None:
        self.slot, self.number = slot, number
        self.replaced = False
        self.needs_operator = False
        self.ended = False
        self.replaced_while_frozen = world.happens(options.processes.replace_share)
        self.stopping = False
        self.problems: list[str] = []
        self.consumers: list[SimConsumer] = []
        self.sessions: dict[str, SimConsumer] = {}
        self.running = False
        self.wake_s = world.now_s
        faults, chance = options.processes, world.chance
        crash_in, freeze_in = (
            int(math.exp(chance.uniform(0.0, math.log(faults.calls_max)))) if world.happens(share) else 0
            for share in (faults.crash_share, faults.freeze_share)
        )
        name = f"worker {slot}.{number}"
        self.life = Life(world, name, crash_in, freeze_in, faults.freeze_s * chance.random())
        self.life.on_thaw = self._on_thaw
        self._world, self._broker, self._disk, self._options = world, broker, disk, options
        self._sessions = 0
        self._turn_began_s = 0.0
        self.clock = SimClock(self.life)
        escalation = msgspec.structs.replace(POLICY.escalation, budget=options.escalation_budget)
        policy = msgspec.structs.replace(POLICY, escalation=escalation)
        self.engine = Engine(FeatureEngine(feature_spec(options.terminals), SCHEMA), SimScreener(), policy)
        self._deep = SimDeepStage(self.life, options.model)
        self.ledger = Ledger(bundle_version=BUNDLE_VERSION, clock=self.clock.monotonic)
        self.health = HealthState(HEALTH_STALL_S, self.clock.monotonic)
        self._ports = self._make_ports()
        self._work = Sessions(
            self._open, options.config.kafka, self.ledger, self.health, self.clock, lambda: self.stopping,
            world.chance.random, SESSION_PAUSES_S,
        )  # fmt: skip
        self.decisions_acknowledged = 0

    @property
    def worker(self) -> Worker | None:
        """The worker of the present session; None between sessions, and after the end."""
        return None if self.ended else self._work.worker

    @property
    def identity(self) -> str:
        """The process's group.instance.id, and part of its transactional id."""
        return f"slot-{self.slot}" if self._options.static_members else f"{self.life.name}.{self._sessions}"

    def turn(self) -> None:
        """Take one turn: connect, step the worker, or end."""
        self.running = True
        self._turn_began_s = self._world.now_s
        try:
            self._turn()
        except SimCrash:
            self._end("killed")
        except StateError as error:
            self._world.log(self.life.name, f"needs the operator: {error}")
            if self._turn_began_s <= self._broker.truncated_until_s:
                self.needs_operator = True
                self._world.fire("offsets-expired")
            else:
                self.problems.append(f"{self.life.name} needs the operator, though the log is complete: {error}")
            self._end("ended by itself")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.problems.append(
                f"{self.life.name} raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            )
            self._end("ended by an exception")
        finally:
            self.running = False

    def kill(self) -> None:
        """Kill the process from outside."""
        self.life.dead = True
        if not self.running:
            self._end("killed")

    def _turn(self) -> None:
        world, worker = self._world, self.worker
        if worker is not None:
            if self.stopping:
                worker.stop()
            elif self._options.processes.replay_rebalance_share and self.consumers[0].replaying:
                self._shuffle_in_replay()
        pause_s = self._work.turn()
        if pause_s and isinstance(self._work.error, InvariantError):
            self.problems.append(f"{self.life.name}: a check failed: {self._work.error}")
        if pause_s is None or (pause_s and self.stopping):
            self._end("stopped")
            return
        if pause_s:
            if self.replaced:
                self._end("replaced")
            else:
                self.wake_s = world.now_s + pause_s
            return
        if worker is not None:
            in_flight, limit = worker.in_flight, self._options.config.worker.in_flight_max
            if in_flight > limit:
                self.problems.append(f"{self.life.name}: {in_flight} in flight, at most {limit}")
        world.wait(world.now_s + CALL_S, alone=True)
        self.wake_s = max(world.now_s + CALL_S, self.consumers[0].resume_s if self.consumers else 0.0)

    def _open(self, session: ExitStack) -> Worker:
        """Begin a session, in the service's own way, with simulated connections."""
        self._sessions += 1
        self.consumers = []
        self._world.log(self.life.name, f"session {self._sessions}")
        return open_worker(self._ports, session)

    def _make_ports(self) -> Ports:
        options, config = self._options, self._options.config
        return Ports(
            config=config,
            schema=SCHEMA,
            bundle_version=BUNDLE_VERSION,
            engine=self.engine,
            deep=self._deep,
            codec=transaction_codec(options),
            label_codec=label_codec(options),
            ledger=self.ledger,
            health=self.health,
            snapshots=self._make_snapshots(f"{self.slot}-{self.number}") if config.state.snapshots else None,
            clock=self.clock,
            chance=self._world.chance.random,
            make_producer=self._make_producer,
            make_member=self._make_member,
            make_reader=self._make_reader,
        )

    def _make_producer(self) -> SimProducer:
        shared = (self._broker, self.life, f"{self.life.name}.{self._sessions}", self._count)
        if self._options.config.delivery == "exactly-once":
            return SimTransactionalProducer(*shared, f"faults-{self.identity}")
        return SimProducer(*shared)

    def _make_member(self) -> SimConsumer:
        name = self.identity if self._options.static_members else ""
        consumer = SimConsumer(self._broker, self.life, True, name, self._options.poll_s)
        self.consumers.append(consumer)
        self.sessions[f"{self.life.name}.{self._sessions}"] = consumer
        return consumer

    def _make_reader(self) -> SimConsumer:
        reader = SimConsumer(self._broker, self.life, False)
        self.consumers.append(reader)
        return reader

    def _end(self, how: str) -> None:
        if self.ended:
            return
        self._world.log(self.life.name, how)
        self.life.dead = True
        self.ended = True
        self.wake_s = NEVER_S
        self._broker.network.cut(self.life)
        if self in self._world.processes:
            self._world.processes.remove(self)
        counted = self.ledger.counters().decisions
        if counted != self.decisions_acknowledged:
            self.problems.append(
                f"{self.life.name}: {counted} decisions in the ledger, {self.decisions_acknowledged} acknowledged"
            )

    def _on_thaw(self) -> None:
        if self.replaced or (self.consumers and self.consumers[0].dropped):
            self._world.fire("zombie")

    def _count(self, topic: str, records: int) -> None:
        """Count acknowledged decisions, to compare them with the ledger."""
        if topic == self._options.config.kafka.topics.decisions:
            self.decisions_acknowledged += records

    def _shuffle_in_replay(self) -> None:
        group = self._broker.group
        if len(group.members) > 1 and self._world.happens(self._options.processes.replay_rebalance_share):
            self._world.fire("rebalance-in-replay")
            group.rebalance(shuffle=True)

    def _make_snapshots(self, name: str) -> SnapshotStore:
        files, submit = SimFiles(self._disk, self.life), submitter(self._disk, self.life)
        keep, fingerprint = self._options.config.state.keep, f"faults-{self._options.terminals}"
        return SnapshotStore(files, keep, fingerprint, name, self.clock, submit)
