"""The service on a real cluster of three nodes: whatever happens to brokers and connections, every transaction is
decided, in order, and health reports it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import bench.embedded
from bench.cluster import (
    Check,
    Follower,
    SteadyLoad,
    check,
    committed_offsets,
    end_offsets,
    escalating_bundle,
    read_decisions,
    read_transactions,
    simulated,
    wait_until_all_committed,
)
from bench.embedded import EmbeddedParts, ServiceProcess, new_names
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.config import Config, KafkaSettings
from cascade.errors import BrokerError
from cascade.frames import LabelledData
from cascade.ledger import LedgerSummary
from cascade.local_parts import free_ports
from streaming.kafka import ConsumerClient, GroupMember, TopicSpec, ensure_topics, make_consumer, make_producer
from streaming.kafka.admin import admin_client
from streaming.kafka.local_broker import LocalBroker
from tests.e2e.asking import health
from tests.proxy import Proxy
from tests.streaming.kafka.helpers import fill, ignore, poll_until, visible
from tests.streaming.kafka.test_local_broker import consume, produce
from tests.timing import wait_until

pytestmark = [pytest.mark.kafka]

NODES = 3
PARTITIONS = 4
MODES = ("at-least-once", "exactly-once")
RATE = 40.0
# What two loaded cores may need to elect leaders, hand over a group and catch up.
RECOVERY_S_MAX = 240.0
FROZEN_S = 15.0
SETTINGS: dict[str, Any] = {"deadline": {"budget_ms": 2_000}}
# A service whose partition 0 is paused behind its back once the file in argv[1] exists: as a client that stops fetching
# a partition and goes on polling, heartbeating and looking well.
STUCK = """
import sys
from pathlib import Path
from streaming.kafka.rdkafka_consumer import RdkafkaConsumer
whole = RdkafkaConsumer.poll
def poll(self, timeout_s, rows_max):
    if self._group is not None and Path(sys.argv[1]).exists():
        self.pause([partition for partition in self.assignment() if partition[1] == 0])
    return whole(self, timeout_s, rows_max)
RdkafkaConsumer.poll = poll
from cascade.cli import main
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Cluster:
    """Three nodes, each behind a proxy: that is where clients find them; the nodes talk to each other directly."""

    broker: LocalBroker
    proxies: list[Proxy]

    def each(self, work: Callable[[Proxy], None]) -> None:
        for proxy in self.proxies:
            work(proxy)

    def restore(self) -> None:
        """Everything runs, and nothing is in the way."""
        self.each(Proxy.heal)
        for node in range(NODES):
            self.broker.thaw_node(node)
        with ThreadPoolExecutor(NODES) as starting:
            list(starting.map(self.broker.start_node, range(NODES)))


@pytest.fixture(scope="module")
def running_cluster(kafka_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    broker = LocalBroker(tmp_path_factory.mktemp("cluster"), nodes=NODES, parts_dir=kafka_parts)
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy("127.0.0.1", port)) for port in broker.ports]
        broker.advertise([proxy.port for proxy in proxies])
        stack.enter_context(broker)
        yield Cluster(broker, proxies)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    yield running_cluster
    running_cluster.restore()


@pytest.fixture(scope="module")
def data() -> LabelledData:
    return simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=200, terminals=200, days=20, seed=6)


