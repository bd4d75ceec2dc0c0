from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cluster import simulated
from bench.embedded import play_file
from cascade.bundle import SHIPPED_BUNDLE, Bundle
from cascade.config import BundleSettings, Config, KafkaSettings, TopicSettings
from cascade.frames import LabelledData
from cascade.schema import Schema
from streaming.codecs import codec
from streaming.kafka import make_consumer
from streaming.pipeline.decisions import message_keys
from streaming.player import Played, Player, schedule
from tests.conftest import Broker
from tests.streaming.kafka.helpers import gather_joined


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


@pytest.fixture
def schema(bundle: Bundle) -> Schema:
    return bundle.schema


@pytest.fixture(scope="module")
def data(bundle: Bundle) -> LabelledData:
    return simulated(bundle.schema, cards=80, terminals=60, days=15, seed=4, fraud_share=0.05)


class Recorder:
    """A producer that stores what was sent, in order of acknowledgement: transactions at once, labels with `flush`."""

    def __init__(self) -> None:
        self.sent_s: list[float] = []
        self.acknowledged: list[tuple[str, list[bytes]]] = []
        self._labels: list[tuple[str, list[bytes]]] = []

    def send_many(self, topic: str, keys: list[bytes], values: list[bytes]) -> None:
        self.sent_s += [time.perf_counter()] * len(values)
        (self._labels if topic == "labels" else self.acknowledged).append((topic, values))

    def flush(self, timeout_s: float) -> None:
        self.acknowledged += self._labels
        self._labels.clear()


def play(schema: Schema, data: LabelledData, rows: slice, rate: float | None = None) -> tuple[Played, Recorder]:
    recorder: Any = Recorder()
    return Player(Config(), schema, recorder).play(data, rows, rate, lambda _: None), recorder


@pytest.mark.kafka
def test_what_is_played_is_what_is_read(
    broker: Broker, new_topic: Callable[..., str], schema: Schema, data: LabelledData
) -> None:
    topics = TopicSettings(transactions=new_topic(), labels=new_topic())
    kafka = KafkaSettings(bootstrap=broker.bootstrap, topics=topics)
    config = Config(kafka=kafka, bundle=BundleSettings(str(SHIPPED_BUNDLE)))
    played = play_file(config, data, slice(None), None, lambda _: None)
    with closing(make_consumer(kafka, None)) as consumer:
        consumer.assign([(topics.transactions, 0)])
        fetched = gather_joined(consumer, data.batch.rows)
    decoded = codec("json", schema.fields, 65_536).decode(fetched.values)
    assert decoded.rejects == []
    assert played.transactions == decoded.batch.rows == data.batch.rows
    for name in schema.fields:
        np.testing.assert_array_equal(decoded.batch[name], data.batch[name])
    assert fetched.keys == message_keys(data.batch["card_id"])


def test_a_label_is_there_before_any_transaction_after_its_delay(
    schema: Schema, data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.player.CHUNK_ROWS_MAX", 40)
    played, recorder = play(schema, data, slice(None))
    times, frauds = data.batch["event_time"], np.flatnonzero(data.fraud)
    due = times[frauds] + schema.label.delay_ms
    labels: list[bytes] = []
    sent = 0
    for topic, values in recorder.acknowledged:
        if topic == "labels":
            labels += values
            continue
        sent += len(values)
        assert len(labels) >= np.searchsorted(due, times[sent - 1], side="right"), "a label came too late"
        assert not labels or due[len(labels) - 1] <= times[sent - 1], "a label was sent before its delay"
    assert sent == data.batch.rows
    assert played.labels == len(labels) == int((due <= times[-1]).sum()) > 10
    read = codec("json", schema.label_fields(), 65_536).decode(labels).batch
    assert set(read["fraud"].tolist()) == {1}
    assert read["event_time"].tolist() == times[frauds][: len(labels)].tolist()


def test_a_later_part_brings_the_labels_of_the_earlier_ones_with_it(schema: Schema, data: LabelledData) -> None:
    played, _ = play(schema, data, slice(data.batch.rows - 100, None))
    due = data.batch["event_time"][np.flatnonzero(data.fraud)] + schema.label.delay_ms
    assert played.transactions == 100
    assert played.labels == int((due <= data.batch["event_time"][-1]).sum())


def test_the_pace_is_the_one_asked_for(schema: Schema, data: LabelledData) -> None:
    played, recorder = play(schema, data, slice(0, 200), rate=200.0)
    assert 199 / 200 <= played.elapsed_s < 4
    assert played.behind_s_max < 2
    wanted_s = schedule(data.batch["event_time"][:200], 200.0)
    sent_s = np.array(recorder.sent_s[-200:])
    assert (sent_s - sent_s[0] - wanted_s).min() > -0.5, "sent before its time"


def test_nothing_to_play_is_nothing(schema: Schema, data: LabelledData) -> None:
    assert play(schema, data, slice(0, 0))[0].transactions == 0
