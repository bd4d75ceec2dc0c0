"""Repeated transactions: each gets its first decision again, as soon as that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec
import numpy as np
import structlog

from cascade.columns import Int64
from cascade.config import CodecName, Config
from cascade.policy import ACTIONS, Policy
from cascade.protocols import Clock
from streaming.kafka import ConsumerClient, FetchedBatch, Partition
from streaming.pipeline.decisions import CAUSES, STAGES, decode_decision
from streaming.pipeline.duplicates import FirstColumns, FirstDecisions, Verdicts
from streaming.pipeline.table import Table
from streaming.worker.partitions import OwnedPartition

log = structlog.get_logger()
# The difference between the clocks of worker and broker that a search by time allows for.
SKEW_MS_MAX = 5_000
# Reading the window's decisions blocks the loop. It happens once a partition, for its first repeat after a restart;
# afterwards only new decisions are read. Repeats whose decisions lie beyond these limits go to review.
READ_S_MAX = 30.0
READ_RECORDS_MAX = 2_000_000
# A read_committed reader stops before an open transaction, and so before decisions that were committed after its begin.
# A lost worker's transaction stays open until its timeout (15 s) and the coordinator's next check (10 s).
OPEN_TRANSACTION_S_MAX = 30.0
READ_INTERVAL_S = 0.5
ROWS_MAX = 10_000


@dataclass(eq=False)
class Repeats:
    """Repeated transactions that wait for their first decision; for one thread.

    The first decision is in the cache, or in flight, or was made before a restart: then the decisions topic is read
    from the beginning of the window. If it is not there, the repeat waits as long as an open transaction can hide it,
    and then (the topic's retention is over) gets `review`.
    """

    _config: Config
    _first_decisions: FirstDecisions
    _policy: Policy
    _owned: Mapping[Partition, OwnedPartition]
    _open_consumer: Callable[[], ConsumerClient]
    _clock: Clock
    _waiting: list[Table] = field(default_factory=list, init=False)
    # when the topic was last read for a partition, the time from which it was read, and the next offsets to read
    _read_s: dict[OwnedPartition, float] = field(default_factory=dict, init=False)
    _read_from_ms: int = field(default=0, init=False)
    _read_to: dict[Partition, int] = field(default_factory=dict, init=False)
    # decisions that were read before their records: the previous owner decided those ahead of its commit
    _early: dict[OwnedPartition, dict[int, _Settled]] = field(default_factory=dict, init=False)

    @property
    def open(self) -> int:
        """The number of rows that wait."""
        return sum(map(len, self._waiting)) if self._waiting else 0

    def waiting_of(self, partitions: Collection[Partition]) -> int:
        """The number of rows of these partitions that wait."""
        return sum(int(table.belong_to(partitions).sum()) for table in self._waiting)

    def add(self, table: Table) -> None:
        """Adds repeats to answer, with the columns up to the step `deduplicate`."""
        if len(table):
            self._waiting.append(table)

    def drop(self, partitions: Collection[Partition]) -> None:
        """Drops the rows of partitions that this worker lost."""
        waiting, self._waiting = self._waiting, []
        for table in waiting:
            owned = ~table.belong_to(partitions)
            if owned.any():
                self._waiting.append(table.take(owned))

    def collect(self) -> list[Table]:
        """Returns the rows whose first decision is known, with its columns."""
        if not self._waiting:
            return []
        answered: list[Table] = []
        waiting, self._waiting = self._waiting, []
        for table in waiting:
            self._look_up(table)
            first = self._first_decisions.first(table.rows["first"])
            ready = first.known | ~first.present
            chosen = np.flatnonzero(ready)
            if len(chosen):
                answered.append(self._filled(table.take(chosen), first, chosen))
            if not ready.all():
                self._waiting.append(table.take(~ready))
        return answered

    def _filled(self, table: Table, first: FirstColumns, chosen: Int64) -> Table:
        """Fills the columns with the decisions `first[chosen]`, and with `review` where the cache has dropped them."""
        rows, verdicts, gone = table.rows, first.verdicts.take(chosen), ~first.present[chosen]
        rows["action"] = np.where(gone, ACTIONS.index("review"), verdicts.actions)
        rows["stage"] = np.where(gone, 0, verdicts.stages)
        rows["cause"] = np.where(gone, CAUSES.index("error"), verdicts.causes)
        rows["score"] = np.where(gone, self._policy.review_from, verdicts.scores)
        rows["screener_score"] = np.where(gone, self._policy.review_from, verdicts.screener_scores)
        rows["first_offset"] = np.where(gone, -1, first.offsets[chosen])
        bundles = list(dict.fromkeys(first.bundles[row] for row in chosen.tolist()))
        rows["bundle"] = [bundles.index(first.bundles[row]) for row in chosen.tolist()]
        return replace(table, bundles=tuple(bundles))

    def _look_up(self, table: Table) -> None:
        """Looks up first decisions that were made before this worker owned the partition."""
        entries, appended_ms = table.rows["first"], table.rows["appended_ms"]
        first = self._first_decisions.first(entries)
        for row in np.flatnonzero(first.present & ~first.known).tolist():
            owned = self._owned[(table.topic, int(table.rows["partition_id"][row]))]
            offset = first.offsets[row : row + 1]
            if not owned.decided.mask(offset)[0]:
                continue  # in flight
            early = self._early.get(owned, {}).pop(int(offset[0]), None)
            if early is not None:
                self._settle(owned.partition_id, [early])
                continue
            due_s = self._read_s.get(owned, -READ_INTERVAL_S) + READ_INTERVAL_S
            if self._may_be_hidden(owned) and self._clock.monotonic() >= due_s:
                self._read_decisions(int(appended_ms[row] - 1e3 * self._config.duplicates.window_s) - SKEW_MS_MAX)
            if self._may_be_hidden(owned) or self._first_decisions.first(entries[row : row + 1]).known[0]:
                continue
            log.warning("first decision of a repeat not found: it goes to review", partition=owned.partition_id)
            self._settle(owned.partition_id, [_review(int(offset[0]), self._policy.review_from)])

    def _may_be_hidden(self, owned: OwnedPartition) -> bool:
        """Whether an open transaction may hide decisions of before the assignment from all reads so far."""
        return self._read_s.get(owned, 0.0) < owned.assigned_s + OPEN_TRANSACTION_S_MAX

    def _read_decisions(self, earliest_ms: int) -> None:
        """Reads the window's decisions for all owned partitions into the cache.

        earliest_ms: begin of the window, ms since the epoch. Only new decisions are read if the topic was read before
        for the same partitions and time.
        """
        topic, codec = self._config.kafka.topics.decisions, self._config.kafka.codec
        started_s, records, enough = self._clock.monotonic(), 0, False
        owned_by_name = {f"{topic}-{partition_id}": owned for (topic, partition_id), owned in self._owned.items()}
        more = earliest_ms >= self._read_from_ms and all(owned in self._read_s for owned in owned_by_name.values())
        consumer = self._open_consumer()
        try:
            partitions = consumer.partitions_for(topic)
            consumer.assign(partitions)
            ends = consumer.end_offsets(partitions)
            starts = self._read_to if more else consumer.offsets_at(partitions, max(earliest_ms, 0))
            for partition, offset in starts.items():
                consumer.seek(partition, offset)
            while not enough and any(consumer.position(partition) < end for partition, end in ends.items()):
                for fetched in consumer.poll(0.05, ROWS_MAX):
                    records += len(fetched)
                    self._settle_all(fetched, codec, owned_by_name)
                enough = self._clock.monotonic() - started_s > READ_S_MAX or records > READ_RECORDS_MAX
            self._read_to = {partition: consumer.position(partition) for partition in partitions}
        finally:
            consumer.close()
        self._early = {owned: early for owned, early in self._early.items() if owned in owned_by_name.values()}
        now_s = self._clock.monotonic()
        if enough:
            log.warning("too many decisions in the window: not all were read", records=records)
        self._read_s = dict.fromkeys(owned_by_name.values(), math.inf if enough else now_s)
        self._read_from_ms = self._read_from_ms if more else earliest_ms
        log.info("decisions read for repeats", records=records, seconds=round(now_s - started_s, 3))

    def _settle_all(self, fetched: FetchedBatch, codec: CodecName, owned_by_name: Mapping[str, OwnedPartition]) -> None:
        found: dict[int, list[_Settled]] = {}
        for value in fetched.values:
            try:
                decision = decode_decision(value or b"", codec)
                name, _, offset = decision.decision_id.rpartition("-")
                settled = _Settled(
                    int(offset), ACTIONS.index(decision.decision), STAGES.index(decision.stage),
                    CAUSES.index(decision.degraded_cause or ""), decision.score, decision.screener_score,
                    decision.decision_time_ms, decision.bundle,
                )  # fmt: skip
            except (msgspec.MsgspecError, ValueError):
                continue  # not a decision of Cascade
            if name in owned_by_name and not decision.duplicate:
                found.setdefault(owned_by_name[name].partition_id, []).append(settled)
        for owned in owned_by_name.values():
            decisions = found.get(owned.partition_id, [])
            self._settle(owned.partition_id, decisions)
            ahead = set(owned.decided.ahead[owned.decided.ahead >= owned.next].tolist())
            for settled in decisions:
                if settled.offset in ahead:
                    self._early.setdefault(owned, {}).setdefault(settled.offset, settled)

    def _settle(self, partition_id: int, decisions: Sequence[_Settled]) -> None:
        for bundle in {decision.bundle for decision in decisions}:
            of_bundle = [decision for decision in decisions if decision.bundle == bundle]
            offsets, *verdicts = (np.array([decision[column] for decision in of_bundle]) for column in range(7))
            self._first_decisions.settle(partition_id, offsets, Verdicts(*verdicts), bundle)


class _Settled(NamedTuple):
    offset: int
    action: int
    stage: int
    cause: int
    score: float
    screener_score: float
    time_ms: int
    bundle: str


def _review(offset: int, score: float) -> _Settled:
    return _Settled(offset, ACTIONS.index("review"), 0, CAUSES.index("error"), score, score, 0, "")
