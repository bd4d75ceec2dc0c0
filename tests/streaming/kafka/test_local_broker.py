"""The embedded Kafka: real records that survive restarts, replicated over three nodes, gone with its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from kafka import KafkaConsumer, KafkaProducer

from cascade.config import KafkaSettings
from cascade.errors import LocalPartError
from streaming.kafka import TopicSpec, ensure_topics, local_broker
from streaming.kafka.local_broker import LocalBroker
from streaming.kafka.local_security import LocalSecurity, SecureListener
from tests.conftest import Broker

OWNER = """
import sys, threading, time
from pathlib import Path
from streaming.kafka.local_broker import LocalBroker
broker = LocalBroker(Path(sys.argv[1]), parts_dir=Path(sys.argv[2]))
starter = threading.Thread(target=broker.start)
starter.start()
starter.join()
time.sleep(0.3)
print(*broker.pids, flush=True)
time.sleep(600)
"""


def produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap.split(","), acks="all", retries=10)
    try:
        for sent in [producer.send(topic, value, partition=0) for value in values]:
            sent.get(timeout=30)
    finally:
        producer.close()


def consume(bootstrap: str, topic: str, count: int, group: str | None = None) -> list[bytes]:
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=bootstrap.split(","),
        group_id=group,
        auto_offset_reset="earliest",
        consumer_timeout_ms=20_000,
    )
    try:
        return [record.value for _, record in zip(range(count), consumer, strict=False)]
    finally:
        consumer.close()


@pytest.mark.kafka
def test_records_come_back_in_order_through_a_group(broker: Broker, new_topic: Callable[..., str]) -> None:
    topic = new_topic()
    values = [f"{number}".encode() for number in range(1000)]
    produce(broker.bootstrap, topic, values)
    assert consume(broker.bootstrap, topic, 1000, group=f"group-{uuid.uuid4().hex}") == values


@pytest.mark.kafka
def test_records_and_address_survive_a_restart_and_a_stop_leaves_no_thread_and_no_process(
    kafka_parts: Path, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    running = LocalBroker(tmp_path / "data", parts_dir=kafka_parts)
    with running:
        address = running.bootstrap
        ensure_topics(KafkaSettings(bootstrap=address), [TopicSpec("stored", 1)])
        produce(address, "stored", [b"before"])
        running.kill_node(0)
        assert running.pids == ()
        running.start_node(0)
        produce(address, "stored", [b"after a kill"])
        nodes = [psutil.Process(pid) for pid in running.pids]
    assert running.pids == ()
    assert not any(node.is_running() for node in nodes)
    assert set(threading.enumerate()) - before == set()
    with LocalBroker(tmp_path / "data", parts_dir=kafka_parts) as later:
        assert consume(later.bootstrap, "stored", 2) == [b"before", b"after a kill"]


@pytest.mark.kafka
def test_a_killed_owner_takes_the_broker_along_even_if_another_thread_started_it(
    kafka_parts: Path, tmp_path: Path
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "data"), str(kafka_parts)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    node = psutil.Process(int(owner.stdout.readline()))
    assert node.is_running()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    _, alive = psutil.wait_procs([node], timeout=10)
    assert alive == []


@pytest.mark.kafka
def test_a_port_that_is_taken_is_one_line_with_the_cause(broker: Broker, kafka_parts: Path, tmp_path: Path) -> None:
    taken = int(broker.bootstrap.rpartition(":")[2])
    with pytest.raises(LocalPartError, match=r"node 0.*[Aa]ddress already in use") as caught:
        LocalBroker(tmp_path / "second", parts_dir=kafka_parts, port=taken).start()
    assert "\n" not in str(caught.value)


@pytest.mark.kafka
def test_installing_again_changes_nothing(kafka_parts: Path) -> None:
    lines: list[str] = []
    local_broker.install(kafka_parts, lines.append)
    assert len(lines) == 1
    assert "present" in lines[0]


def test_parts_that_are_not_installed_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(LocalPartError, match=r"Apache Kafka .* is not installed in .*; run `cascade local install`"):
        LocalBroker(tmp_path / "data", parts_dir=tmp_path).start()


def test_no_cluster_id_looks_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter([uuid.UUID(bytes=b"\xf8" * 16), uuid.UUID(bytes=b"\x01" * 16)])
    monkeypatch.setattr(local_broker.uuid, "uuid4", lambda: next(ids))
    assert local_broker._new_cluster_id() == "AQEBAQEBAQEBAQEBAQEBAQ"


def test_only_what_properties_and_commands_can_carry_names_users_and_listeners(tmp_path: Path) -> None:
    files = (tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "ca.pem")
    with pytest.raises(ValueError, match="letters and digits"):
        LocalSecurity({"TLS": SecureListener()}, *files, users={"a": 'b",name=c'})
    with pytest.raises(ValueError, match="capital letters"):
        LocalSecurity({"tls=x": SecureListener()}, *files)
    assert "hunter2" not in repr(LocalSecurity({}, *files, users={"a": "hunter2"}))
