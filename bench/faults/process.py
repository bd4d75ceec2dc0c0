"""One simulated process: the real worker in the service's sessions, with everything outside the worker simulated."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from contextlib import ExitStack

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
from cascade.errors import BrokerError, StateError
from cascade.features import FeatureEngine
from cascade.ledger import Ledger
from cascade.policy import Calibration, Policy
from streaming.health_state import HealthState
from streaming.worker.loop import Parts, Worker
from streaming.worker.snapshots import SnapshotStore

BUNDLE_VERSION = "faults"
# Escalates about a fifth of the transactions, since the screener's log-odds are uniform over [-4, 4).
POLICY = Policy(
    escalation_budget=0.2,
    escalation_threshold=1.0,
    escalation_ceiling=2.6,
    screener=Calibration(1.0, 0.0),
    deep=Calibration(1.0, -1.0),
    review_from=0.5,
    decline_from=0.9,
)
SESSION_PAUSE_S = 0.05
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
        self.slot = slot
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
        self.engine = Engine(FeatureEngine(feature_spec(options.terminals), SCHEMA), SimScreener(), POLICY)
        self._deep = SimDeepStage(self.life, options.model)
        self.ledger = Ledger(bundle_version=BUNDLE_VERSION, clock=self.clock.monotonic)
        self.health = HealthState(HEALTH_STALL_S, self.clock.monotonic)
        self._snapshots = self._make_snapshots(f"{slot}-{number}") if options.config.state.snapshots else None
        self._session = ExitStack()
        self.worker: Worker | None = None
        self.decisions_acknowledged = 0

    @property
    def identity(self) -> str:
        """The process's group.instance.id, and part of its transactional id."""
        return f"slot-{self.slot}" if self._options.static_members else f"{self.life.name}.{self._sessions}"

    def turn(self) -> None:
        """Take one turn: connect, step the worker, or end."""
        self.running = True
        self._turn_began_s = self._world.now_s
        try:
            try:
                self._turn()
            except BrokerError as error:
                self._on_session_error(error)
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
        world = self._world
        if self.worker is None:
            if self.stopping:
                self._end("stopped")
                return
            self._connect()
        elif self.stopping:
            self.worker.stop()
            self.worker.drain()
            self._close_session()
            self._end("stopped")
        else:
            if self._options.processes.replay_rebalance_share and self.consumers[0].replaying:
                self._shuffle_in_replay()
            self.worker.step()
            in_flight, limit = self.worker.in_flight, self._options.config.worker.in_flight_max
            if in_flight > limit:
                self.problems.append(f"{self.life.name}: {in_flight} in flight, at most {limit}")
        world.wait(world.now_s + CALL_S, alone=True)
        self.wake_s = max(world.now_s + CALL_S, self.consumers[0].resume_s if self.consumers else 0.0)

    def _connect(self) -> None:
        """Begin a session: make its clients and its worker, in the order of the service."""
        broker, life, config = self._broker, self.life, self._options.config
        self._sessions += 1
        self.consumers = []
        name = f"{life.name}.{self._sessions}"
        self._world.log(life.name, f"session {self._sessions}")
        session = self._session = ExitStack()
        producer: SimProducer = (
            SimTransactionalProducer(broker, life, name, self._count, f"faults-{self.identity}")
            if config.delivery == "exactly-once"
            else SimProducer(broker, life, name, self._count)
        )
        session.callback(self._quietly, lambda: producer.close(1.0))
        consumer = SimConsumer(
            broker, life, True, self.identity if self._options.static_members else "", self._options.poll_s
        )
        self.consumers.append(consumer)
        self.sessions[name] = consumer
        session.callback(self._quietly, consumer.close)
        label_consumer = self._reader(session)
        self.worker = Worker(
            Parts(
                config=config,
                schema=SCHEMA,
                bundle_version=BUNDLE_VERSION,
                engine=self.engine,
                deep=self._deep,
                codec=transaction_codec(self._options),
                label_codec=label_codec(self._options),
                consumer=consumer,
                label_consumer=label_consumer,
                producer=producer,
                ledger=self.ledger,
                health=self.health,
                snapshots=self._snapshots,
                clock=self.clock,
                open_consumer=lambda: SimConsumer(broker, life, False),
                summary_consumer=self._reader(session) if config.terminals.share else None,
                chance=self._world.chance.random,
            )
        )
        self.worker.start()

    def _reader(self, session: ExitStack) -> SimConsumer:
        reader = SimConsumer(self._broker, self.life, False)
        self.consumers.append(reader)
        session.callback(self._quietly, reader.close)
        return reader

    def _on_session_error(self, error: BrokerError) -> None:
        """Close the session, as the service does; the next turn begins another."""
        self._world.log(self.life.name, f"session ends: {error}")
        self._close_session()
        if self.replaced or self.stopping:
            self._end("replaced" if self.replaced else "stopped")
        self.wake_s = self._world.now_s + SESSION_PAUSE_S * (1.0 + self._world.chance.random())

    def _close_session(self) -> None:
        self.worker = None
        self._session.close()

    def _quietly(self, close: Callable[[], None]) -> None:
        try:
            close()
        except BrokerError as error:
            self._world.log(self.life.name, f"closing: {error}")

    def _end(self, how: str) -> None:
        if self.ended:
            return
        self._world.log(self.life.name, how)
        self.life.dead = True
        self.ended = True
        self.wake_s = NEVER_S
        self.worker = None
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
