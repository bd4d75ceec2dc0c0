"""Shared by the runs on a cluster: a bundle that escalates, a steady load, a follower of the decisions, and the check.

The check reads both topics from their beginning with `read_committed`, after the workers have stopped. It does not use
what the workers report.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cascade.bundle import FILES, SHIPPED_BUNDLE, Bundle, load_bundle, write_bundle
from cascade.columns import Array, Bool, ColumnBatch, Int64
from cascade.config import Config
from cascade.errors import BrokerError, CascadeError
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData, frame_to_batch
from cascade.ledger.machine import Machine
from cascade.readable import readable
from cascade.schema import Schema
from cascade.simulator import SimulatorSettings, simulate
from stages.assembly import make_engine
from stages.deep.local_triton import TRITON_VERSION
from stages.offline import labels_of
from streaming.codecs import codec
from streaming.kafka import FetchedBatch, make_consumer, make_producer
from streaming.kafka.admin import admin_client
from streaming.kafka.local_broker import KAFKA_VERSION, LocalBroker
from streaming.kafka.partitioning import partition_of
from streaming.pipeline.decisions import decode_decision, message_keys

EVENTS_LIMIT, EVENTS_PER_KEY_MAX = re.compile(rb"(events_per_key_max = )\d[\d_]*"), 16_384
# The load sends the transactions of a tick together.
LOAD_TICK_S = 0.01
LOAD_ROWS_PER_TICK_MAX = 1_000
# Longer than any trouble that a run causes: a load that gives up would look like a service that stands still.
DELIVERY_S_MAX, CLOSE_S_MAX = 600.0, 5.0
POLL_S, POLL_ROWS_MAX = 0.05, 5_000
READ_S_MAX = 600.0
REQUEST_S_MAX = 10.0
WATCHES_MAX = 1_000


def simulated(schema: Schema, **settings: Any) -> LabelledData:
    """Transactions of `cascade.simulator`, in order of event time; their ids are their positions.

    schema: of the simulator's data. settings: of `SimulatorSettings`; the first day is 2024-01-01 unless they name one.
    """
    frame = simulate(SimulatorSettings(**{"start": date(2024, 1, 1)} | settings))
    return LabelledData(frame_to_batch(frame, schema, "simulated"), frame["fraud"].to_numpy().astype(np.int64))


def separate_terminals(data: LabelledData, schema: Schema, partitions: int) -> LabelledData:
    """The same transactions with other terminals: each terminal is used by the cards of a single partition.

    The terminal features in a card's sequence then do not depend on which other partitions the worker owns, so states
    can be compared bit by bit.
    """
    roles = schema.roles
    cards, rows = np.unique(data.batch[roles.card], return_inverse=True)
    numbers = np.array([partition_of(key, partitions) for key in message_keys(cards)], np.int64)
    columns = dict(data.batch.columns)
    columns[roles.terminal] = data.batch[roles.terminal] * partitions + numbers[rows]
    return LabelledData(ColumnBatch(columns, data.batch.rows), data.fraud)


def escalating_bundle(directory: Path, share: float, data: LabelledData) -> Bundle:
    """The shipped bundle with another budget and threshold, so that it escalates a `share` of `data`.

    It also has a higher limit of events per key, which no key reaches: what remains of the events of a full key depends
    on which partitions the worker owns, so states could not be compared.
    """
    features = (SHIPPED_BUNDLE / "features.toml").read_bytes()
    unlimited = EVENTS_LIMIT.sub(b"\\g<1>%d" % EVENTS_PER_KEY_MAX, features)
    return shipped_bundle_with(directory, "escalating", share, threshold_for(share, data), {"features.toml": unlimited})


def threshold_for(share: float, data: LabelledData, first: int = 0, shipped: Path = SHIPPED_BUNDLE) -> float:
    """The escalation score that about `share` of `data` exceeds with a shipped bundle.

    Only the rows from `first` on count; the rows before them enter the features.
    """
    scores = make_engine(load_bundle(shipped)).screen(data.batch).escalation_score
    return float(np.quantile(scores[first:], 1 - share))


def shipped_bundle_with(
    directory: Path,
    name: str,
    share: float,
    threshold: float,
    changed: Mapping[str, bytes],
    shipped: Path = SHIPPED_BUNDLE,
) -> Bundle:
    """Write a copy of a shipped bundle with another escalation budget.

    name: of the new bundle.
    share: the budget.
    threshold: escalation score above which it escalates at first; ∓RAW_MAX: everything, or nothing.
    changed: new content of files, by file name.
    """
    content = {file: (shipped / file).read_bytes() for file in FILES}
    policy = json.loads(content["policy.json"])
    policy["escalation"] |= {"budget": share, "threshold": threshold}
    write_bundle(directory, name, {**content, "policy.json": json.dumps(policy).encode(), **changed})
    return load_bundle(directory)


# --- load -------------------------------------------------------------------------------------------------------------


class EndlessData:
    """Repeats `data` without end. The ids and event times of each round continue those of the round before."""

    def __init__(self, schema: Schema, data: LabelledData) -> None:
        self._roles, self._label = schema.roles, schema.label
        self._data = data
        times = data.batch[schema.roles.event_time]
        # whole days, so that the hours of the day do not change
        self._span_ms = (int(times[-1] - times[0]) // DAY_MS + 1) * DAY_MS
        self._frauds = np.flatnonzero(data.fraud)
        self._due_ms = times[self._frauds] + schema.label.delay_ms

    def rows(self, start: int, stop: int) -> LabelledData:
        """The rows at positions `start` to `stop`, counted from the start of the first round."""
        return self._at(np.arange(start, stop))

    def labels_due(self, sent: int, until_ms: int) -> tuple[LabelledData, int]:
        """The frauds whose labels are due until then, and the new number of sent labels.

        sent: number of labels that were sent before; they are left out.
        until_ms: event time, ms since the epoch.
        """
        count = len(self._frauds)
        if not count:
            return self._at(np.zeros(0, np.int64)), sent
        rounds, positions = np.divmod(np.arange(sent, sent + count), count)
        due = int(np.searchsorted(self._due_ms[positions] + rounds * self._span_ms, until_ms, side="right"))
        rows = self._frauds[positions[:due]] + rounds[:due] * self._data.batch.rows
        return self._at(rows), sent + due

    def _at(self, positions: Int64) -> LabelledData:
        rounds, rows = np.divmod(positions, self._data.batch.rows)
        taken = self._data.take(rows)
        columns = dict(taken.batch.columns)
        columns[self._roles.transaction_id] = positions
        columns[self._roles.event_time] = taken.batch[self._roles.event_time] + rounds * self._span_ms
        return LabelledData(ColumnBatch(columns, len(positions)), taken.fraud)


class SteadyLoad:
    """Sends transactions at a steady rate, and the labels that become due meanwhile, from a thread until `stop`.

    data: is repeated without end.
    rate: transactions a second.
    first: the first transaction id. The ids go up to `sent`, so the check needs no other copy of the input.
    """

    def __init__(self, config: Config, schema: Schema, data: LabelledData, rate: float, first: int = 0) -> None:
        self.sent = self._first = first
        self._rows = EndlessData(schema, data)
        self._schema = schema
        self._rate = rate
        self._topics = config.kafka.topics
        bytes_max = config.worker.message_bytes_max
        self._codec = codec(config.kafka.codec, schema.fields, bytes_max)
        self._label_codec = codec(config.kafka.codec, schema.label_fields(), bytes_max)
        self._producer = make_producer(config.kafka, delivery_timeout_s=DELIVERY_S_MAX)
        self._error: BrokerError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def check(self) -> None:
        """Raise the BrokerError that ended the load, if any."""
        if self._error is not None:
            raise self._error

    def stop(self) -> int:
        """Stop sending; returns `sent`. Raises BrokerError unless the broker has acknowledged all transactions."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            self.check()
            self._producer.flush(DELIVERY_S_MAX)
        finally:
            with contextlib.suppress(BrokerError):
                self._producer.close(CLOSE_S_MAX)
        return self.sent

    def _run(self) -> None:
        started_s, labels_sent = time.monotonic(), 0
        try:
            while not self._stop.wait(LOAD_TICK_S):
                due = self._first + int((time.monotonic() - started_s) * self._rate)
                stop = min(due, self.sent + LOAD_ROWS_PER_TICK_MAX)
                if stop > self.sent:
                    labels_sent = self._send(stop, labels_sent)
        except BrokerError as error:
            self._error = error

    def _send(self, stop: int, labels_sent: int) -> int:
        roles = self._schema.roles
        batch = self._rows.rows(self.sent, stop).batch
        frauds, labels_sent = self._rows.labels_due(labels_sent, int(batch[roles.event_time][-1]))
        if len(frauds.fraud):
            self._send_labels(labels_of(frauds, self._schema.label.field))
            # acknowledged before any later transaction is sent, as `labels.alignment = "exact"` needs them
            self._producer.flush(DELIVERY_S_MAX)
        self._producer.send_many(self._topics.transactions, message_keys(batch[roles.card]), self._codec.encode(batch))
        self.sent = stop
        return labels_sent

    def _send_labels(self, labels: ColumnBatch) -> None:
        keys, values = message_keys(labels[self._schema.roles.card]), self._label_codec.encode(labels)
        give_up_s = time.monotonic() + DELIVERY_S_MAX
        while True:
            try:
                self._producer.send_many(self._topics.labels, keys, values)
                return
            except BrokerError:
                # no broker has answered yet
                if self._stop.is_set() or time.monotonic() > give_up_s:
                    raise


