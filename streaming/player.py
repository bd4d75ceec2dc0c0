"""Playing a data file into Kafka: transactions at their times, labels `label.delay` after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Int64
from cascade.config import Config
from cascade.frames import LabelledData
from cascade.schema import Schema
from stages.offline import labels_of
from streaming.clients import ProducerClient
from streaming.codecs import Codec, topic_codec
from streaming.decisions import message_keys

Progress = Callable[[float], None]
# Records that are sent before the labels that are due among them are confirmed, and the pace is looked at again.
CHUNK_ROWS_MAX = 2_000
# The finest step of the schedule: records due within it leave together.
TICK_S = 0.002
FLUSH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Played:
    """What was played, and how long it took; `behind_s_max`: how late the worst record left against the schedule."""

    transactions: int
    labels: int
    elapsed_s: float
    behind_s_max: float


class Player:
    """Sends transactions and the chargebacks among them, in order of time.

    A label is sent for each fraud (what is not charged back counts as genuine), `label.delay` after its transaction.
    Labels are confirmed by the broker before any later transaction is sent, so a consumer that reads labels up to
    their end first sees what was known at the time.
    """

    def __init__(
        self, schema: Schema, codec: Codec, label_codec: Codec, producer: ProducerClient, topics: tuple[str, str]
    ) -> None:
        """`topics`: of transactions and of labels."""
        self._schema = schema
        self._codec = codec
        self._label_codec = label_codec
        self._producer = producer
        self._transactions_topic, self._labels_topic = topics

    @classmethod
    def from_config(cls, config: Config, schema: Schema, producer: ProducerClient) -> Player:
        """A player in the codec and to the topics of a configuration."""
        bytes_max, topics = config.worker.message_bytes_max, config.kafka.topics
        return cls(
            schema,
            topic_codec(config.kafka, topics.transactions, schema.fields, bytes_max),
            topic_codec(config.kafka, topics.labels, schema.label_fields(), bytes_max),
            producer,
            (topics.transactions, topics.labels),
        )

    def play(self, data: LabelledData, rows: slice, rate: float | None, progress: Progress) -> Played:
        """Send the `rows` of `data`; `rate`: mean transactions a second, at the data's own rhythm; None: no pace.

        Labels of earlier transactions are sent too, once due: those due before the first row, ahead of it. A label
        that was played before changes nothing.
        """
        first, end, _ = rows.indices(data.batch.rows)
        times = data.batch[self._schema.roles.event_time]
        frauds = np.flatnonzero(data.fraud)
        due = times[frauds] + self._schema.label.delay_ms
        departures = schedule(times[first:end], rate)
        # those of the past first: the schedule starts when they are told
        told = int(np.searchsorted(due, times[first], side="right")) if first < end else 0
        self._send_labels(data.take(frauds[:told]))
        started_s = time.perf_counter()
        sent, behind_s_max = first, 0.0
        while sent < end:
            elapsed_s = time.perf_counter() - started_s
            until = end if rate is None else first + int(np.searchsorted(departures, elapsed_s, side="right"))
            until = min(until, sent + CHUNK_ROWS_MAX)
            if until == sent:
                time.sleep(min(max(departures[sent - first] - elapsed_s, 0.0), TICK_S))
                continue
            if rate is not None:
                behind_s_max = max(behind_s_max, elapsed_s - float(departures[sent - first]))
            known = int(np.searchsorted(due, times[until - 1], side="right"))
            if known > told:
                self._send_labels(data.take(frauds[told:known]))
                told = known
            self._send(data.take(np.arange(sent, until)))
            sent = until
            progress((sent - first) / (end - first))
        self._producer.flush(FLUSH_TIMEOUT_S)
        return Played(end - first, told, time.perf_counter() - started_s, behind_s_max)

    def _send(self, rows: LabelledData) -> None:
        keys: Sequence[bytes] = message_keys(rows.batch[self._schema.roles.card])
        self._producer.send_many(self._transactions_topic, keys, self._codec.encode(rows.batch))

    def _send_labels(self, rows: LabelledData) -> None:
        if not rows.batch.rows:
            return
        labels = labels_of(rows, self._schema.label.field)
        keys = message_keys(labels[self._schema.roles.card])
        self._producer.send_many(self._labels_topic, keys, self._label_codec.encode(labels))
        self._producer.flush(FLUSH_TIMEOUT_S)


def schedule(times_ms: Int64, rate: float | None) -> Array:
    """Seconds after the start at which each record leaves, float64 [rows]: event times, scaled to the mean rate.

    The first leaves at 0; gaps keep their proportions, so rush hours stay rush hours.
    """
    if rate is None or len(times_ms) < 2 or times_ms[-1] == times_ms[0]:
        return np.zeros(len(times_ms)) if rate is None else np.arange(len(times_ms)) / rate
    elapsed = (times_ms - times_ms[0]).astype(np.float64)
    departures: Array = elapsed / elapsed[-1] * (len(times_ms) - 1) / rate
    return departures
