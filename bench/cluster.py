"""What the runs on a cluster share: a bundle that escalates, a steady load, eyes on the decisions, and the check.

The check reads both topics from their beginning, after all is over (`read_committed`), and takes nobody's word.
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
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import msgspec
import numpy as np

from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle, write_bundle
from cascade.columns import Array, Bool, ColumnBatch, Int64
from cascade.config import Config
from cascade.errors import BrokerError, CascadeError
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData, frame_to_batch
from cascade.ledger.machine import Machine
from cascade.policy import RAW_MAX
from cascade.schema import Schema
from cascade.simulator import SimulatorSettings, simulate
from stages.assembly import make_engine
from stages.deep.local_triton import TRITON_VERSION
from stages.offline import labels_of
from streaming.clients import FetchedBatch, make_consumer, make_producer
from streaming.clients.partitioning import partition_of
from streaming.codecs import codec
from streaming.decisions import decode_decision, message_keys
from streaming.local_broker import KAFKA_VERSION

EVENTS_LIMIT, EVENTS_PER_KEY_MAX = re.compile(rb"(events_per_key_max = )\d[\d_]*"), 16_384
# A load sends so often; a tick's transactions leave together.
LOAD_TICK_S = 0.01
LOAD_ROWS_A_TICK_MAX = 1_000
FLUSH_S_MAX, CLOSE_S_MAX = 120.0, 5.0
POLL_S, POLL_ROWS_MAX = 0.05, 5_000
READ_S_MAX = 600.0
WATCHES_MAX = 1_000


def simulated(schema: Schema, cards: int, terminals: int, days: int, seed: int) -> LabelledData:
    """Transactions of the project's simulator, in order of time; their ids are their positions."""
    settings = SimulatorSettings(cards=cards, terminals=terminals, days=days, start=date(2024, 1, 1), seed=seed)
    frame = simulate(settings)
    return LabelledData(frame_to_batch(frame, schema, "simulated"), frame["fraud"].to_numpy().astype(np.int64))


def apart(data: LabelledData, schema: Schema, partitions: int) -> LabelledData:
    """The same transactions, but that each terminal is visited by the cards of one partition only.

    What a card's sequence keeps of its terminals is then the same whichever partitions a worker holds beside its own,
    and states can be compared to the bit.
    """
    roles = schema.roles
    cards, rows = np.unique(data.batch[roles.card], return_inverse=True)
    numbers = np.array([partition_of(key, partitions) for key in message_keys(cards)], np.int64)
    columns = dict(data.batch.columns)
    columns[roles.terminal] = data.batch[roles.terminal] * partitions + numbers[rows]
    return LabelledData(ColumnBatch(columns, data.batch.rows), data.fraud)


def escalating_bundle(directory: Path, share: float, data: LabelledData) -> Bundle:
    """The shipped bundle, but that about `share` of the traffic of `data` goes to the deep model.

    And that no key runs into its limit of events: what a full key keeps depends on which partitions lie together, so
    states could not be compared.
    """
    features = (SHIPPED_BUNDLE / "features.toml").read_bytes()
    unlimited = EVENTS_LIMIT.sub(b"\\g<1>%d" % EVENTS_PER_KEY_MAX, features)
    threshold = threshold_for(share, data)
    return shipped_bundle_with(directory, "escalating", threshold, {"features.toml": unlimited})


def threshold_for(share: float, data: LabelledData) -> float:
    """The screener's log-odds that about `share` of the traffic of `data` reaches, with the shipped bundle."""
    raw = make_engine(load_bundle(SHIPPED_BUNDLE)).screen(data.batch).raw
    return float(np.quantile(raw, 1 - share))


def shipped_bundle_with(directory: Path, name: str, threshold: float, changed: Mapping[str, bytes]) -> Bundle:
    """The shipped bundle, but that it escalates everything from `threshold` on, and with some files changed."""
    content = {path.name: path.read_bytes() for path in SHIPPED_BUNDLE.iterdir() if path.name != "manifest.json"}
    band = {"escalation_threshold": threshold, "escalation_ceiling": RAW_MAX}
    policy = json.dumps(json.loads(content["policy.json"]) | band).encode()
    write_bundle(directory, name, {**content, "policy.json": policy, **changed})
    return load_bundle(directory)


# --- load -------------------------------------------------------------------------------------------------------------