# --- the decisions, as a consumer downstream sees them ----------------------------------------------------------------


class Watch:
    """Becomes `done` when each partition has a visible decision at or beyond an offset; `seen_s`: then, monotonic."""

    def __init__(self, offsets: Mapping[int, int]) -> None:
        self._missing = dict(offsets)
        self._done = threading.Event()
        self.seen_s = 0.0

    def update(self, newest: Mapping[int, int], now_s: float) -> None:
        """Take note of the newest visible decision: an offset by partition id."""
        self._missing = {number: offset for number, offset in self._missing.items() if newest.get(number, -1) < offset}
        if not self._missing and not self._done.is_set():
            self.seen_s = now_s
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether each partition has such a decision."""
        return self._done.is_set()


class Follower:
    """Reads decisions as a consumer downstream does, in a thread, and updates its watches."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._newest: dict[int, int] = {}
        self._read: dict[tuple[str, int], int] = {}
        self._watches: list[Watch] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def watch(self, offsets: Mapping[int, int]) -> Watch:
        """A watch for decisions about these offsets, by partition id. Decisions that are already visible count."""
        watch = Watch(offsets)
        with self._lock:
            self._watches = [*self._watches[-WATCHES_MAX:], watch]
        return watch

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except BrokerError:
                # a node is down: try again until the cluster is back
                self._stop.wait(0.2)

    def _follow(self) -> None:
        with closing(make_consumer(self._config.kafka, None)) as consumer:
            partitions = consumer.partitions_for(self._config.kafka.topics.decisions)
            consumer.assign(partitions)
            for partition, offset in self._read.items():
                consumer.seek(partition, offset)
            while not self._stop.is_set():
                for fetched in consumer.poll(POLL_S, POLL_ROWS_MAX):
                    self._take(fetched)
                self._update_watches()

    def _take(self, fetched: FetchedBatch) -> None:
        for value in fetched.values:
            number, offset = parse_decision_id(decode_decision(value or b"", self._config.kafka.codec).decision_id)
            self._newest[number] = max(self._newest.get(number, -1), offset)
        self._read[fetched.topic, fetched.partition] = int(fetched.offsets[-1]) + 1

    def _update_watches(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            watches = self._watches
        for watch in watches:
            watch.update(self._newest, now_s)


def parse_decision_id(decision_id: str) -> tuple[int, int]:
    """Partition id and offset of the transaction of a decision."""
    _, partition, offset = decision_id.rsplit("-", 2)
    return int(partition), int(offset)


def end_offsets(config: Config, topic: str) -> dict[int, int]:
    """The offset of the next record, by partition id."""
    with closing(make_consumer(config.kafka, None)) as consumer:
        return {number: end for (_, number), end in consumer.end_offsets(consumer.partitions_for(topic)).items()}


def committed_offsets(config: Config) -> dict[int, int]:
    """The group's committed offset of each transactions partition, by partition id; 0 if there is none."""
    with closing(make_consumer(config.kafka, config.kafka.group)) as consumer:
        partitions = consumer.partitions_for(config.kafka.topics.transactions)
        committed = consumer.committed(partitions)
        return {partition[1]: committed.get(partition, (0, ""))[0] for partition in partitions}


def wait_until_all_committed(config: Config, timeout_s: float) -> bool:
    """Wait until the group has committed the end of the transactions topic; returns whether it did so in time."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        try:
            if committed_offsets(config) == end_offsets(config, config.kafka.topics.transactions):
                return True
        except BrokerError:
            pass
        time.sleep(0.5)
    return False


# --- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoggedTransactions:
    """The transactions topic, a row for each record: all int64 [records].

    `partition`: partition id. `appended_ms`: append time, ms since the epoch.
    """

    partition: Int64
    offset: Int64
    transaction_id: Int64
    card: Int64
    appended_ms: Int64


@dataclass(frozen=True, slots=True)
class LoggedDecisions:
    """The decisions topic, a row for each record in the order of its partition: int64 and bool [records].

    `record`: the decision's own partition and offset, as an integer. `partition`, `offset`: of the transaction that the
    decision is about. `screened`: decided by the screener and not degraded. `duplicate`: it repeats a first decision.
    """

    record: Int64
    partition: Int64
    offset: Int64
    transaction_id: Int64
    card: Int64
    screened: Bool
    duplicate: Bool
    degraded: Bool


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The result of the check.

    `sent`: transactions that the load sent; `transactions`: those in the log. `lost`: transactions that are not in the
    log, or have no decision. `twice`: transactions with several decisions; `repeats`: decisions beyond the first.
    `strays`: decisions of no transaction, or with another transaction's id. `order_violations`: screened decisions that
    come after the decision of a later transaction of the same card, both by first and by last decisions.
    `escalated_behind`: escalated decisions that do so, which is by design: screened transactions do not wait for the
    deep model. `degraded_share`: share of the decisions.
    """

    sent: int
    transactions: int
    decisions: int
    lost: int
    twice: int
    repeats: int
    strays: int
    duplicates: int
    order_violations: int
    escalated: int
    escalated_behind: int
    degraded_share: float


def check(logged: LoggedTransactions, decided: LoggedDecisions, sent: int) -> Check:
    """Compare the decisions with the transactions.

    sent: number of transactions that the load sent; their ids are 0 to `sent` - 1.

    A card's order must hold for the first decisions or for the last ones. With at-least-once delivery a worker decides
    again what a lost worker sent and did not commit, and may screen a transaction that the lost worker had escalated:
    that decision comes after the first decisions of later transactions, but before their repeats.
    """
    logged_codes = _codes(logged.partition, logged.offset)
    decided_codes = _codes(decided.partition, decided.offset)
    order = np.argsort(logged_codes)
    logged_codes, identities = logged_codes[order], logged.transaction_id[order]
    row = np.searchsorted(logged_codes, decided_codes)
    found = row < len(logged_codes)
    found[found] = logged_codes[row[found]] == decided_codes[found]
    right = found.copy()
    right[found] = identities[row[found]] == decided.transaction_id[found]
    counts = np.bincount(row[found], minlength=len(logged_codes))
    missing = np.setdiff1d(np.arange(sent), logged.transaction_id, assume_unique=False)
    first = np.sort(np.unique(decided_codes, return_index=True)[1])
    last = np.sort(len(decided_codes) - 1 - np.unique(decided_codes[::-1], return_index=True)[1])
    screened = decided.screened & ~decided.duplicate
    behind = _behind(decided.card[first], decided.offset[first])
    behind_by_first, behind_by_last = (
        decided_codes[rows[_behind(decided.card[rows], decided.offset[rows])]]
        for rows in (first[screened[first]], last[screened[last]])
    )
    return Check(
        sent=sent,
        transactions=len(logged_codes),
        decisions=len(decided_codes),
        lost=len(missing) + int((counts == 0).sum()),
        twice=int((counts > 1).sum()),
        repeats=int((counts - 1).clip(0).sum()),
        strays=int((~right).sum()),
        duplicates=int(decided.duplicate.sum()),
        order_violations=len(np.intersect1d(behind_by_first, behind_by_last)),
        escalated=int((~decided.screened).sum()),
        escalated_behind=int(behind[~screened[first]].sum()),
        degraded_share=float(decided.degraded.mean()) if len(decided_codes) else 0.0,
    )


def _codes(partition: Int64, offset: Int64) -> Int64:
    """One integer for each pair of partition id and offset."""
    return (partition << 44) | offset


def _behind(card: Int64, offset: Int64) -> Bool:
    """Mask of the rows that come after a row of the same card with a larger offset, bool [rows]."""
    behind = np.zeros(len(card), bool)
    order = np.argsort(card, kind="stable")
    starts = np.flatnonzero(np.diff(card[order], prepend=-1 if not len(card) else card[order[0]] - 1))
    for part in np.split(order, starts[1:]):
        behind[part] = offset[part] < np.maximum.accumulate(offset[part])
    return behind


def read_transactions(config: Config, schema: Schema) -> LoggedTransactions:
    """Read the whole transactions topic; raises CascadeError if a message is unreadable."""
    reader = codec(config.kafka.codec, schema.fields, config.worker.message_bytes_max)
    parts: list[tuple[Array, ...]] = [(np.zeros(0, np.int64),) * 5]

    def take(fetched: FetchedBatch) -> None:
        decoded = reader.decode(fetched.values)
        if decoded.rejects:
            raise CascadeError(f"{fetched.topic}-{fetched.partition}: {len(decoded.rejects)} messages are unreadable")
        partition = np.full(len(fetched), fetched.partition, np.int64)
        identities, cards = (decoded.batch[name] for name in (schema.roles.transaction_id, schema.roles.card))
        parts.append((partition, fetched.offsets, identities, cards, fetched.timestamps_ms))

    read_topic(config, config.kafka.topics.transactions, take)
    return LoggedTransactions(*map(np.concatenate, zip(*parts, strict=True)))


def read_decisions(config: Config) -> LoggedDecisions:
    """Read the whole decisions topic; raises CascadeError if the decisions of a card lie in several partitions."""
    integers: list[tuple[int, int, int, int, int]] = []
    flags: list[tuple[bool, bool, bool]] = []
    partitions: dict[int, int] = {}

    def take(fetched: FetchedBatch) -> None:
        records = _codes(np.full(len(fetched), fetched.partition), fetched.offsets).tolist()
        for record, key, value in zip(records, fetched.keys, fetched.values, strict=True):
            decision, card = decode_decision(value or b"", config.kafka.codec), int(key or b"-1")
            partition = partitions.setdefault(card, fetched.partition)
            if partition != fetched.partition:
                raise CascadeError(f"decisions of one card lie in partitions {partition} and {fetched.partition}")
            integers.append((record, *parse_decision_id(decision.decision_id), int(decision.transaction_id), card))
            screened = decision.stage == "screener" and not decision.degraded
            flags.append((screened, decision.duplicate, decision.degraded))

    read_topic(config, config.kafka.topics.decisions, take)
    return LoggedDecisions(
        *np.array(integers, np.int64).reshape(-1, 5).T.copy(), *np.array(flags, bool).reshape(-1, 3).T.copy()
    )


def check_log(config: Config, schema: Schema, sent: int, broker: LocalBroker | None) -> tuple[Check, int]:
    """The check of what is in the log, and how many decisions it leaves out because not every node serves them.

    These are decisions of aborted transactions: `_committed_on_every_node`. Raises CascadeError.
    """
    logged, decided = read_transactions(config, schema), read_decisions(config)
    found = check(logged, decided, sent)
    if not found.twice or config.delivery != "exactly-once" or broker is None:
        return found, 0
    committed = _committed_on_every_node(decided, config, broker)
    return check(logged, committed, sent), len(decided.record) - len(committed.record)


def _committed_on_every_node(decided: LoggedDecisions, config: Config, broker: LocalBroker) -> LoggedDecisions:
    """The decisions that are read as committed whichever nodes lead; raises CascadeError, LocalPartError.

    A follower that catches up may note too late an offset in its index of aborted transactions. Once it leads, it
    serves the records of an aborted transaction as committed: docs/decisions/0022. Each node is stopped in turn, so
    that the others lead.
    """
    kept = np.ones(len(decided.record), bool)
    for node in range(broker.nodes):
        _wait_until_in_sync(config, config.kafka.topics.decisions, broker.nodes)
        broker.stop_node(node)
        kept &= np.isin(decided.record, read_decisions(config).record)
        broker.start_node(node)
    return LoggedDecisions(*(getattr(decided, column.name)[kept] for column in fields(LoggedDecisions)))


def _wait_until_in_sync(config: Config, topic: str, replicas: int) -> None:
    give_up_s = time.monotonic() + READ_S_MAX
    with admin_client(config.kafka, "asking for the replicas") as admin:
        while any(
            len(partition.isrs) < replicas
            for partition in admin.list_topics(topic, timeout=REQUEST_S_MAX).topics[topic].partitions.values()
        ):
            if time.monotonic() > give_up_s:
                raise CascadeError(f"{topic}: not every replica was in sync within {READ_S_MAX:.0f} s")
            time.sleep(POLL_S)


def read_topic(config: Config, topic: str, take: Callable[[FetchedBatch], None]) -> None:
    """Pass every record of a topic to `take`, partition by partition; raises CascadeError after READ_S_MAX."""
    give_up_s = time.monotonic() + READ_S_MAX
    with closing(make_consumer(config.kafka, None)) as consumer:
        for partition in consumer.partitions_for(topic):
            end = consumer.end_offsets([partition])[partition]
            consumer.assign([partition])
            while consumer.position(partition) < end:
                if time.monotonic() > give_up_s:
                    raise CascadeError(f"{topic} was not read within {READ_S_MAX:.0f} s")
                for fetched in consumer.poll(POLL_S, POLL_ROWS_MAX):
                    take(fetched)


def origin(machine: Machine, seed: int) -> str:
    """The note under a table of figures: machine, versions and seed."""
    outside = os.environ.get("KAFKA_BOOTSTRAP")
    kafka = f"at {outside}" if outside else KAFKA_VERSION
    return f"{machine.text}; Apache Kafka {kafka}, Triton {TRITON_VERSION}; seed {seed}"


def write_json(path: Path, report: msgspec.Struct) -> None:
    """Write a report as indented JSON, and make its directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(readable(report))
