from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import msgspec
import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from cascade.config import ClientName, KafkaSettings, SecuritySettings
from cascade.errors import BrokerError
from streaming.kafka import (
    ConsumerClient,
    Partition,
    TopicSpec,
    ensure_topics,
    make_consumer,
    make_producer,
    missing_topics,
    wait_for_broker,
)
from streaming.kafka.kafka_producer import KafkaPythonProducer
from streaming.kafka.rdkafka_producer import RdkafkaProducer
from streaming.kafka.rdkafka_producer_handle import ProducerHandle
from streaming.kafka.rdkafka_settings import connection_settings as rdkafka_settings
from streaming.kafka.settings import connection_settings
from tests.streaming.kafka.helpers import (
    Events,
    fill,
    gather,
    gather_joined,
    ignore,
    joined,
    kafka_python_only,
    librdkafka_only,
    most_waiting,
    poll_until,
    values,
)

pytestmark = pytest.mark.kafka


def test_records_come_back_as_they_were_sent(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    producer = make_producer(kafka)
    delivery = producer.send(topic, b"\x00k", b"\xff\x00v", [("h", b"1"), ("h", b"2"), ("é", None)], 1_530_000_000_123)
    tombstone = producer.send(topic, b"\x00k", None)
    producer.flush(20)
    assert delivery.done()
    assert tombstone.done()
    assert producer.undelivered() == 0
    producer.close(5)
    batch = gather_joined(reader, 2)
    assert (batch.keys, batch.values) == ([b"\x00k"] * 2, [b"\xff\x00v", None])
    assert list(batch.headers[0]) == [("h", b"1"), ("h", b"2"), ("é", b"")]
    assert batch.timestamps_ms[0] == 1_530_000_000_123
    assert batch.offsets.tolist() == [0, 1]


def test_many_records_have_their_own_times(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    producer = make_producer(kafka)
    delivery = producer.send_many(topic, [b"k"] * 3, [b"0", None, b""], [3_000, 1_000, 2_000])
    producer.flush(20)
    assert delivery.done()
    producer.close(5)
    batch = gather_joined(reader, 3)
    assert batch.values == [b"0", None, b""]
    assert batch.timestamps_ms.tolist() == [3_000, 1_000, 2_000]


def test_a_key_stays_in_one_partition_and_in_order(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    producer = make_producer(kafka)
    producer.send_many(topic, [b"%d" % (row % 7) for row in range(2_000)], [b"%05d" % row for row in range(2_000)])
    producer.close(20)
    homes: dict[bytes | None, set[int]] = {}
    last: dict[bytes | None, bytes] = {}
    for batch in gather(reader, 2_000):
        for key, value in zip(batch.keys, batch.values, strict=True):
            homes.setdefault(key, set()).add(batch.partition)
            assert value is not None
            assert last.get(key, b"") < value
            last[key] = value
    assert sorted(map(len, homes.values())) == [1] * 7


def test_poll_respects_its_limits(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    fill(kafka, topic, 500)
    seen = 0
    while seen < 500:
        rows = sum(map(len, reader.poll(5, 64)))
        assert 0 < rows <= 64
        seen += rows
    started_s = time.monotonic()
    assert reader.poll(0.3, 64) == []
    assert 0.25 < time.monotonic() - started_s < 10


def test_commits_are_found_by_the_next_member(kafka: KafkaSettings, topic: str) -> None:
    fill(kafka, topic, 100)
    with joined(kafka, topic) as consumer:
        batches = gather(consumer, 100)
        offsets = {(batch.topic, batch.partition): (int(batch.offsets[0]) + 10, "ahead") for batch in batches[:1]}
        consumer.commit(offsets)
        assert consumer.committed([(topic, 0), (topic, 1)]) == offsets
    with joined(kafka, topic) as consumer:
        assert len(values(gather(consumer, 90))) == 90
        assert {partition: consumer.position(partition) for partition in consumer.assignment()} == consumer.end_offsets(
            consumer.assignment()
        )


def test_closing_commits_nothing(kafka: KafkaSettings, topic: str) -> None:
    fill(kafka, topic, 10)
    with joined(kafka, topic) as consumer:
        gather(consumer, 10)
    with closing(make_consumer(kafka, kafka.group)) as consumer:
        assert consumer.committed([(topic, 0), (topic, 1)]) == {}


def test_paused_partitions_are_silent_until_resumed(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    fill(kafka, topic, 200)
    partitions = reader.partitions_for(topic)
    reader.pause(partitions[:1])
    ends = reader.end_offsets(partitions)
    batches = gather(reader, ends[partitions[1]]) + reader.poll(0.3, 1_000)
    assert {batch.partition for batch in batches} == {1}
    reader.resume(partitions[:1])
    more = gather(reader, ends[partitions[0]])
    assert len(values(batches + more)) == 200


def test_a_partition_that_was_paused_over_fetched_records_goes_on_after_resume(
    kafka: KafkaSettings, topic: str, outsider: ConsumerClient
) -> None:
    fill(kafka, topic, 400)
    outsider.assign(outsider.partitions_for(topic))
    # one record: the others that were fetched with it wait in the client
    while not (given := outsider.poll(0.1, 1)):
        pass
    (first,) = given
    outsider.pause([(first.topic, first.partition)])
    others = gather(outsider, 400, 3.0)
    assert others
    assert all(batch.partition != first.partition for batch in others)
    outsider.resume([(first.topic, first.partition)])
    rest = gather(outsider, 400 - 1 - sum(map(len, others)))
    assert 1 + sum(map(len, others)) + sum(map(len, rest)) == 400


def test_a_record_after_a_resume_does_not_wait_for_a_turn_of_the_client(kafka: KafkaSettings, topic: str) -> None:
    producer = make_producer(kafka)
    waits_s = []
    for _ in range(4):
        producer.send(topic, b"k", b"v")
        producer.flush(20)
        with closing(make_consumer(kafka, None)) as consumer:
            partitions = consumer.partitions_for(topic)
            consumer.assign(partitions)
            consumer.pause(partitions)
            time.sleep(0.1)
            for partition, end in consumer.end_offsets(partitions).items():
                consumer.seek(partition, end)
            consumer.resume(partitions)
            began_s = time.monotonic()
            producer.send(topic, b"k", b"v")
            producer.flush(20)
            while not consumer.poll(0.02, 1_000):
                pass
            waits_s.append(time.monotonic() - began_s)
    producer.close(5)
    # librdkafka alone needs a second in half of the attempts
    assert max(waits_s) < 0.5


def test_seek_goes_back_and_positions_tell(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    fill(kafka, topic, 100)
    partitions = reader.partitions_for(topic)
    first = gather(reader, 100)
    ends = reader.end_offsets(partitions)
    assert {partition: reader.position(partition) for partition in partitions} == ends
    assert reader.beginning_offsets(partitions) == dict.fromkeys(partitions, 0)
    for partition in partitions:
        reader.seek(partition, 0)
    assert values(gather(reader, 100)) == values(first)


@pytest.mark.parametrize(("poll_s", "work_s"), [(0.05, 0.02), (0.001, 0.01), (0.0, 0.05)])
def test_a_member_with_short_polls_and_work_between_them_joins(
    kafka: KafkaSettings, topic: str, poll_s: float, work_s: float
) -> None:
    with joined(kafka, topic) as consumer:
        deadline_s = time.monotonic() + 30
        while not consumer.assignment():
            assert time.monotonic() < deadline_s, "never joined"
            consumer.poll(poll_s, 10)
            time.sleep(work_s)


def test_wake_ends_a_poll_that_waits_and_only_one(reader: ConsumerClient) -> None:
    reader.poll(0.2, 10)
    threading.Timer(0.2, reader.wake).start()
    started_s = time.monotonic()
    assert reader.poll(60.0, 10) == []
    assert 0.15 < time.monotonic() - started_s < 20
    started_s = time.monotonic()
    assert reader.poll(0.3, 10) == []
    assert time.monotonic() - started_s > 0.25


def test_subscribing_to_a_missing_topic_is_refused(kafka: KafkaSettings) -> None:
    with closing(make_consumer(kafka, kafka.group)) as consumer, pytest.raises(BrokerError, match="no topic nowhere"):
        consumer.subscribe(["nowhere"], ignore, ignore)


@librdkafka_only
def test_a_second_member_gets_its_share_and_the_first_may_commit_before(kafka: KafkaSettings, topic: str) -> None:
    fill(kafka, topic, 10)
    first, second = make_consumer(kafka, kafka.group), make_consumer(kafka, kafka.group)
    events, gained = Events(), Events()
    threads: set[str] = set()

    def revoked(partitions: list[Partition]) -> None:
        threads.add(threading.current_thread().name)
        first.commit(dict.fromkeys(partitions, (3, "on revoke")))
        events.note("revoked")(partitions)

    with closing(first), closing(second):
        first.subscribe([topic], events.note("assigned"), revoked, events.note("lost"))
        poll_until([first], lambda: len(first.assignment()) == 2)
        assert events.seen == [("assigned", [(topic, 0), (topic, 1)])]
        second.subscribe([topic], gained.note("assigned"), ignore)
        poll_until([first, second], lambda: len(first.assignment()) == len(second.assignment()) == 1)
        moved, stayed = list(second.assignment()), list(first.assignment())
        assert events.seen[1:] == [("revoked", moved)]
        assert gained.seen == [("assigned", moved)]
        assert second.committed([(topic, 0), (topic, 1)]) == {moved[0]: (3, "on revoke")}
    assert events.seen[2:] in ([("revoked", stayed)], [("assigned", moved), ("revoked", [(topic, 0), (topic, 1)])])
    assert not any(name.startswith("kafka-io") for name in threads)


@kafka_python_only
def test_kafka_python_gives_up_all_partitions_and_takes_some_up_from_their_committed_offsets(
    kafka: KafkaSettings, topic: str
) -> None:
    fill(kafka, topic, 40)
    first, events = make_consumer(kafka, kafka.group), Events()
    both = [(topic, 0), (topic, 1)]

    def revoked(partitions: list[Partition]) -> None:
        assert first.assignment() == set()
        first.commit(dict.fromkeys(partitions, (3, "on revoke")))
        events.note("revoked")(partitions)

    with closing(first):
        first.subscribe([topic], events.note("assigned"), revoked, events.note("lost"))
        poll_until([first], lambda: len(first.assignment()) == 2)
        # what was fetched and not returned must not count as read; a partition that comes back is not paused any more
        first.pause(both)
        with joined(kafka, topic) as second:
            poll_until([first, second], lambda: len(first.assignment()) == len(second.assignment()) == 1)
            (stayed,), (moved,) = first.assignment(), second.assignment()
            assert events.seen == [("assigned", both), ("revoked", both), ("assigned", [stayed])]
            assert second.committed(both) == dict.fromkeys(both, (3, "on revoke"))
            ends = first.end_offsets(both)
            for consumer, partition in ((first, stayed), (second, moved)):
                consumer.seek(partition, 3)
                batches = gather(consumer, ends[partition] - 3)
                assert {(batch.topic, batch.partition) for batch in batches} == {partition}
                assert (batches[0].offsets[0], sum(map(len, batches))) == (3, ends[partition] - 3)


def test_a_member_without_partitions_has_joined(kafka: KafkaSettings, topic: str) -> None:
    with joined(kafka, topic) as first, joined(kafka, topic) as second:
        poll_until([first, second], lambda: len(first.assignment()) == len(second.assignment()) == 1)
        with joined(kafka, topic) as third:
            assert not third.joined()
            poll_until([first, second, third], lambda: first.joined() and second.joined() and third.joined())
            assert third.assignment() == set()


def test_a_consumer_outside_any_group_never_joins(reader: ConsumerClient) -> None:
    reader.poll(0.1, 10)
    assert not reader.joined()


def test_closing_calls_back_while_commits_are_still_accepted(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.kafka_consumer.CLOSE_TIMEOUT_S", 60.0)
    consumer = make_consumer(kafka, kafka.group)
    consumer.subscribe([topic], ignore, lambda partitions: consumer.commit(dict.fromkeys(partitions, (0, "bye"))))
    poll_until([consumer], lambda: len(consumer.assignment()) == 2)
    started_s = time.monotonic()
    consumer.close()
    assert time.monotonic() - started_s < 20
    with closing(make_consumer(kafka, kafka.group)) as other:
        assert set(other.committed([(topic, 0)]).values()) == {(0, "bye")}


def test_what_a_callback_raises_comes_out_of_poll(kafka: KafkaSettings, topic: str) -> None:
    def fail(partitions: list[Partition]) -> None:
        raise BrokerError("no snapshot")

    with joined(kafka, topic, fail, ignore) as consumer, pytest.raises(BrokerError, match="no snapshot"):
        poll_until([consumer], lambda: False, 20)


def test_a_cut_log_stops_the_consumer_with_a_choice(kafka: KafkaSettings, topic: str, outsider: ConsumerClient) -> None:
    fill(kafka, topic, 10)
    partition = outsider.partitions_for(topic)[0]
    outsider.assign([partition])
    outsider.seek(partition, 1_000_000)
    with pytest.raises(BrokerError, match="no longer has the requested offsets"):
        poll_until([outsider], lambda: False, 10)


class NotUtf8(str):
    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        return b"a\xff\xfe"


def send_hostile(kafka: KafkaSettings, topic: str) -> None:
    """Four records of one key, of which the second and third have header names that are not UTF-8."""
    # the other binding cannot send such a name
    producer = make_producer(msgspec.structs.replace(kafka, client="kafka-python"))
    producer.send(topic, b"k", b"before")
    producer.send(topic, b"k", b"hostile", [("fine", b"1"), (NotUtf8("abc"), b"\xff"), ("last", b"3")])
    producer.send(topic, b"k", b"more", [(NotUtf8("abc"), b""), (NotUtf8("abc"), b"2")])
    producer.send(topic, b"k", b"after", [("fine", b"4")])
    producer.close(20)


@librdkafka_only
def test_a_header_name_that_is_not_utf8_does_not_stop_the_partition(
    kafka: KafkaSettings, topic: str, reader: ConsumerClient
) -> None:
    send_hostile(kafka, topic)
    batch = gather_joined(reader, 4)
    assert batch.values == [b"before", b"hostile", b"more", b"after"]
    assert list(batch.headers[1]) == [("fine", b"1"), ("?", b"\xff"), ("last", b"3")]
    assert list(batch.headers[2]) == [("?", b""), ("?", b"2")]
    assert (list(batch.headers[0]), list(batch.headers[3])) == ([], [("fine", b"4")])


@kafka_python_only
@pytest.mark.timeout(60)
def test_a_header_name_that_is_not_utf8_stops_kafka_python_with_the_remedy(kafka: KafkaSettings, topic: str) -> None:
    send_hostile(kafka, topic)
    for _ in range(2):
        with closing(make_consumer(kafka, None)) as consumer:
            consumer.assign(consumer.partitions_for(topic))
            assert values(gather(consumer, 1)) == [b"before"]
            for _ in range(2):
                # its own second poll would never return
                with pytest.raises(BrokerError, match=r'set kafka\.client to "librdkafka"') as caught:
                    gather(consumer, 1)
                assert "\n" not in str(caught.value)


def test_a_failed_delivery_surfaces_in_flush_and_stays(kafka: KafkaSettings) -> None:
    small = f"small-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(small, 1, settings={"max.message.bytes": "1000"})])
    producer = make_producer(kafka)
    delivery = producer.send(small, b"k", b"x" * 5_000)
    with pytest.raises(BrokerError, match=r"not delivered.*(MessageSizeTooLarge|Message size too large)"):
        producer.flush(20)
    with pytest.raises(BrokerError, match="not delivered"):
        delivery.done()
    with pytest.raises(BrokerError, match="not delivered"):
        producer.send(small, b"k", b"fine")
    with pytest.raises(BrokerError, match="not delivered"):
        producer.close(5)


def test_sending_to_a_missing_topic_is_one_line(kafka: KafkaSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.kafka.limits.REQUEST_TIMEOUT_MS", 1_000)
    producer = make_producer(kafka)

    def send() -> None:
        producer.send("nowhere", b"k", b"v")
        producer.flush(20)

    with pytest.raises(BrokerError, match="to nowhere") as caught:
        send()
    with suppress(BrokerError):
        producer.close(5)
    assert "\n" not in str(caught.value)


def test_what_waits_to_be_delivered_is_bounded(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.UNDELIVERED_MAX", 100)
    producer = make_producer(kafka)
    most = most_waiting(producer, topic, 2_000)
    producer.close(20)
    assert most <= 100


@librdkafka_only
def test_records_that_do_not_go_end_the_wait_for_room(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lingering(ProducerHandle):
        """Its flush does not hasten the records, whose acknowledgement could come before it returns."""

        def flush(self, timeout_s: float) -> int:
            del timeout_s
            return len(self)

    monkeypatch.setattr("streaming.kafka.rdkafka_producer.ProducerHandle", Lingering)
    monkeypatch.setattr("streaming.kafka.limits.UNDELIVERED_MAX", 1)
    producer = RdkafkaProducer(kafka, {"linger.ms": 30_000})
    monkeypatch.setattr("streaming.kafka.limits.REQUEST_TIMEOUT_MS", 300)
    delivery = producer.send(topic, b"k", b"v")
    with pytest.raises(BrokerError, match="1 records wait to be delivered"):
        producer.send(topic, b"k", b"v")
    with pytest.raises(BrokerError, match="1 records were not acknowledged"):
        producer.close(0)
    with pytest.raises(BrokerError, match="closed"):
        producer.send(topic, b"k", b"v")
    assert not delivery.done()


@librdkafka_only
def test_ends_are_returned_at_once_while_a_fetch_waits(
    kafka: KafkaSettings, topic: str, reader: ConsumerClient
) -> None:
    # on the connection of the fetches an answer takes as long as they do, 50 ms, and again for each partition
    partitions = reader.partitions_for(topic)
    assert reader.poll(0.2, 10) == []
    took_s = []
    for _ in range(11):
        started_s = time.monotonic()
        reader.end_offsets(partitions)
        took_s.append(time.monotonic() - started_s)
    # the quickest: a busy machine delays some, such a connection would delay each
    assert min(took_s) < 0.03


@kafka_python_only
def test_records_that_linger_end_the_wait_for_room(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.UNDELIVERED_MAX", 1)
    monkeypatch.setattr("streaming.kafka.limits.LINGER_MS", 30_000)
    producer = KafkaPythonProducer(kafka)
    monkeypatch.setattr("streaming.kafka.limits.REQUEST_TIMEOUT_MS", 300)
    producer.send(topic, b"k", b"v")
    with pytest.raises(BrokerError, match="1 records wait to be delivered"):
        producer.send(topic, b"k", b"v")
    monkeypatch.undo()
    producer.close(10)


def test_a_missing_topic_is_named(kafka: KafkaSettings, topic: str, outsider: ConsumerClient) -> None:
    assert missing_topics(kafka, ["nowhere", topic]) == ["nowhere"]
    assert ensure_topics(kafka, [TopicSpec(topic, 9)]) == []
    assert outsider.partitions_for(topic) == [(topic, 0), (topic, 1)]
    with pytest.raises(BrokerError, match="no topic nowhere"):
        outsider.partitions_for("nowhere")


def test_waiting_for_a_broker_ends_in_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    reports: list[str] = []
    started_s = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        wait_for_broker(KafkaSettings(bootstrap=f"127.0.0.1:{port}"), 1.0, reports.append)
    assert 0.9 < time.monotonic() - started_s < 20
    line = str(caught.value)
    assert "\n" not in line
    assert f"127.0.0.1:{port}" in line
    assert "connection refused" in line
    assert "KAFKA_BOOTSTRAP" in line
    assert reports
    assert all("waiting for Kafka" in report for report in reports)


def test_a_listener_that_is_no_broker_ends_the_wait_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = KafkaSettings(bootstrap=f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(BrokerError, match="does not answer the Kafka protocol"):
            wait_for_broker(settings, 1.0, lambda line: None)


def test_the_wait_backs_off_with_jitter_and_ends_when_the_broker_is_there(kafka: KafkaSettings) -> None:
    wait_for_broker(kafka, 10, pytest.fail)
    pauses: list[float] = []
    with pytest.raises(BrokerError):
        wait_for_broker(
            KafkaSettings(bootstrap="127.0.0.1:1"), 0.5, lambda line: None,
            sleep=lambda pause_s: (pauses.append(pause_s), time.sleep(0.1))[0], chance=lambda: 1.0,
        )  # fmt: skip
    assert pauses[:2] == [pytest.approx(0.1), pytest.approx(0.2)]


@pytest.mark.parametrize("client", ["librdkafka", "kafka-python"])
@pytest.mark.parametrize("make", [lambda kafka: make_consumer(kafka, None), make_producer])
def test_an_unreachable_broker_is_one_line_for_clients_too(
    client: ClientName, make: Callable[[KafkaSettings], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.BOOTSTRAP_TIMEOUT_S", 0.5)
    with pytest.raises(BrokerError, match=r"Kafka at 127\.0\.0\.1:1: connecting") as caught:
        make(KafkaSettings(bootstrap="127.0.0.1:1", client=client))
    assert "\n" not in str(caught.value)


def test_security_settings_reach_the_vendor_and_passwords_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    monkeypatch.setenv("KEY_PASSWORD", "hunter3")
    security = SecuritySettings(
        protocol="SASL_SSL", ca_file="ca.pem", certificate_file="me.pem", key_file="key.pem",
        key_password_env="KEY_PASSWORD", sasl_mechanism="SCRAM-SHA-256", username="cascade",
        password_env="KAFKA_PASSWORD",
    )  # fmt: skip
    settings = connection_settings(KafkaSettings(bootstrap="a:1,b:2", security=security), "id")
    assert settings == {
        "bootstrap_servers": ["a:1", "b:2"], "client_id": "id", "security_protocol": "SASL_SSL",
        "ssl_check_hostname": True, "ssl_cafile": "ca.pem", "ssl_certfile": "me.pem", "ssl_keyfile": "key.pem",
        "ssl_password": "hunter3", "sasl_mechanism": "SCRAM-SHA-256", "sasl_plain_username": "cascade",
        "sasl_plain_password": "hunter2",
    }  # fmt: skip
    assert "hunter" not in repr(settings)
    settings = rdkafka_settings(KafkaSettings(bootstrap="a:1,b:2", security=security), "id", lambda error: None)
    assert {name: setting for name, setting in settings.items() if name.startswith(("bootstrap", "s"))} == {
        "bootstrap.servers": "a:1,b:2", "security.protocol": "SASL_SSL",
        "ssl.ca.location": "ca.pem", "ssl.certificate.location": "me.pem", "ssl.key.location": "key.pem",
        "ssl.key.password": "hunter3", "sasl.mechanisms": "SCRAM-SHA-256", "sasl.username": "cascade",
        "sasl.password": "hunter2", "socket.keepalive.enable": True, "socket.nagle.disable": True,
        "socket.timeout.ms": 15_000,
    }  # fmt: skip
    assert "hunter" not in repr(settings)


def test_keys_and_values_do_not_reach_the_log(
    kafka: KafkaSettings, topic: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kafka"), "level", logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    producer = make_producer(kafka)
    producer.send(topic, b"4000123412341234", b"4000123412341234")
    producer.close(20)
    assert "4000123412341234" not in caplog.text


def test_a_topic_that_cannot_be_made_is_one_line(kafka: KafkaSettings) -> None:
    with pytest.raises(BrokerError, match=r"no/name") as caught:
        ensure_topics(kafka, [TopicSpec("no/name", 1)])
    assert "\n" not in str(caught.value)


@contextmanager
def silent_address() -> Iterator[str]:
    """An address that takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        yield f"127.0.0.1:{mute.getsockname()[1]}"


@librdkafka_only
def test_some_of_the_addresses_may_be_down(kafka: KafkaSettings, topic: str) -> None:
    with silent_address() as silent:
        some = msgspec.structs.replace(kafka, bootstrap=f"127.0.0.1:1,{silent},{kafka.bootstrap}")
        wait_for_broker(some, 30, lambda line: None)
        assert ensure_topics(some, [TopicSpec(topic)]) == []
        fill(some, topic, 1)


@kafka_python_only
def test_a_silent_address_may_use_up_the_time_of_kafka_python_to_connect(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.BOOTSTRAP_TIMEOUT_S", 2.0)
    # it tries an address by chance
    with silent_address() as silent:
        port = int(silent.rpartition(":")[2])
        monkeypatch.setattr("random.choice", lambda brokers: next(broker for broker in brokers if broker.port == port))
        some = msgspec.structs.replace(kafka, bootstrap=f"{silent},{kafka.bootstrap}")
        with pytest.raises(BrokerError, match="connecting"):
            fill(some, topic, 1)


def test_a_topic_can_be_compacted_and_cut(kafka: KafkaSettings) -> None:
    name = f"t-{uuid.uuid4().hex}"
    settings = {"cleanup.policy": "compact,delete", "retention.ms": "86400000"}
    assert ensure_topics(kafka, [TopicSpec(name, 1, settings=settings)]) == [name]
    with closing(KafkaAdminClient(bootstrap_servers=kafka.servers)) as admin:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    assert "compact,delete" in str(found)
    assert "86400000" in str(found)


def test_offsets_of_a_time(kafka: KafkaSettings, topic: str, outsider: ConsumerClient) -> None:
    producer = make_producer(kafka)
    producer.send_many(topic, [b"k"] * 3, [b"v"] * 3, [1_000, 2_000, 3_000])
    producer.close(10)
    full, empty = sorted([(topic, 0), (topic, 1)], key=lambda partition: -outsider.end_offsets([partition])[partition])
    assert outsider.offsets_at([full, empty], 1_500) == {full: 1, empty: 0}
    assert outsider.offsets_at([full], 3_001) == {full: 3}
