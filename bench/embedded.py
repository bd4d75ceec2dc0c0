"""The service on embedded parts: a broker, a Triton with the bundle's model, and a worker in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import msgspec

from bench.cluster import end_offsets
from cascade.bundle import Bundle, load_bundle
from cascade.config import Config, TopicSettings, load_config
from cascade.errors import BrokerError, CascadeError, LocalPartError
from cascade.frames import LabelledData
from cascade.ledger import LedgerSummary
from cascade.local_parts import OwnedProcess, free_ports
from stages.assembly import deep_signature
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from streaming.kafka import make_consumer, make_producer
from streaming.kafka.local_broker import LocalBroker
from streaming.kafka.topics import ensure_topics
from streaming.player import Played, Player
from streaming.service.topics import topic_specs

READY_TIMEOUT_S = 120.0
# A worker without a new decision for this long, while transactions wait, has failed.
STALL_S_MAX = 60.0
DRAIN_S = 30.0

Settings = Mapping[str, Mapping[str, Any] | str]


class EmbeddedParts:
    """A broker and a Triton under `directory`, for a bundle; a context manager.

    The environment variable KAFKA_BOOTSTRAP names a broker to use instead of an embedded broker; the topics must not
    exist there. `broker` and `triton` are the embedded parts, or None.

    directory: for data and logs.
    bundle: its deep model is served.
    with_triton: False leaves the deep model to the service's own process.
    nodes: of the broker; with three, it replicates each record three times.
    """

    def __init__(self, directory: Path, bundle: Bundle, with_triton: bool = True, nodes: int = 1) -> None:
        self.directory = directory
        self.bundle = bundle
        self.bootstrap = os.environ.get("KAFKA_BOOTSTRAP", "")
        self.triton_url = ""
        self.broker: LocalBroker | None = None
        self.triton: LocalTriton | None = None
        self._with_triton = with_triton
        self._nodes = nodes
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if not self.bootstrap:
                self.broker = stack.enter_context(LocalBroker(self.directory / "broker", nodes=self._nodes))
                self.bootstrap = self.broker.bootstrap
            if self._with_triton:
                onnx = self.bundle.directory / "deep.onnx"
                repository = write_repository(onnx, deep_signature(self.bundle), self.directory / "models", "cpu")
                self.triton = stack.enter_context(LocalTriton(repository, log_dir=self.directory))
                self.triton_url = self.triton.grpc_url
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write_config(self, name: str, settings: Settings, partitions: int = 1) -> Path:
        """Writes a configuration file for these parts, with `settings` by section or key on top; creates its topics."""
        sections: dict[str, Any] = {
            "bundle": {"path": str(self.bundle.directory)},
            "kafka": {"bootstrap": self.bootstrap},
            "deep": {"url": self.triton_url} if self.triton_url else {"backend": "onnxruntime"},
            "health": {"port": free_ports(1)[0]},
        }
        for section, values in settings.items():
            sections[section] = values if isinstance(values, str) else {**sections.get(section, {}), **values}
        path = self.directory / name
        path.write_bytes(msgspec.toml.encode(sections))
        config = load_config(path)
        ensure_topics(config.kafka, topic_specs(config, partitions))
        return path


class ServiceProcess:
    """`cascade run` in a child process, which ends with this process; a context manager.

    config_path: the service's configuration; log and ledger are written beside it.
    module: runs instead of `cascade`, with the same arguments.
    environment: variables beside those of this process.
    """

    def __init__(
        self, config_path: Path, module: str = "cascade", environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.config: Config = load_config(config_path)
        self._ledger_path = config_path.with_suffix(".ledger.json")
        command = [sys.executable, "-m", module, "run", f"--config={config_path}", f"--ledger={self._ledger_path}"]
        self._process = OwnedProcess(
            "the service", command, config_path.with_suffix(".log"), {**os.environ, **environment}
        )

    @property
    def pid(self) -> int | None:
        """The process id; None while the service does not run."""
        return self._process.pid

    def start(self) -> None:
        """Starts the service and returns at once."""
        self._ledger_path.unlink(missing_ok=True)
        self._process.start()

    def wait_ready(self, report: Callable[[str], None] = lambda text: None) -> None:
        """Returns when `/readyz` reports ready; raises LocalPartError where the service ends or takes too long.

        `report` gets what the service waits for.
        """
        give_up_s = time.monotonic() + READY_TIMEOUT_S
        while (waiting_for := self.waiting_for()) is not None:
            self.check_running()
            if time.monotonic() > give_up_s:
                raise LocalPartError(
                    f"the service is not ready after {READY_TIMEOUT_S:.0f} s, waiting for {waiting_for}"
                )
            report(waiting_for)
            time.sleep(0.1)

    def waiting_for(self) -> str | None:
        """What the service waits for, by its `/readyz`; None where it is ready."""
        url = f"http://{self.config.health.host}:{self.config.health.port}/readyz"
        try:
            urllib.request.urlopen(url, timeout=5.0).close()
        except urllib.error.HTTPError as error:
            return "; ".join(json.loads(error.read())["waiting_for"])
        except OSError:
            return "its first answer"
        return None

    @property
    def running(self) -> bool:
        """Whether the service was started and has not ended."""
        return self._process.running

    def log_tail(self) -> str:
        """The end of the log of this run, as a single line."""
        return self._process.log_tail()

    def check_running(self) -> None:
        """Raises LocalPartError where the service has ended."""
        self._process.check_running()

    def stop(self) -> LedgerSummary:
        """Sends SIGTERM, waits for the drain and returns the ledger; raises LocalPartError where there is none."""
        self._process.stop(grace_s=DRAIN_S)
        if not self._ledger_path.exists():
            raise LocalPartError(f"the service ended without a ledger: {self._process.log_tail()}")
        return LedgerSummary.from_json_line(self._ledger_path.read_bytes())

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop(grace_s=DRAIN_S)


def new_names() -> dict[str, Any]:
    """Topics and a group that no other service uses, for the section `kafka` of a configuration."""
    name = uuid.uuid4().hex[:10]
    topics = {topic: f"{topic.replace('_', '-')}-{name}" for topic in TopicSettings.__struct_fields__}
    return {"topics": topics, "group": f"group-{name}"}


def records_in(config: Config, *topics: str) -> int:
    """The number of records that were ever appended to the topics."""
    return sum(sum(end_offsets(config, topic).values()) for topic in topics)


def wait_for_decisions(
    service: ServiceProcess, expected: int, progress: Callable[[float], None], start: int = 0
) -> None:
    """Returns when the topics have `expected` decisions and dead letters.

    Raises CascadeError where the service ends, or makes no new decision for STALL_S_MAX.

    service: the service that decides.
    expected: decisions and dead letters since the topics were created.
    progress: gets the share of what is expected after the first `start`.
    """
    config = service.config
    topics = (config.kafka.topics.decisions, config.kafka.topics.dead_letters)
    with closing(make_consumer(config.kafka, None)) as consumer:
        partitions = [partition for topic in topics for partition in consumer.partitions_for(topic)]
        before, moved_s = -1, time.monotonic()
        while True:
            service.check_running()
            count = sum(consumer.end_offsets(partitions).values())
            progress(min(1.0, (count - start) / max(expected - start, 1)))
            if count >= expected:
                return
            if count != before:
                before, moved_s = count, time.monotonic()
            elif time.monotonic() - moved_s > STALL_S_MAX:
                raise CascadeError(f"{count:,} of {expected:,} decisions, and no new one for {STALL_S_MAX:.0f} s")
            time.sleep(0.2)


def play_file(
    config: Config, data: LabelledData, rows: slice, rate: float | None, progress: Callable[[float], None]
) -> Played:
    """Plays rows of a file into the topics of a configuration.

    config: names the topics, and the bundle with the schema.
    data: the file's transactions and labels; rows: those to play.
    rate: transactions a second; None: as fast as possible.
    progress: gets the share that is sent.
    """
    schema = load_bundle(Path(config.bundle.path)).schema
    producer = make_producer(config.kafka)
    player = Player(config, schema, producer)
    try:
        return player.play(data, rows, rate, progress)
    finally:
        producer.close(10.0)


def fresh_directory(path: Path) -> Path:
    """Empties or creates a directory; raises BrokerError where a running broker still uses its files."""
    if path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise BrokerError(
                f"{path}: cannot be emptied ({error.strerror}); is a demo still running there?"
            ) from error
    path.mkdir(parents=True)
    return path
