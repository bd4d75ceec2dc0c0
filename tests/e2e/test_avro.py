"""The service on Avro messages whose registry is down for a while: they wait, and are no dead letters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.embedded import EmbeddedParts, ServiceProcess, new_names, records_in, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import ColumnBatch
from streaming.codecs import topic_codec
from streaming.codecs.schema_sources import TRIES
from streaming.pipeline.decisions import message_keys
from tests.conftest import Broker
from tests.e2e.asking import producing
from tests.e2e.test_worker import decisions_in, read_all
from tests.streaming.codecs.registry import Answer, Registry
from tests.timing import wait_until

pytestmark = [pytest.mark.kafka]

ROWS, NUMBER = 50, 12


def test_while_the_registry_is_down_messages_wait_and_then_all_are_decided(broker: Broker, tmp_path: Path) -> None:
    registry, bundle = Registry(), load_bundle(SHIPPED_BUNDLE)
    text = [""]

    def keep(body: bytes) -> Answer:
        text[0] = msgspec.json.decode(body)["schema"]
        return 200, b'{"id":%d}' % NUMBER

    down: Answer = (503, b"")
    registry.answers[f"/schemas/ids/{NUMBER}"] = lambda _: down
    parts = EmbeddedParts(tmp_path, bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap
    kafka = new_names() | {"codec": "avro", "schema_registry": {"url": registry.url}}
    topics = kafka["topics"]
    registry.answers[f"/subjects/{topics['transactions']}-value/versions"] = keep
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
            keys, bad = [*message_keys(columns[roles.card]), b"bad"], b"\0\0\0\0\x63" + values[0][5:]
            with producing(service.config) as producer:
                producer.send_many(topics["transactions"], keys, [*values, bad])
            asked = f"/schemas/ids/{NUMBER}"
            wait_until(lambda: [path for path, _ in registry.seen].count(asked) > TRIES, "a second session asks", 60.0)
            assert records_in(service.config, topics["decisions"], topics["dead_letters"]) == 0
            registry.answers[f"/schemas/ids/{NUMBER}"] = lambda _: (200, msgspec.json.encode({"schema": text[0]}))
            wait_for_decisions(service, ROWS + 1, lambda _: None)
            ledger = service.stop()
            decisions = decisions_in(service.config)
            assert [letter.value for letter in read_all(service.config, topics["dead_letters"])] == [bad]
    finally:
        registry.close()
    assert sorted(int(decision.transaction_id) for decision in decisions) == list(range(ROWS))
    assert ledger.dead_letters == {"other-schema": 1}
