from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.bundle import load_bundle
from cascade.config import Config, KafkaSettings, TopicSettings
from cascade.frames import LabelledData, frame_to_batch
from cascade.schema import Schema
from cascade.simulator import SimulatorSettings, simulate
from streaming.clients import Delivery, make_consumer, make_producer
from streaming.clients.kafka_producer import KafkaPythonProducer
from streaming.codecs import codec
from streaming.decisions import message_keys
from streaming.player import Played, Player, schedule
from tests.conftest import Broker

SHIPPED = Path(__file__).parents[2] / "cascade" / "bundles" / "simulator"


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=50), st.floats(0.1, 1e5))
def test_the_schedule_has_the_proportions_of_the_gaps(gaps: list[int], rate: float) -> None:
    times = np.cumsum(gaps) + 1_735_700_000_000
    departures = schedule(times, rate)
    assert departures[0] == 0
    assert departures[-1] == pytest.approx((len(times) - 1) / rate), "the mean rate must be the one that was asked for"
    if times[-1] > times[0]:
        scale = (times[-1] - times[0]) / departures[-1]
        np.testing.assert_allclose(np.diff(departures) * scale, np.diff(times), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("times", [[5], [], [7, 7, 7]])
def test_times_without_a_span_are_spread_evenly(times: list[int]) -> None:
    assert schedule(np.array(times, np.int64), 10.0).tolist() == pytest.approx([n / 10 for n in range(len(times))])


def test_without_a_rate_all_is_due_at_once() -> None:
    assert schedule(np.array([1, 5_000, 9_000]), None).tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def schema() -> Schema:
    return load_bundle(SHIPPED).schema


@pytest.fixture(scope="module")
def data(schema: Schema) -> LabelledData:
    frame = simulate(SimulatorSettings(cards=80, terminals=60, days=15, seed=4, fraud_share=0.05))
    return LabelledData(frame_to_batch(frame, schema, "simulated"), frame["fraud"].to_numpy().astype(np.int64))


@pytest.fixture
def config(broker: Broker, new_topic: Callable[..., str]) -> Config:
    # the broker's clock says what was there first
    topics = TopicSettings(
        transactions=new_topic(message_timestamp_type="LogAppendTime"),
        labels=new_topic(message_timestamp_type="LogAppendTime"),
    )
    return Config(kafka=KafkaSettings(bootstrap=broker.bootstrap, group=f"g-{uuid.uuid4().hex}", topics=topics))


def play(config: Config, schema: Schema, data: LabelledData, rows: slice, rate: float | None = None) -> Played:
    with_rows = make_producer(config.kafka)
    try:
        return Player.from_config(config, schema, with_rows).play(data, rows, rate, lambda _: None)
    finally:
        with_rows.close(10)


def records(config: Config, topic: str) -> tuple[list[bytes | None], list[bytes | None], list[int]]:
    """Keys, values and times of append, in the order of the log."""
    keys, values, times = [], [], []
    with closing(make_consumer(config.kafka, None)) as consumer:
        partitions = consumer.partitions_for(topic)
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        give_up_s = time.monotonic() + 30
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            assert time.monotonic() < give_up_s
            for fetched in consumer.poll(0.1, 10_000):
                keys += fetched.keys
                values += fetched.values
                times += fetched.timestamps_ms.tolist()
    return keys, values, times


@pytest.mark.kafka
def test_what_is_played_is_what_is_read(config: Config, schema: Schema, data: LabelledData) -> None:
    played = play(config, schema, data, slice(None))
    keys, values, _ = records(config, config.kafka.topics.transactions)
    decoded = codec("json", schema.fields, 65_536).decode(values)
    assert decoded.rejects == []
    assert played.transactions == decoded.batch.rows == data.batch.rows
    for name in schema.fields:
        np.testing.assert_array_equal(decoded.batch[name], data.batch[name])
    assert keys == message_keys(data.batch["card_id"])


@pytest.mark.kafka
def test_a_label_is_there_before_any_transaction_after_its_delay(
    config: Config, schema: Schema, data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmed: list[tuple[str, int]] = []

    send_many, flush = KafkaPythonProducer.send_many, KafkaPythonProducer.flush
    waiting: list[tuple[str, int]] = []

    def watched_send(self: KafkaPythonProducer, topic: str, *arguments: object) -> Delivery:
        waiting.append((topic, len(arguments[1])))
        if topic == config.kafka.topics.transactions:
            confirmed.append(waiting.pop())
        return send_many(self, topic, *arguments)

    def watched_flush(self: KafkaPythonProducer, timeout_s: float) -> None:
        flush(self, timeout_s)
        confirmed.extend(waiting)
        waiting.clear()

    monkeypatch.setattr(KafkaPythonProducer, "send_many", watched_send)
    monkeypatch.setattr(KafkaPythonProducer, "flush", watched_flush)
    monkeypatch.setattr("streaming.player.CHUNK_ROWS_MAX", 40)
    played = play(config, schema, data, slice(None))

    times, frauds = data.batch["event_time"], np.flatnonzero(data.fraud)
    due = times[frauds] + schema.label.delay_ms
    labels = sent = 0
    for topic, count in confirmed:
        if topic == config.kafka.topics.labels:
            labels += count
            continue
        sent += count
        assert labels >= np.searchsorted(due, times[sent - 1], side="right"), "a label was not confirmed in time"
        assert labels == 0 or due[labels - 1] <= times[sent - 1], "a label was sent before its delay"
    assert sent == data.batch.rows
    assert played.labels == labels == int((due <= times[-1]).sum()) > 10


@pytest.mark.kafka
def test_labels_stand_in_the_log_before_the_transactions_after_them(
    config: Config, schema: Schema, data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.player.CHUNK_ROWS_MAX", 40)
    play(config, schema, data, slice(None))
    _, values, label_times = records(config, config.kafka.topics.labels)
    labels = codec("json", schema.label_fields(), 65_536).decode(values).batch
    _, _, times = records(config, config.kafka.topics.transactions)
    assert set(labels["fraud"].tolist()) == {1}
    due = labels["event_time"] + schema.label.delay_ms
    first_after = np.searchsorted(data.batch["event_time"], due, side="left")
    behind = first_after < len(times)
    assert behind.sum() > 10
    # millisecond stamps: the same one for both is possible
    assert (np.array(label_times)[behind] <= np.array(times)[first_after[behind]]).all()


@pytest.mark.kafka
def test_a_later_part_brings_the_labels_of_the_earlier_ones_with_it(
    config: Config, schema: Schema, data: LabelledData
) -> None:
    middle = data.batch.rows - 100
    played = play(config, schema, data, slice(middle, None))
    due = data.batch["event_time"][np.flatnonzero(data.fraud)] + schema.label.delay_ms
    assert played.transactions == 100
    assert played.labels == int((due <= data.batch["event_time"][-1]).sum())


@pytest.mark.kafka
def test_the_pace_is_the_one_asked_for(config: Config, schema: Schema, data: LabelledData) -> None:
    played = play(config, schema, data, slice(0, 200), rate=200.0)
    assert played.elapsed_s >= 199 / 200
    assert played.elapsed_s < 4
    assert played.behind_s_max < 2
    _, _, times = records(config, config.kafka.topics.transactions)
    wanted_ms = 1e3 * schedule(data.batch["event_time"][:200], 200.0)
    # never before its time; the first record's own delay is not known, hence the slack
    assert (np.array(times) - times[0] - wanted_ms).min() > -500


@pytest.mark.kafka
def test_nothing_to_play_is_nothing(config: Config, schema: Schema, data: LabelledData) -> None:
    assert play(config, schema, data, slice(0, 0)).transactions == 0
