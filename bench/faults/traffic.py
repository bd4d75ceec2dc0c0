"""The input of a simulated run: transactions, repeats, unreadable messages, labels."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import numpy as np

from bench.faults.broker import SimBroker
from bench.faults.clock import EPOCH_S
from bench.faults.schedule import Options, Traffic
from bench.faults.world import Kind, World
from cascade.columns import ColumnBatch
from cascade.features.spec import (
    SPEC_VERSION,
    FeatureSpec,
    LabelFeatures,
    Limits,
    Sequence,
    TransactionFeatures,
    WindowFeatures,
)
from cascade.schema import Field, Label, Roles, Schema
from streaming.codecs import Codec, codec

# The first producer id of upstream transactions, far from those of the workers.
UPSTREAM_PRODUCER = 1_000_000
UPSTREAM_OPEN_S_MAX = 0.1
# The longest delay of a label after its transaction.
LABEL_S_MAX = 1.0
# The longest delay of a repeat. Longer than some duplicate windows, after which a repeat is a new transaction.
REPEAT_S_MAX = 1.0

SCHEMA = Schema(
    name="faults",
    version=1,
    roles=Roles(
        transaction_id="transaction_id",
        event_time="event_time",
        amount="amount",
        card="card_id",
        terminal="terminal_id",
    ),
    fields={
        "transaction_id": Field(type="int64", minimum=0),
        "event_time": Field(type="timestamp", unit="ms"),
        "card_id": Field(type="int64", minimum=0),
        "terminal_id": Field(type="int64", minimum=0),
        "amount": Field(type="float64", minimum=0.0, maximum=100_000.0),
    },
    label=Label(field="fraud", delay="1s"),
)


@cache
def feature_spec(terminals: bool) -> FeatureSpec:
    """A small set of features: windows by card, and by terminal if `terminals`."""
    by_card = WindowFeatures(key="card", functions=("count", "mean", "seconds_since_last"), windows=("1h",))
    by_terminal = WindowFeatures(key="terminal", functions=("count", "max"), windows=("1h",))
    frauds = LabelFeatures(key="terminal", windows=("1h",), functions=("fraud_count",))
    return FeatureSpec(
        version=SPEC_VERSION,
        sequence=(Sequence(key="card", length=2, fields=("amount",)),),
        lateness="1m",
        limits=Limits(keys_max=128, events_per_key_max=512, events_per_key_mean=8),
        transaction=(TransactionFeatures(functions=("value",)),),
        window=(by_card, by_terminal) if terminals else (by_card,),
        label_window=(frauds,) if terminals else (),
    )


def transaction_codec(options: Options) -> Codec:
    """The codec of the transactions topic."""
    return codec(options.config.kafka.codec, SCHEMA.fields, options.config.worker.message_bytes_max)


def label_codec(options: Options) -> Codec:
    """The codec of the labels topic."""
    return codec(options.config.kafka.codec, SCHEMA.label_fields(), options.config.worker.message_bytes_max)


def send_traffic(world: World, broker: SimBroker, options: Options) -> None:
    """Schedule the whole input. Repeats and unreadable messages count as faults when they are appended."""
    chance, traffic = random.Random(f"traffic {options.seed}"), options.traffic
    batch = _transactions(chance, traffic)
    messages = transaction_codec(options).encode(batch)
    labels = label_codec(options).encode(_labels(chance, batch))
    topics = options.config.kafka.topics
    for row, (card, message) in enumerate(zip(batch["card_id"].tolist(), messages, strict=True)):
        key, at_s = b"%d" % card, chance.uniform(0.0, traffic.seconds)
        if chance.random() < traffic.malformed_share:
            _send_at(world, broker, at_s, topics.transactions, key, _malformed(chance, message), "malformed-message")
        elif chance.random() < traffic.aborted_share:
            _send_aborted_at(world, broker, at_s, topics.transactions, key, message, UPSTREAM_PRODUCER + row)
        else:
            _send_at(world, broker, at_s, topics.transactions, key, message)
            while chance.random() < traffic.repeated_share:
                again_s = at_s + REPEAT_S_MAX * chance.random() ** 3
                _send_at(world, broker, again_s, topics.transactions, key, message, "input-duplicate")
        if chance.random() < traffic.label_share:
            fault: Kind | None = "malformed-message" if chance.random() < traffic.malformed_share else None
            label = _malformed(chance, labels[row]) if fault else labels[row]
            _send_at(world, broker, at_s + LABEL_S_MAX * chance.random(), topics.labels, key, label, fault)


def send_last(broker: SimBroker, options: Options) -> None:
    """Append a last transaction to each partition, so that labels that are aligned with transactions are read too."""
    topics = options.config.kafka.topics
    batch = _transactions(random.Random(f"last {options.seed}"), replace(options.traffic, rows=400, cards=1_000))
    for partition in broker.partitions(topics.transactions):
        for card, message in zip(batch["card_id"].tolist(), transaction_codec(options).encode(batch), strict=True):
            if broker.partition_of(topics.transactions, b"%d" % card) == partition:
                broker.append(topics.transactions, b"%d" % card, message, sender="upstream")
                break


def _transactions(chance: random.Random, traffic: Traffic) -> ColumnBatch:
    rows = traffic.rows
    start_ms = int(EPOCH_S * 1e3)
    ids = chance.sample(range(1_000_000), rows)
    times = [start_ms + int(1e3 * chance.uniform(0.0, traffic.seconds)) - chance.choice([0, 0, 200]) for _ in ids]
    return ColumnBatch(
        {
            "transaction_id": np.array(ids, np.int64),
            "event_time": np.array(times, np.int64),
            "card_id": np.array([chance.randrange(traffic.cards) for _ in ids], np.int64),
            "terminal_id": np.array([chance.randrange(traffic.terminals) for _ in ids], np.int64),
            "amount": np.array([round(chance.lognormvariate(3.0, 1.0), 2) for _ in ids], np.float64),
        },
        rows,
    )


def _labels(chance: random.Random, transactions: ColumnBatch) -> ColumnBatch:
    columns = {name: transactions[name] for name in SCHEMA.label_fields() if name != SCHEMA.label.field}
    columns[SCHEMA.label.field] = np.array([chance.randrange(2) for _ in range(transactions.rows)], np.int64)
    return ColumnBatch(columns, transactions.rows)


def _send_at(
    world: World, broker: SimBroker, at_s: float, topic: str, key: bytes, value: bytes | None, fault: Kind | None = None
) -> None:
    def send() -> None:
        broker.append(topic, key, value, sender="upstream")
        if fault:
            world.fire(fault)

    world.at(at_s, send)


def _send_aborted_at(
    world: World, broker: SimBroker, at_s: float, topic: str, key: bytes, value: bytes, producer: int
) -> None:
    """Send a record of an upstream transaction that is aborted: readers wait for its end, and skip it."""
    log = broker.logs[broker.partition_of(topic, key)]

    def send() -> None:
        log.append(broker.now_ms, key, value, (), producer, "upstream")
        world.fire("upstream-aborted")
        world.at(UPSTREAM_OPEN_S_MAX * (producer % 7) / 7, lambda: log.write_marker(producer, False, broker.now_ms))

    world.at(at_s, send)


def _malformed(chance: random.Random, message: bytes) -> bytes | None:
    return chance.choice([None, b"", b"\xff\xfe", message[: len(message) // 2], b"x" * 5_000])
