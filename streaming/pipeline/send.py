"""Step 9, send: encoded decisions, and dead letters, go to the broker through the worker's outbox."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.ledger import Path
from streaming.codecs import Reject
from streaming.kafka import FetchedBatch, Headers, Partition
from streaming.pipeline.dead_letters import HEADER_PREFIX, dead_letter
from streaming.pipeline.decisions import CAUSES, STAGES
from streaming.pipeline.privacy import CardHasher
from streaming.pipeline.table import Records, Table
from streaming.pipeline.table_kernels import stage_and_cause


@dataclass(slots=True)
class Sent:
    """Decisions, or a dead letter, that were sent: `offsets` of their records by partition, and the ledger's figures.

    `start_ms` (float64 [decisions], ms since the epoch): when each decision's latency begins. `path`: empty for what is
    no decision. `records`: what each message is about, in the same order; None for a dead letter, whose record
    `offsets` has.
    """

    offsets: dict[Partition, Int64]
    start_ms: Float64
    path: Path | Literal[""]
    cause: str | None
    records: Records | None = None

    def others(self, partitions: Collection[Partition]) -> Bool:
        """Which of the messages are not about records of these partitions, bool [messages]."""
        if self.records is None:
            return np.array([self.offsets.keys().isdisjoint(partitions)])
        topic, partition_ids = self.records.topic, self.records.partition_ids
        return ~np.isin(partition_ids, [partition_id for name, partition_id in partitions if name == topic])

    def part(self, chosen: Bool) -> Sent:
        """Returns the decisions of some messages (bool [messages]), which are all those of their partitions."""
        if self.records is None or chosen.all():
            return self
        records = self.records.part(chosen)
        remaining = {(records.topic, partition_id) for partition_id in np.unique(records.partition_ids).tolist()}
        offsets = {partition: self.offsets[partition] for partition in self.offsets.keys() & remaining}
        start_ms = self.start_ms[chosen] if self.path else self.start_ms
        return replace(self, offsets=offsets, start_ms=start_ms, records=records)


def offsets_of(messages: Sequence[Sent]) -> dict[Partition, Int64]:
    """Returns the offsets of all their records, by partition."""
    found: dict[Partition, list[Int64]] = {}
    for sent in messages:
        for partition, offsets in sent.offsets.items():
            found.setdefault(partition, []).append(offsets)
    return {partition: parts[0] if len(parts) == 1 else np.concatenate(parts) for partition, parts in found.items()}


def records_of(messages: Sequence[Sent]) -> Records | None:
    """Returns what the messages, at least one, are about, in their order; None if that is not known of each."""
    found = [sent.records for sent in messages if sent.records is not None]
    if len(found) < len(messages):
        return None
    return Records(
        found[0].topic,
        np.concatenate([records.partition_ids for records in found]),
        np.concatenate([records.offsets for records in found]),
    )


class Sender(Protocol):
    """What sends records, and remembers what they decide until the broker has acknowledged them."""

    @abstractmethod
    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """Sends one record."""

    @abstractmethod
    def send_many(self, topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], sent: Sent) -> None:
        """Sends records of one topic, in order."""


def send(
    table: Table,
    chosen: Int64,
    path: Path,
    keys: Sequence[bytes | None],
    values: Sequence[bytes | None],
    topic: str,
    outbox: Sender,
) -> None:
    """Sends the messages of the rows with these positions (int64); all of them are on the same path."""
    records, offsets, start_ms = table.records(chosen)
    cause = CAUSES[table.rows["cause"][chosen[0]]] if path == "degraded" else None
    outbox.send_many(topic, keys, values, Sent(offsets, start_ms, path, cause, records))


def path_of(table: Table, chosen: Int64) -> Path:
    """The path of the decided rows with these positions, which all have the same stage and cause."""
    stage, cause = stage_and_cause(table.rows, chosen.item(0))
    return "degraded" if cause else "escalated" if STAGES[stage] == "deep" else "screened"


def send_dead_letter(
    fetched: FetchedBatch, reject: Reject, now_ms: float, hasher: CardHasher | None, topic: str, outbox: Sender
) -> None:
    """Dead-letters a message of a fetch; if card ids are hashed, without the message, which may contain one."""
    index = reject.index
    key, value, headers = fetched.keys[index], fetched.values[index], list(fetched.headers[index])
    if hasher is not None:
        headers = []
        key = None if key is None else hasher.text(hasher.hash_column(np.array([key], "S")))[0]
        value = None
    letter = dead_letter(
        reject, topic=fetched.topic, partition=fetched.partition, offset=int(fetched.offsets[index]),
        time_ms=int(now_ms), key=key, value=value, headers=headers,
    )  # fmt: skip
    if hasher is not None:
        letter.headers.append((HEADER_PREFIX + "withheld", b"value and headers: privacy.hash_card"))
    offsets = fetched.offsets[index : index + 1]
    sent = Sent({(fetched.topic, fetched.partition): offsets}, np.zeros(0), "", None)
    outbox.send(topic, letter.key, letter.value, letter.headers, sent)
