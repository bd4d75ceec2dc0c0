from __future__ import annotations

import uuid
from contextlib import closing
from typing import Any

import msgspec
import pytest

from cascade.config import KafkaSettings
from cascade.schema import Field
from streaming.codecs import Reject, RejectReason, codec
from streaming.kafka import TopicSpec, ensure_topics, make_consumer, make_producer
from streaming.pipeline.dead_letters import DETAIL_BYTES_MAX, OVERHEAD_BYTES_MAX, DeadLetter, dead_letter
from tests.streaming.kafka.helpers import gather_joined

REJECT = Reject(0, RejectReason.OUT_OF_LIMITS, "amount: outside 0 to 1")


def letter(reject: Reject = REJECT, **changes: Any) -> DeadLetter:
    plain: dict[str, Any] = {
        "topic": "transactions", "partition": 3, "offset": 7, "time_ms": 11, "key": b"k", "value": b"v",
        "headers": [],
    }  # fmt: skip
    return dead_letter(reject, **plain | changes)


def test_a_dead_letter_names_its_origin_and_reason() -> None:
    made = letter(headers=[("trace", b"\xff"), ("trace", None)])
    assert (made.key, made.value) == (b"k", b"v")
    assert made.headers == [
        ("trace", b"\xff"), ("trace", None), ("cascade-reason", b"out-of-limits"),
        ("cascade-detail", b"amount: outside 0 to 1"), ("cascade-topic", b"transactions"),
        ("cascade-partition", b"3"), ("cascade-offset", b"7"), ("cascade-time-ms", b"11"),
    ]  # fmt: skip


def test_a_dead_letter_rejected_again_has_the_last_rejection_only() -> None:
    again = letter(headers=letter().headers, offset=99)
    assert [name for name, _ in again.headers].count("cascade-offset") == 1
    assert ("cascade-offset", b"99") in again.headers


def test_the_headers_are_bounded() -> None:
    made = letter(Reject(0, RejectReason.SYNTAX, "é\ud800" * 5_000), topic="t" * 249)
    sizes = {name: len(octets or b"") for name, octets in made.headers}
    assert max(sizes.values()) <= DETAIL_BYTES_MAX
    assert sum(len(name) + size + 20 for name, size in sizes.items()) < OVERHEAD_BYTES_MAX
    dict(made.headers)["cascade-detail"].decode()  # type: ignore[union-attr]


@pytest.mark.kafka
def test_what_cannot_be_read_arrives_byte_for_byte_through_the_broker(broker: Any) -> None:
    kafka = KafkaSettings(bootstrap=broker.bootstrap)
    source, sink = f"in-{uuid.uuid4().hex}", f"dead-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(source), TopicSpec(sink, settings={"max.message.bytes": str(2**20 + 4096)})])
    hostile: list[bytes | None] = [
        b"", None, b"\xff\xfe\x00", b"{", b"x" * 200_000, b'{"amount": -1}', b'{"amount": 1e999}', bytes(range(256)),
    ]  # fmt: skip
    producer = make_producer(kafka)
    with closing(make_consumer(kafka, None)) as consumer:
        for row, value in enumerate(hostile):
            producer.send(source, b"\xfe%d" % row, value, [("n", b"%d" % row), ("n", b"\xff")])
        producer.flush(20)
        consumer.assign([(source, 0)])
        fetched = gather_joined(consumer, len(hostile))
        decoded = codec("json", {"amount": Field(type="float64", minimum=0)}, 65_536).decode(fetched.values)
        assert len(decoded.rejects) == len(hostile)
        for reject in decoded.rejects:
            row = reject.index
            made = dead_letter(
                reject, topic=source, partition=0, offset=int(fetched.offsets[row]), time_ms=5,
                key=fetched.keys[row], value=fetched.values[row], headers=fetched.headers[row],
            )  # fmt: skip
            producer.send(sink, made.key, made.value, made.headers)
        producer.close(20)
        consumer.assign([(sink, 0)])
        dead = gather_joined(consumer, len(hostile))
    assert dead.values == hostile
    assert dead.keys == [b"\xfe%d" % row for row in range(len(hostile))]
    for row, headers in enumerate(dead.headers):
        assert list(headers[:2]) == [("n", b"%d" % row), ("n", b"\xff")]
        named = dict(headers[2:])
        assert named["cascade-reason"] == decoded.rejects[row].reason.encode()
        assert named["cascade-offset"] == b"%d" % row
        assert named["cascade-topic"] == source.encode()
    assert msgspec.json.encode(decoded.rejects[0].reason) == b'"empty"'