class Endless:
    """`data` over and over: each round with ids and event times of its own, that go on where the last one ended."""

    def __init__(self, schema: Schema, data: LabelledData) -> None:
        self._roles, self._label = schema.roles, schema.label
        self._data = data
        times = data.batch[schema.roles.event_time]
        # whole days, so that hours of the day stay what they were
        self._span_ms = (int(times[-1] - times[0]) // DAY_MS + 1) * DAY_MS
        self._frauds = np.flatnonzero(data.fraud)
        self._due_ms = times[self._frauds] + schema.label.delay_ms

    def rows(self, start: int, stop: int) -> LabelledData:
        """The rows at positions `start` to `stop`, counted from the beginning of the first round."""
        return self._at(np.arange(start, stop))

    def labels_due(self, told: int, until_ms: int) -> tuple[LabelledData, int]:
        """The frauds that are to be told by then, without the first `told`, and how many are told with them."""
        count = len(self._frauds)
        if not count:
            return self._at(np.zeros(0, np.int64)), told
        rounds = np.arange(told, told + count) // count
        positions = np.arange(told, told + count) % count
        due = int(np.searchsorted(self._due_ms[positions] + rounds * self._span_ms, until_ms, side="right"))
        rows = self._frauds[positions[:due]] + rounds[:due] * self._data.batch.rows
        return self._at(rows), told + due

    def _at(self, positions: Int64) -> LabelledData:
        rounds, rows = np.divmod(positions, self._data.batch.rows)
        taken = self._data.take(rows)
        columns = dict(taken.batch.columns)
        columns[self._roles.transaction_id] = positions
        columns[self._roles.event_time] = taken.batch[self._roles.event_time] + rounds * self._span_ms
        return LabelledData(ColumnBatch(columns, len(positions)), taken.fraud)


class SteadyLoad:
    """Transactions at a steady rate and the labels that become due among them, from a thread, until `stop`.

    Transaction ids are `first` and up to `sent`, which is all that must be remembered of the input; labels begin with
    the data's first.
    """

    def __init__(self, config: Config, schema: Schema, data: LabelledData, rate: float, first: int = 0) -> None:
        self.sent = self._first = first
        self._rows = Endless(schema, data)
        self._schema = schema
        self._rate = rate
        self._topics = config.kafka.topics
        bytes_max = config.worker.message_bytes_max
        self._codec = codec(config.kafka.codec, schema.fields, bytes_max)
        self._label_codec = codec(config.kafka.codec, schema.label_fields(), bytes_max)
        self._producer = make_producer(config.kafka)
        self._error: BrokerError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def check(self) -> None:
        """Raise BrokerError where the load had to give up."""
        if self._error is not None:
            raise self._error

    def stop(self) -> int:
        """End it; returns `sent`: all below it are kept by the broker; raises BrokerError if not."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            self.check()
            self._producer.flush(FLUSH_S_MAX)
        finally:
            with contextlib.suppress(BrokerError):
                self._producer.close(CLOSE_S_MAX)
        return self.sent

    def _run(self) -> None:
        started_s, told = time.monotonic(), 0
        try:
            while not self._stop.wait(LOAD_TICK_S):
                due = self._first + int((time.monotonic() - started_s) * self._rate)
                stop = min(due, self.sent + LOAD_ROWS_A_TICK_MAX)
                if stop > self.sent:
                    told = self._send(stop, told)
        except BrokerError as error:
            self._error = error

    def _send(self, stop: int, told: int) -> int:
        roles = self._schema.roles
        batch = self._rows.rows(self.sent, stop).batch
        frauds, told = self._rows.labels_due(told, int(batch[roles.event_time][-1]))
        if len(frauds.fraud):
            labels = labels_of(frauds, self._schema.label.field)
            self._producer.send_many(
                self._topics.labels, message_keys(labels[roles.card]), self._label_codec.encode(labels)
            )
            # kept before any later transaction is sent, so that `labels.alignment = "exact"` finds them
            self._producer.flush(FLUSH_S_MAX)
        self._producer.send_many(self._topics.transactions, message_keys(batch[roles.card]), self._codec.encode(batch))
        self.sent = stop
        return told


# --- eyes -------------------------------------------------------------------------------------------------------------


class Watch:
    """Waits until each partition has a visible decision at or beyond an offset; `seen_s` says when (monotonic)."""

    def __init__(self, offsets: Mapping[int, int]) -> None:
        self._missing = dict(offsets)
        self._done = threading.Event()
        self.seen_s = 0.0

    def tell(self, newest: Mapping[int, int], now_s: float) -> None:
        """What is visible now: the newest decided offset by partition."""
        self._missing = {one: offset for one, offset in self._missing.items() if newest.get(one, -1) < offset}
        if not self._missing and not self._done.is_set():
            self.seen_s = now_s
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether it is so."""
        return self._done.is_set()


class Follower:
    """Reads decisions as a consumer downstream would, in a thread, and tells watches of them."""

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
        """A watch over transactions of these offsets, by partition; what is visible already does not count for less."""
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
                # a node is down; the cluster will be back
                self._stop.wait(0.2)

    def _follow(self) -> None:
        with closing(make_consumer(self._config.kafka, None)) as consumer:
            partitions = consumer.partitions_for(self._config.kafka.topics.decisions)
            consumer.assign(partitions)
            for partition, offset in self._read.items():
                consumer.seek(partition, offset)
            while not self._stop.is_set():
                for one in consumer.poll(POLL_S, POLL_ROWS_MAX):
                    self._take(one)
                self._tell()

    def _take(self, fetched: FetchedBatch) -> None:
        for value in fetched.values:
            number, offset = place_of(decode_decision(value or b"", self._config.kafka.codec).decision_id)
            self._newest[number] = max(self._newest.get(number, -1), offset)
        self._read[fetched.topic, fetched.partition] = int(fetched.offsets[-1]) + 1

    def _tell(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            watches = self._watches
        for watch in watches:
            watch.tell(self._newest, now_s)


def place_of(decision_id: str) -> tuple[int, int]:
    """Partition and offset of the transaction that a decision is about."""
    _, partition, offset = decision_id.rsplit("-", 2)
    return int(partition), int(offset)


def ends_of(config: Config, topic: str) -> dict[int, int]:
    """The offset that the next record of each partition will get."""
    with closing(make_consumer(config.kafka, None)) as consumer:
        return {number: end for (_, number), end in consumer.end_offsets(consumer.partitions_for(topic)).items()}


def committed_of(config: Config) -> dict[int, int]:
    """The group's committed offset of each partition of the transactions, 0 where there is none."""
    with closing(make_consumer(config.kafka, config.kafka.group)) as consumer:
        partitions = consumer.partitions_for(config.kafka.topics.transactions)
        known = consumer.committed(partitions)
        return {partition[1]: known.get(partition, (0, ""))[0] for partition in partitions}


def wait_until_all_committed(config: Config, timeout_s: float) -> bool:
    """Whether the group's commits reach the end of the transactions within the time."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        try:
            if committed_of(config) == ends_of(config, config.kafka.topics.transactions):
                return True
        except BrokerError:
            pass
        time.sleep(0.5)
    return False


# --- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Logged:
    """Transactions as they lie in the log, a row each, by partition and offset; all int64.

    `appended_ms`: when the broker took them, ms since the epoch.
    """

    partition: Int64
    offset: Int64
    transaction_id: Int64
    card: Int64
    appended_ms: Int64


@dataclass(frozen=True, slots=True)
class Decided:
    """Decisions as they lie in the log, a row each, by partition and offset.

    `partition`, `offset` int64: of the transaction that it is about. `screened` bool: decided by the screener, and not
    in the deep model's place. `duplicate` bool: a first decision, said again. `degraded` bool.
    """

    partition: Int64
    offset: Int64
    transaction_id: Int64
    card: Int64
    screened: Bool
    duplicate: Bool
    degraded: Bool


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What the topics say.

    `sent`: transactions that the load knows of; `transactions`: in the log. `lost`: sent but not in the log, or in the
    log without a decision. `twice`: transactions with more than one decision; `repeats`: decisions beyond the first.
    `strays`: decisions of no transaction, or under a wrong id. `order_violations`: screened decisions that come after
    one of a later transaction of the same card, for readers who keep first decisions and for those who keep last ones.
    `escalated_behind`: escalated ones that do so; that is by design, since screened transactions wait for none of them.
    `degraded_share`: of the decisions.
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


def check(logged: Logged, decided: Decided, sent: int) -> Check:
    """Hold the decisions against the transactions; transaction ids are 0 to `sent`.

    Order is judged by the first and by the last decision of each transaction. With at-least-once delivery, what a lost
    worker had sent and not committed is decided again: there one that it had escalated may be screened the next time,
    behind the first decisions of later ones and before their repeats.
    """
    codes = _codes(logged.partition, logged.offset)
    answers = _codes(decided.partition, decided.offset)
    order = np.argsort(codes)
    codes, identities = codes[order], logged.transaction_id[order]
    place = np.searchsorted(codes, answers)
    known = place < len(codes)
    known[known] = codes[place[known]] == answers[known]
    right = known.copy()
    right[known] = identities[place[known]] == decided.transaction_id[known]
    counts = np.bincount(place[known], minlength=len(codes))
    missing = np.setdiff1d(np.arange(sent), logged.transaction_id, assume_unique=False)
    first = np.sort(np.unique(answers, return_index=True)[1])
    last = np.sort(len(answers) - 1 - np.unique(answers[::-1], return_index=True)[1])
    screened = decided.screened & ~decided.duplicate
    behind = _behind(decided.card[first], decided.offset[first])
    of_first, of_last = (
        answers[within[_behind(decided.card[within], decided.offset[within])]]
        for within in (first[screened[first]], last[screened[last]])
    )
    return Check(
        sent=sent,
        transactions=len(codes),
        decisions=len(answers),
        lost=len(missing) + int((counts == 0).sum()),
        twice=int((counts > 1).sum()),
        repeats=int((counts - 1).clip(0).sum()),
        strays=int((~right).sum()),
        duplicates=int(decided.duplicate.sum()),
        order_violations=len(np.intersect1d(of_first, of_last)),
        escalated=int((~decided.screened).sum()),
        escalated_behind=int(behind[~screened[first]].sum()),
        degraded_share=float(decided.degraded.mean()) if len(answers) else 0.0,
    )


def _codes(partition: Int64, offset: Int64) -> Int64:
    return (partition << 44) | offset


def _behind(card: Int64, offset: Int64) -> Bool:
    """Which rows come after one of the same card with a larger offset, bool [rows]; rows in the order of the log."""
    behind = np.zeros(len(card), bool)
    order = np.argsort(card, kind="stable")
    starts = np.flatnonzero(np.diff(card[order], prepend=-1 if not len(card) else card[order[0]] - 1))
    for part in np.split(order, starts[1:]):
        behind[part] = offset[part] < np.maximum.accumulate(offset[part])
    return behind


def read_transactions(config: Config, schema: Schema) -> Logged:
    """The whole topic of transactions; raises CascadeError where one of them cannot be read."""
    reader = codec(config.kafka.codec, schema.fields, config.worker.message_bytes_max)
    columns: list[list[Array]] = [[], [], [], [], []]

    def take(one: FetchedBatch) -> None:
        decoded = reader.decode(one.values)
        if decoded.rejects:
            raise CascadeError(f"{one.topic}-{one.partition}: {len(decoded.rejects)} messages cannot be read")
        batch = decoded.batch
        found = (batch[schema.roles.transaction_id], batch[schema.roles.card], one.timestamps_ms)
        for column, values in zip(
            columns, (np.full(len(one), one.partition, np.int64), one.offsets, *found), strict=True
        ):
            column.append(values)

    read_topic(config, config.kafka.topics.transactions, take)
    return Logged(*(_joined(column) for column in columns))


def read_decisions(config: Config) -> Decided:
    """The whole topic of decisions, each partition in its order; raises CascadeError where one cannot be read."""
    integers: list[list[tuple[int, int, int, int]]] = []
    flags: list[list[tuple[bool, bool, bool]]] = []
    known: dict[int, int] = {}

    def take(one: FetchedBatch) -> None:
        decisions = [decode_decision(value or b"", config.kafka.codec) for value in one.values]
        cards = [int(key or b"-1") for key in one.keys]
        for card in cards:
            if known.setdefault(card, one.partition) != one.partition:
                raise CascadeError(f"decisions of one card lie in partitions {known[card]} and {one.partition}")
        integers.append(
            [
                (*place_of(each.decision_id), int(each.transaction_id), card)
                for each, card in zip(decisions, cards, strict=True)
            ]
        )
        flags.append(
            [(each.stage == "screener" and not each.degraded, each.duplicate, each.degraded) for each in decisions]
        )

    read_topic(config, config.kafka.topics.decisions, take)
    numbers = np.array([row for part in integers for row in part], np.int64).reshape(-1, 4)
    marks = np.array([row for part in flags for row in part], bool).reshape(-1, 3)
    return Decided(*numbers.T, *marks.T)


def read_topic(config: Config, topic: str, take: Callable[[FetchedBatch], None]) -> None:
    """Give every record of a topic to `take`, a partition after the other; raises CascadeError where it takes long."""
    give_up_s = time.monotonic() + READ_S_MAX
    with closing(make_consumer(config.kafka, None)) as consumer:
        for partition in consumer.partitions_for(topic):
            end = consumer.end_offsets([partition])[partition]
            consumer.assign([partition])
            while consumer.position(partition) < end:
                if time.monotonic() > give_up_s:
                    raise CascadeError(f"{topic} was not read within {READ_S_MAX:.0f} s")
                for one in consumer.poll(POLL_S, POLL_ROWS_MAX):
                    take(one)


def _joined(parts: list[Array]) -> Int64:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def origin(machine: Machine, seed: int) -> str:
    """The line under a table: machine, versions and seed."""
    return f"{machine.text}; Apache Kafka {_kafka()}, Triton {TRITON_VERSION}; seed {seed}"


def _kafka() -> str:
    outside = os.environ.get("KAFKA_BOOTSTRAP")
    return f"at {outside}" if outside else KAFKA_VERSION


def write_json(path: Path, report: msgspec.Struct) -> None:
    """Write a report, indented; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
