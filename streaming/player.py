"""Plays a data file into Kafka: transactions in the rhythm of their event times, labels `label.delay` later."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Int64
from cascade.config import Config
from cascade.frames import LabelledData
from cascade.schema import Schema
from stages.offline import labels_of
from streaming.codecs import topic_codec
from streaming.kafka import ProducerClient
from streaming.pipeline.decisions import message_keys

Progress = Callable[[float], None]
# The most transactions that are sent before the due labels among them and the schedule are checked again.
CHUNK_ROWS_MAX = 2_000
# The resolution of the schedule: records due within it are sent together.
TICK_S = 0.002
FLUSH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Played:
    """The number of records sent, and the time; `behind_s_max`: the greatest delay against the schedule."""

    transactions: int
    labels: int
    elapsed_s: float
    behind_s_max: float


class Player:
    """Sends transactions and the labels of frauds, in order of time.

    The label of a fraud is due `label.delay` after its transaction; transactions without a label are genuine. Due
    labels are acknowledged before the next transaction is sent, so that a consumer which reads the labels up to their
    end first has exactly the labels that were known at that time. The configuration names the topics and the codec.
    """

    def __init__(self, config: Config, schema: Schema, producer: ProducerClient) -> None:
        bytes_max, topics = config.worker.message_bytes_max, config.kafka.topics
        self._schema, self._producer = schema, producer
        self._transactions_topic, self._labels_topic = topics.transactions, topics.labels
        self._codec = topic_codec(config.kafka, topics.transactions, schema.fields, bytes_max)
        self._label_codec = topic_codec(config.kafka, topics.labels, schema.label_fields(), bytes_max)

    def play(self, data: LabelledData, rows: slice, rate: float | None, progress: Progress) -> Played:
        """Sends rows of a data file.

        data: the whole file, in order of event time. rows: to send. rate: mean transactions per second, in the rhythm
        of the event times; None: as fast as possible. progress: called with the share that is sent.

        Labels of transactions before `rows` are sent too: those due before the first row, ahead of it. Playing a label
        twice changes nothing.
        """
        first, end, _ = rows.indices(data.batch.rows)
        times = data.batch[self._schema.roles.event_time]
        frauds = np.flatnonzero(data.fraud)
        due = times[frauds] + self._schema.label.delay_ms
        departures = schedule(times[first:end], rate)
        # labels of the past are acknowledged before the schedule starts
        labels_sent = int(np.searchsorted(due, times[first], side="right")) if first < end else 0
        self._send_labels(data.take(frauds[:labels_sent]))
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
            if known > labels_sent:
                self._send_labels(data.take(frauds[labels_sent:known]))
                labels_sent = known
            self._send(data.take(np.arange(sent, until)))
            sent = until
            progress((sent - first) / (end - first))
        self._producer.flush(FLUSH_TIMEOUT_S)
        return Played(end - first, labels_sent, time.perf_counter() - started_s, behind_s_max)

    def _send(self, rows: LabelledData) -> None:
        keys = message_keys(rows.batch[self._schema.roles.card])
        self._producer.send_many(self._transactions_topic, keys, self._codec.encode(rows.batch))

    def _send_labels(self, rows: LabelledData) -> None:
        if not rows.batch.rows:
            return
        labels = labels_of(rows, self._schema.label.field)
        keys = message_keys(labels[self._schema.roles.card])
        self._producer.send_many(self._labels_topic, keys, self._label_codec.encode(labels))
        self._producer.flush(FLUSH_TIMEOUT_S)


def schedule(times_ms: Int64, rate: float | None) -> Array:
    """Returns the departure of each record in seconds (float64, [rows]): event times, scaled to the mean rate.

    The first departure is 0. Gaps are scaled by the same factor, so rush hours stay.
    """
    if rate is None or len(times_ms) < 2 or times_ms[-1] == times_ms[0]:
        return np.zeros(len(times_ms)) if rate is None else np.arange(len(times_ms)) / rate
    elapsed = (times_ms - times_ms[0]).astype(np.float64)
    departures: Array = elapsed / elapsed[-1] * (len(times_ms) - 1) / rate
    return departures