@pytest.fixture(scope="module")
def bundle(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return escalating_bundle(tmp_path_factory.mktemp("bundle") / "bundle", 0.1, data)


ConfigMaker = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def new_configs(running_cluster: Cluster, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> ConfigMaker:
    """Writes configurations of one group, with topics of its own."""
    parts = EmbeddedParts(tmp_path_factory.mktemp("services"), bundle, with_triton=False)
    parts.bootstrap = running_cluster.broker.bootstrap

    def make(mode: str, kafka: dict[str, Any] | None = None, count: int = 1, **sections: Any) -> list[Path]:
        settings = SETTINGS | {"kafka": new_names() | (kafka or {}), "delivery": mode} | sections
        return [parts.write_config(f"{uuid.uuid4().hex}.toml", settings, PARTITIONS) for _ in range(count)]

    return make


@pytest.fixture(scope="module", autouse=True)
def impatience() -> Iterator[None]:
    before = bench.embedded.READY_TIMEOUT_S
    bench.embedded.READY_TIMEOUT_S = 90.0
    yield
    bench.embedded.READY_TIMEOUT_S = before


@dataclass
class Stream:
    """A group of workers under load, and a consumer downstream."""

    configs: list[Path]
    services: list[ServiceProcess]
    config: Config
    load: SteadyLoad
    follower: Follower
    bundle: Bundle
    ends: dict[int, int] = field(default_factory=dict)
    checked: Check | None = None
    ledgers: list[LedgerSummary] = field(default_factory=list)

    def recovers(self, what: str) -> None:
        """Every partition gets decisions of what is appended from now on."""
        wait_until(self._ask_for_ends, f"{self.config.delivery}: an answer of the broker after {what}", RECOVERY_S_MAX)
        watch = self.follower.watch(self.ends)

        def decided() -> bool:
            self.load.check()
            return watch.done

        wait_until(decided, f"{self.config.delivery}: decisions after {what}", RECOVERY_S_MAX, self._state)

    def names_broker(self) -> bool:
        """Whether the first worker is not ready, and says that it waits for the broker."""
        status, body = health(self.config, "/readyz")
        return status == 503 and any(line.startswith("broker: ") for line in body["waiting_for"])

    def _state(self) -> str:
        """What a failure needs to be understood: ends, commits, health, and the end of each worker's log."""
        topics = self.config.kafka.topics
        logs = [path.with_suffix(".log").read_text()[-2_000:] for path in self.configs]
        ends = {topic: end_offsets(self.config, topic) for topic in (topics.transactions, topics.decisions)}
        return f"{self.ends=} {ends=} {committed_offsets(self.config)=} {health(self.config, '/readyz')} {logs}"

    def _ask_for_ends(self) -> bool:
        try:
            self.ends = end_offsets(self.config, self.config.kafka.topics.transactions)
        except BrokerError:
            return False
        return True

    def finish(self) -> Check:
        """End the load, wait for the last decision, stop the workers, and read it all."""
        sent = self.load.stop()
        assert wait_until_all_committed(self.config, RECOVERY_S_MAX), f"{self.config.delivery}: not all committed"
        self.ledgers += [service.stop() for service in self.services if service.running]
        self.checked = check(read_transactions(self.config, self.bundle.schema), read_decisions(self.config), sent)
        return self.checked


@contextmanager
def stream(configs: list[Path], bundle: Bundle, data: LabelledData, started: int = 1) -> Iterator[Stream]:
    services = [ServiceProcess(path) for path in configs]
    with ExitStack() as stack:
        for service in services[:started]:
            stack.enter_context(service)
        for service in services[:started]:
            service.wait_ready()
        config = services[0].config
        load, follower = SteadyLoad(config, bundle.schema, data, RATE), Follower(config)
        stack.callback(follower.close)
        load.start()
        yield Stream(configs, services, config, load, follower, bundle)


# --- a battered cluster -----------------------------------------------------------------------------------------------


Trouble = Callable[[Cluster], None]


def a_node_is_killed(cluster: Cluster) -> None:
    cluster.broker.kill_node(0)
    time.sleep(3.0)


def a_node_is_frozen_and_thawed(cluster: Cluster) -> None:
    cluster.broker.freeze_node(1)
    time.sleep(FROZEN_S)
    cluster.broker.thaw_node(1)


def connections_are_cut(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.each(Proxy.cut)
        time.sleep(0.5)


def connections_are_slow(cluster: Cluster) -> None:
    cluster.each(lambda proxy: proxy.delay(0.2))
    cluster.each(lambda proxy: proxy.limit(200_000))
    time.sleep(3.0)


TROUBLES: tuple[Trouble, ...] = (
    a_node_is_killed,
    a_node_is_frozen_and_thawed,
    connections_are_cut,
    connections_are_slow,
)


@pytest.fixture(scope="module", params=[pytest.param(TROUBLES, marks=pytest.mark.long, id="all")])
def battered(
    request: pytest.FixtureRequest,
    running_cluster: Cluster,
    new_configs: ConfigMaker,
    bundle: Bundle,
    data: LabelledData,
) -> dict[str, Check]:
    """Both kinds of delivery at once, through one trouble after the other; the last takes two nodes of three away."""
    cluster = running_cluster
    with ExitStack() as stack:
        streams = [stack.enter_context(stream(new_configs(mode), bundle, data)) for mode in MODES]

        def all_recover(what: str) -> None:
            for running in streams:
                running.recovers(what)

        all_recover("the start")
        for trouble in request.param:
            trouble(cluster)
            all_recover(trouble.__name__)
            cluster.restore()
            all_recover(f"the end of {trouble.__name__}")
        for node in (1, 2):
            cluster.broker.kill_node(node)
        for running in streams:
            # a partition that makes no progress may be named before
            wait_until(running.names_broker, f"{running.config.delivery}: readiness names the lost broker")
        cluster.restore()
        all_recover("two of three nodes were away")
        return {running.config.delivery: running.finish() for running in streams}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_and_each_card_keeps_its_order(battered: dict[str, Check], mode: str) -> None:
    found = battered[mode]
    assert found.sent > 300
    assert (found.lost, found.strays, found.order_violations) == (0, 0, 0)


def test_with_exactly_once_nothing_is_decided_twice(battered: dict[str, Check]) -> None:
    assert battered["exactly-once"].repeats == 0


def test_with_at_least_once_only_what_was_not_committed_is_decided_again(battered: dict[str, Check]) -> None:
    # a lost session repeats what its last commits did not cover: seconds, and never the whole of the stream
    found = battered["at-least-once"]
    assert found.repeats < found.sent / 4


# --- workers come and go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [pytest.param(MODES[0], marks=pytest.mark.long), MODES[1]])
def test_a_worker_that_joins_and_leaves_costs_no_transaction_and_the_others_go_on(
    cluster: Cluster, new_configs: ConfigMaker, bundle: Bundle, data: LabelledData, mode: str
) -> None:
    with stream(new_configs(mode, count=2), bundle, data) as running:
        first, second = running.services
        running.recovers("the start")
        with second:
            second.wait_ready()
            wait_until(lambda: len(partitions_of(second)) == len(partitions_of(first)) == PARTITIONS // 2, "shared")
            running.recovers("a worker joined")
            running.ledgers.append(second.stop())
        wait_until(lambda: len(partitions_of(first)) == PARTITIONS, "all with the remaining worker")
        running.recovers("a worker left")
        found = running.finish()
    assert (found.lost, found.strays, found.order_violations, found.repeats) == (0, 0, 0, 0)
    left, stayed = running.ledgers
    assert left.transactions > 0
    assert left.transactions + stayed.transactions == found.sent
    # cooperative: what stayed with it was neither taken from it nor rebuilt
    assert stayed.sessions == left.sessions == 1
    gained = [line for line in first_log(running).splitlines() if "partitions assigned" in line]
    assert [line.partition("partitions=[")[2].partition("]")[0].count(",") for line in gained] == [PARTITIONS - 1, 1]


def partitions_of(service: ServiceProcess) -> list[str]:
    components = health(service.config, "/readyz")[1].get("components", {})
    part = components.get("partitions", {})
    return str(part["text"]).split(", ") if part.get("status") == "ok" else []


def first_log(running: Stream) -> str:
    return running.configs[0].with_suffix(".log").read_text()


# --- the broker is gone -----------------------------------------------------------------------------------------------


def run_service(config_path: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(launcher or ("-m", "cascade")), "run", "--config", str(config_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_ready(service: subprocess.Popen[str], config: Config) -> None:
    def is_ready() -> bool:
        assert service.poll() is None, service.communicate()[1][-2_000:]
        return health(config, "/readyz")[0] == 200

    wait_until(is_ready, "ready")


LEFT_ALONE: dict[str, tuple[str, dict[str, Any], float]] = {
    # a service that has nothing to send notices as well
    "idle, exit": ("at-least-once", {"lost": "exit", "lost_s_max": 5.0}, 90.0),
}
# The clients go on for a minute with what was sent.
LEFT_ALONE_LONG: dict[str, tuple[str, dict[str, Any], float]] = {
    "exactly-once, exit": ("exactly-once", {"lost": "exit", "lost_s_max": 5.0}, 90.0),
    "at-least-once, exit": ("at-least-once", {"lost": "exit", "lost_s_max": 20.0}, 120.0),
    "exactly-once, retry": ("exactly-once", {"lost": "retry", "lost_s_max": 5.0}, 120.0),
}


@dataclass(frozen=True)
class Ended:
    """How a process ended, and how long after its broker was gone; `code` None: it did not."""

    code: int | None
    after_s: float
    logged: str


@pytest.fixture(scope="module", params=["short", pytest.param("long", marks=pytest.mark.long)])
def left_alone(
    request: pytest.FixtureRequest,
    running_cluster: Cluster,
    new_configs: ConfigMaker,
    bundle: Bundle,
    data: LabelledData,
) -> dict[str, Ended]:
    """Services whose broker goes away for good, all at once; all but the idle one under load."""
    cases = LEFT_ALONE if request.param == "short" else LEFT_ALONE_LONG
    paths = {name: new_configs(mode, settings)[0] for name, (mode, settings, _) in cases.items()}
    services = {name: run_service(path) for name, path in paths.items()}
    configs = {name: ServiceProcess(path).config for name, path in paths.items()}
    loads = [
        SteadyLoad(config, bundle.schema, data, RATE) for name, config in configs.items() if not name.startswith("idle")
    ]

    def end_of(name: str) -> Ended:
        began_s = time.monotonic()
        try:
            _, logged = services[name].communicate(timeout=cases[name][2])
        except subprocess.TimeoutExpired:
            return Ended(None, cases[name][2], "")
        return Ended(services[name].returncode, time.monotonic() - began_s, logged)

    try:
        for name, service in services.items():
            wait_ready(service, configs[name])
        for load in loads:
            load.start()
        for name, config in configs.items():
            if not name.startswith("idle"):
                wait_until(lambda: any(committed_offsets(config).values()), f"decisions of {name}")  # noqa: B023
        running_cluster.each(Proxy.refuse)
        with ThreadPoolExecutor(len(services)) as waiting:
            return dict(zip(services, waiting.map(end_of, services), strict=True))
    finally:
        for service in services.values():
            service.kill()
        running_cluster.each(Proxy.heal)
        for load in loads:
            with contextlib.suppress(BrokerError):
                load.stop()


def test_a_broker_that_stays_away_ends_the_process_with_a_line_within_the_bound(left_alone: dict[str, Ended]) -> None:
    for name, ended in left_alone.items():
        assert ended.code == 1, f"{name}: still there after {ended.after_s:g} s"
        assert "Traceback" not in ended.logged
        last = ended.logged.strip().splitlines()[-1]
        assert last.startswith("cascade run: ")
        assert "Kafka" in last


def test_a_broker_that_is_gone_at_the_start_is_waited_for_and_named(cluster: Cluster, new_configs: ConfigMaker) -> None:
    (path,) = new_configs("exactly-once")
    cluster.each(Proxy.refuse)
    with ServiceProcess(path) as service:
        config = service.config
        address = config.kafka.servers[0]

        def is_named() -> bool:
            lines = health(config, "/readyz")[1].get("waiting_for", [])
            return any(line.startswith("broker: ") and address in line for line in lines)

        wait_until(is_named, "health names the broker")
        assert health(config, "/healthz")[0] == 200
        cluster.each(Proxy.heal)
        service.wait_ready()


# --- shutdown ---------------------------------------------------------------------------------------------------------


def test_a_second_sigterm_ends_a_drain_that_cannot_end_at_once(
    cluster: Cluster, new_configs: ConfigMaker, bundle: Bundle, data: LabelledData
) -> None:
    (path,) = new_configs("exactly-once", worker={"drain_timeout_ms": 60_000, "transaction_interval_ms": 2_000})
    service = run_service(path)
    config = ServiceProcess(path).config
    load = SteadyLoad(config, bundle.schema, data, RATE)
    try:
        wait_ready(service, config)
        load.start()
        wait_until(lambda: any(committed_offsets(config).values()), "decisions")
        # nothing is acknowledged any more: the drain has to wait
        cluster.each(Proxy.pause)
        time.sleep(1.0)
        service.terminate()
        time.sleep(2.0)
        assert service.poll() is None, "the drain ended although nothing was acknowledged"
        service.terminate()
        service.wait(timeout=20.0)
    finally:
        service.kill()
        cluster.each(Proxy.heal)
        load.stop()
    assert service.returncode == -signal.SIGTERM


# --- a partition that stands still ------------------------------------------------------------------------------------


@pytest.mark.long
def test_liveness_fails_for_a_partition_with_lag_and_no_progress(
    cluster: Cluster, new_configs: ConfigMaker, bundle: Bundle, data: LabelledData, tmp_path: Path
) -> None:
    stall_s = 20.0
    (path,) = new_configs("exactly-once", health={"stall_s_max": stall_s, "port": free_ports(1)[0]})
    stuck = tmp_path / "stuck"
    service = run_service(path, "-c", STUCK, str(stuck))
    config = ServiceProcess(path).config
    load = SteadyLoad(config, bundle.schema, data, RATE)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(service.stderr or []), daemon=True)
    reader.start()
    try:
        wait_ready(service, config)
        load.start()
        wait_until(lambda: any(committed_offsets(config).values()), "decisions")
        assert health(config, "/healthz")[0] == 200
        stuck.touch()
        took_s = wait_until(lambda: health(config, "/healthz")[0] == 503, "liveness fails", stall_s + 30)
        assert took_s > stall_s - 6
        reasons = health(config, "/healthz")[1]["waiting_for"]
        (reason,) = [line for line in reasons if line.startswith(f"partition {config.kafka.topics.transactions}-0: ")]
        assert " records waiting" in reason
        assert len(reasons) == 1, "the other partitions are well"
    finally:
        service.kill()
        load.stop()
        reader.join(5)


# --- brokers and transactions without a service ----------------------------------------------------------------------


def test_three_nodes_survive_the_loss_of_one(cluster: Cluster) -> None:
    broker, topic = cluster.broker, f"replicated-{uuid.uuid4().hex[:8]}"
    assert len(broker.pids) == NODES
    ensure_topics(KafkaSettings(bootstrap=broker.bootstrap), [TopicSpec(topic, 1, replication=NODES)])
    produce(broker.bootstrap, topic, [b"all three"])
    broker.kill_node(0)
    assert len(broker.pids) == NODES - 1
    produce(broker.bootstrap, topic, [b"two of three"])
    broker.start_node(0)
    assert len(broker.pids) == NODES
    assert consume(broker.bootstrap, topic, 2, group=f"group-{topic}") == [b"all three", b"two of three"]


class Ledger:
    """A worker of one partition: each transaction writes the next number and commits; errors replace the producer."""

    def __init__(self, kafka: KafkaSettings, transactional_id: str, topic: str, out: str) -> None:
        self._kafka, self._id, self._topic, self._out = kafka, transactional_id, topic, out
        self._producer = make_producer(kafka, transactional_id)
        self.errors: list[str] = []

    def next(self, consumer: ConsumerClient) -> int:
        """The first number that is not committed."""
        return consumer.committed([(self._topic, 0)]).get((self._topic, 0), (0, ""))[0]

    def attempt(self, number: int, member: GroupMember, in_the_middle: Callable[[], None] = lambda: None) -> None:
        try:
            self._producer.begin()
            self._producer.send_many(self._out, [b"a", b"b", b"c"], [b"%03d" % number] * 3)
            in_the_middle()
            self._producer.commit({(self._topic, 0): (number + 1, f"m{number}")}, member)
        except BrokerError as error:
            self.errors.append(type(error).__name__)
            self._producer.close(1)
            self._producer = make_producer(self._kafka, self._id)

    def close(self) -> None:
        self._producer.close(5)


def coordinator_of(kafka: KafkaSettings, transactional_id: str) -> int:
    """The node that leads the id's partition of Kafka's own topic of transactions; the hash is Java's of a string."""
    topic = "__transaction_state"
    with admin_client(kafka, "asking for the coordinator") as admin:
        partitions = admin.list_topics(topic, timeout=10).topics[topic].partitions
    number = 0
    for letter in transactional_id:
        number = (31 * number + ord(letter)) % 2**32
    signed = number - 2**32 if number >= 2**31 else number
    leader: int = partitions[abs(signed) % len(partitions)].leader
    return leader


def test_a_node_that_is_killed_in_a_transaction_loses_and_doubles_nothing(cluster: Cluster) -> None:
    name = uuid.uuid4().hex[:8]
    topic, out = f"in-{name}", f"out-{name}"
    kafka = KafkaSettings(bootstrap=cluster.broker.bootstrap, group=f"group-{name}")
    ensure_topics(kafka, [TopicSpec(topic, 1), TopicSpec(out, 3)])
    # as many records as offsets are committed: a consumer that joins again reads on from there
    fill(kafka, topic, 16)
    killed: list[int] = []

    def kill_the_coordinator() -> None:
        killed.append(coordinator_of(kafka, f"tx-{name}"))
        cluster.broker.kill_node(killed[0])

    with closing(make_consumer(kafka, kafka.group)) as consumer:
        consumer.subscribe([topic], ignore, ignore)
        poll_until([consumer], lambda: len(consumer.assignment()) == 1)
        ledger = Ledger(kafka, f"tx-{name}", topic, out)
        for attempt in range(12):
            in_the_middle = kill_the_coordinator if attempt == 4 else lambda: None
            ledger.attempt(ledger.next(consumer), consumer.member(), in_the_middle)
            consumer.poll(0.05, 10)
        cluster.broker.start_node(killed[0])
        for _ in range(3):
            ledger.attempt(ledger.next(consumer), consumer.member())
        last = ledger.next(consumer)
        ledger.close()
    assert last >= 8, ledger.errors
    assert visible(kafka, out) == sorted([b"%03d" % number for number in range(last)] * 3)
