"""One simulated process: the service's sessions over a worker, with everything outside it simulated."""

from __future__ import annotations

import math
import traceback
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
from streaming.health import HealthState
from streaming.snapshots import SnapshotStore
from streaming.worker import Parts, Worker

BUNDLE_VERSION = "faults"
# Of all transactions about a fifth lies in the band, since the screener's log-odds are even over [-4, 4].
POLICY = Policy(
    escalation_budget=0.2, escalation_threshold=1.0, escalation_ceiling=2.6, screener=Calibration(1.0, 0.0),
    deep=Calibration(1.0, -1.0), review_from=0.5, decline_from=0.9,
)  # fmt: skip
SESSION_PAUSE_S = 0.05
HEALTH_STALL_S = 60.0


class SimProcess:
    """A process in one of the run's places; it has turns until it has `ended`.

    `place` names it where workers are named. `superseded`: another was started in its place. `refused`: it stopped
    because the operator must choose. `problems`: what must not happen, a line each. `sessions`: the group's consumer of
    each, by the name that its records bear.
    """

    def __init__(
        self, world: World, broker: SimBroker, disk: SimDisk, options: Options, place: int, number: int
    ) -> None:
        self.place = place
        self.superseded = False
        self.refused = False
        self.ended = False
        # whether another takes its place while it stands still
        self.stands_for_good = world.happens(options.processes.replace_share)
        self.stopping = False
        self.problems: list[str] = []
        self.consumers: list[SimConsumer] = []
        self.sessions: dict[str, SimConsumer] = {}
        self.running = False
        self.wake_s = world.now_s
        faults, chance = options.processes, world.chance
        crash_in, freeze_in = (
            int(math.exp(chance.uniform(0.0, math.log(faults.points_max)))) if world.happens(share) else 0
            for share in (faults.crash_share, faults.freeze_share)
        )
        name = f"worker {place}.{number}"
        self.life = Life(world, name, crash_in, freeze_in, faults.freeze_s * chance.random())
        self.life.on_thaw = self._thawed
        self._world, self._broker, self._disk, self._options = world, broker, disk, options
        self._sessions = 0
        self._turn_began_s = 0.0
        self.clock = SimClock(self.life)
        self.engine = Engine(FeatureEngine(feature_spec(options.terminals), SCHEMA), SimScreener(), POLICY)
        self._deep = SimDeepStage(self.life, options.model)
        self.ledger = Ledger(bundle_version=BUNDLE_VERSION, clock=self.clock.monotonic)
        self._health = HealthState(HEALTH_STALL_S, self.clock.monotonic)
        self._snapshots = self._make_snapshots(f"{place}-{number}") if options.config.state.snapshots else None
        self._session = ExitStack()
        self.worker: Worker | None = None
        self.decisions_told = 0

    @property
    def identity(self) -> str:
        """What the process is known by to the group and to the transaction coordinator."""
        return f"place-{self.place}" if self._options.named else f"{self.life.name}.{self._sessions}"

    def turn(self) -> None:
        """One turn: connect, or a step of the worker, or the end."""
        self.running = True
        self._turn_began_s = self._world.now_s
        try:
            try:
                self._turn()
            except BrokerError as error:
                self._session_over(error)
        except SimCrash:
            self._end("killed")
        except StateError as error:
            self._world.tell(self.life.name, f"refuses: {error}")
            if self._turn_began_s <= self._broker.restored_s:
                self.refused = True
                self._world.fire("offsets-expired")
            else:
                self.problems.append(f"{self.life.name} asks the operator to choose, and the log holds all: {error}")
            self._end("stopped by itself")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.problems.append(
                f"{self.life.name} died of {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            )
            self._end("died")
        finally:
            self.running = False

    def kill(self) -> None:
        """End it from outside, where it stands."""
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
            self._drain(self.worker)
        else:
            if self._options.processes.replay_shuffle_share and self.consumers[0].replaying:
                self._shuffle_in_replay()
            self.worker.step()
            self._check(self.worker)
        world.wait(world.now_s + CALL_S, alone=True)
        self.wake_s = max(world.now_s + CALL_S, self.consumers[0].resume_s if self.consumers else 0.0)

    def _connect(self) -> None:
        """Make everything of a session, in the order of the service."""
        broker, life, config = self._broker, self.life, self._options.config
        self._sessions += 1
        self.consumers = []
        name = f"{life.name}.{self._sessions}"
        self._world.tell(life.name, f"session {self._sessions}")
        session = self._session = ExitStack()
        producer: SimProducer = (
            SimTransactionalProducer(broker, life, name, self._count, f"faults-{self.identity}")
            if config.delivery == "exactly-once"
            else SimProducer(broker, life, name, self._count)
        )
        session.callback(self._quietly, lambda: producer.close(1.0))
        consumer = SimConsumer(broker, life, True, self.identity if self._options.named else "", self._options.poll_s)
        self.consumers.append(consumer)
        self.sessions[name] = consumer
        session.callback(self._quietly, consumer.close)
        label_consumer = self._reader(session)
        self.worker = Worker(
            Parts(
                config=config, schema=SCHEMA, bundle_version=BUNDLE_VERSION, engine=self.engine, deep=self._deep,
                codec=transaction_codec(self._options), label_codec=label_codec(self._options), consumer=consumer,
                label_consumer=label_consumer, producer=producer, ledger=self.ledger, health=self._health,
                snapshots=self._snapshots, clock=self.clock, open_consumer=lambda: SimConsumer(broker, life, False),
                summary_consumer=self._reader(session) if config.terminals.share else None,
                chance=self._world.chance.random,
            )
        )  # fmt: skip
        self.worker.start()

    def _reader(self, session: ExitStack) -> SimConsumer:
        reader = SimConsumer(self._broker, self.life, False)
        self.consumers.append(reader)
        session.callback(self._quietly, reader.close)
        return reader

    def _drain(self, worker: Worker) -> None:
        worker.stop()
        worker.drain()
        self._close_session()
        self._end("stopped")

    def _session_over(self, error: BrokerError) -> None:
        """As the service does: close everything; the next turn makes it anew."""
        self._world.tell(self.life.name, f"session over: {error}")
        self._close_session()
        if self.superseded or self.stopping:
            self._end("gave way" if self.superseded else "stopped")
        self.wake_s = self._world.now_s + SESSION_PAUSE_S * (1.0 + self._world.chance.random())

    def _close_session(self) -> None:
        self.worker = None
        self._session.close()

    def _quietly(self, close: object) -> None:
        try:
            close()  # type: ignore[operator]
        except BrokerError as error:
            self._world.tell(self.life.name, f"closing: {error}")

    def _end(self, how: str) -> None:
        if self.ended:
            return
        self._world.tell(self.life.name, how)
        self.life.dead = True
        self.ended = True
        self.wake_s = NEVER_S
        self.worker = None
        self._broker.network.cut(self.life)
        if self in self._world.turns:
            self._world.turns.remove(self)
        counted = self.ledger.counters().decisions
        if counted != self.decisions_told:
            self.problems.append(
                f"{self.life.name}: {counted} decisions in the ledger, {self.decisions_told} known to be kept"
            )

    def _thawed(self) -> None:
        if self.superseded or (self.consumers and self.consumers[0].dropped):
            self._world.fire("zombie")

    def _count(self, topic: str, records: int) -> None:
        """The caller of a producer has learnt that records are kept."""
        if topic == self._options.config.kafka.topics.decisions:
            self.decisions_told += records

    def _check(self, worker: Worker) -> None:
        limit = self._options.config.worker.in_flight_max
        if worker.in_flight > limit:
            self.problems.append(f"{self.life.name}: {worker.in_flight} in flight, at most {limit}")

    def _shuffle_in_replay(self) -> None:
        group = self._broker.group
        if len(group.members) > 1 and self._world.happens(self._options.processes.replay_shuffle_share):
            self._world.fire("rebalance-in-replay")
            group.rebalance(shuffle=True)

    def _make_snapshots(self, name: str) -> SnapshotStore:
        options = self._options
        return SnapshotStore(
            SimFiles(self._disk, self.life), options.config.state.keep, f"faults-{options.terminals}", name,
            self.clock, submitter(self._disk, self.life),
        )  # fmt: skip
