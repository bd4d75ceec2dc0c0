"""The service on Avro messages whose registry is down for a while: they wait, and are no dead letters."""

from __future__ import annotations

import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.embedded import EmbeddedParts, ServiceProcess
from cascade.bundle import load_bundle
from cascade.columns import ColumnBatch
from cascade.config import Config, KafkaSettings
from streaming.clients import make_consumer, make_producer
from streaming.codecs import topic_codec
from streaming.codecs.schema_sources import TRIES
from streaming.decisions import decode_decision, message_keys
from tests.conftest import Broker
from tests.streaming.test_schema_sources import Answer, Registry

pytestmark = [pytest.mark.kafka]

SHIPPED = Path(__file__).parents[2] / "cascade" / "bundles" / "simulator"
ROWS, NUMBER = 50, 12
DOWN_S_MAX = 60.0


def read(kafka: KafkaSettings, topic: str, count: int) -> list[bytes]:
    """What the topic holds when it has `count` records, or after half a minute."""
    values: list[bytes | None] = []
    give_up_s = time.monotonic() + 30.0
    with closing(make_consumer(kafka, None)) as consumer:
        consumer.assign(consumer.partitions_for(topic))
        while len(values) < count and time.monotonic() < give_up_s:
            for fetched in consumer.poll(0.1, 1_000):
                values += fetched.values
    return [value or b"" for value in values]


def end_of(kafka: KafkaSettings, topic: str) -> int:
    with closing(make_consumer(kafka, None)) as consumer:
        return sum(consumer.end_offsets(consumer.partitions_for(topic)).values())


def test_while_the_registry_is_down_messages_wait_and_then_all_are_decided(broker: Broker, tmp_path: Path) -> None:
    registry, bundle = Registry(), load_bundle(SHIPPED)
    text = [""]

    def keep(body: bytes) -> Answer:
        text[0] = msgspec.json.decode(body)["schema"]
        return 200, b'{"id":%d}' % NUMBER

    down: Answer = (503, b"")
    registry.answers[f"/schemas/ids/{NUMBER}"] = lambda _: down
    parts = EmbeddedParts(tmp_path, bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap
    name = uuid.uuid4().hex[:10]
    topics = {topic: f"{topic.replace('_', '-')}-{name}" for topic in Config().kafka.topics.__struct_fields__}
    registry.answers[f"/subjects/{topics['transactions']}-value/versions"] = keep
    kafka = {"topics": topics, "group": f"group-{name}", "codec": "avro", "schema_registry": {"url": registry.url}}
    settings: dict[str, Any] = {"kafka": kafka, "deadline": {"budget_ms": 10_000}, "deep": {"backend": "onnxruntime"}}
    schema, roles = bundle.schema, bundle.schema.roles
    columns: dict[str, Any] = {field: np.zeros(ROWS, spec.dtype) for field, spec in schema.fields.items()}
    columns[roles.transaction_id] = columns[roles.card] = np.arange(ROWS)
    columns[roles.event_time] = np.full(ROWS, int(time.time() * 1e3))
    try:
        with ServiceProcess(parts.write_config("avro.toml", settings)) as service:
            config = service.config.kafka
            values = topic_codec(config, topics["transactions"], schema.fields, 65_536).encode(
                ColumnBatch(columns, ROWS)
            )
            service.wait_ready()
            producer = make_producer(config)
            try:
                producer.send_many(
                    topics["transactions"],
                    [*message_keys(columns[roles.card]), b"bad"],
                    [*values, b"\0\0\0\0\x63" + values[0][5:]],
                )
                producer.flush(30)
            finally:
                producer.close(10)
            give_up_s = time.monotonic() + DOWN_S_MAX
            while sum(path.endswith(f"/{NUMBER}") for path, _ in registry.seen) <= TRIES:
                assert time.monotonic() < give_up_s, "no second session asked"
                service.check_running()
                time.sleep(0.1)
            assert end_of(config, topics["decisions"]) == end_of(config, topics["dead_letters"]) == 0
            registry.answers[f"/schemas/ids/{NUMBER}"] = lambda _: (200, msgspec.json.encode({"schema": text[0]}))
            decisions = [decode_decision(value, config.codec) for value in read(config, topics["decisions"], ROWS)]
            assert read(config, topics["dead_letters"], 1) == [b"\0\0\0\0\x63" + values[0][5:]]
            ledger = service.stop()
    finally:
        registry.close()
    assert sorted(int(decision.transaction_id) for decision in decisions) == list(range(ROWS))
    assert ledger.dead_letters == {"other-schema": 1}
