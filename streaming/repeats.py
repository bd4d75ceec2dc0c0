"""Transactions that came again: each gets its first decision again, once that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import structlog

from cascade.columns import Array, Int64
from cascade.config import CodecName, Config
from cascade.policy import ACTIONS, Policy
from cascade.protocols import Clock
from streaming.clients import ConsumerClient, FetchedBatch, Partition
from streaming.decisions import CAUSES, STAGES, decode_decision
from streaming.duplicates import FirstColumns, FirstDecisions
from streaming.in_flight import Rows
from streaming.partitions import OwnedPartition

log = structlog.get_logger()
# What the clocks of worker and broker may differ by, when a decision is looked for by its time.
SKEW_MS_MAX = 5_000
# Reading the window's decisions holds the loop: it happens once a partition, for its first duplicate after a restart;
# then only what was added is read. Beyond this, what was not read goes to review.
READ_S_MAX = 30.0
READ_RECORDS_MAX = 2_000_000
# Readers of what is committed stop where a transaction is open, also before decisions that were committed after it
# began. A worker that is gone leaves one open until its timeout (15 s), and then until the coordinator looks (10 s).
HIDDEN_S_MAX = 30.0
READ_AGAIN_S = 0.5
ROWS_MAX = 10_000


class Repeats:
    """Duplicates between their arrival and their answer; one thread uses it.

    A first decision is in the cache, or still being made, or was made before a restart: then the decisions topic is
    read from the beginning of the window. One that is not found there is waited for as long as an open transaction can
    hide it, and then (its retention is over) answered with `review`.
    """

    def __init__(
        self, config: Config, first_decisions: FirstDecisions, policy: Policy,
        owned: Mapping[Partition, OwnedPartition], open_consumer: Callable[[], ConsumerClient],
        publish: Callable[[Rows, FirstColumns], None], clock: Clock,
    ) -> None:  # fmt: skip
        self._config, self._first_decisions, self._policy, self._owned = config, first_decisions, policy, owned
        self._open_consumer = open_consumer
        self._publish = publish
        self._clock = clock
        self._waiting: list[tuple[Rows, Int64, Int64]] = []
        # when the topic was read last for a partition, from which time on, and up to which offsets
        self._read_s: dict[OwnedPartition, float] = {}
        self._read_from_ms = 0
        self._read_to: dict[Partition, int] = {}
        # decisions that were read before the records that they are of: those were decided ahead of the commit
        self._early: dict[OwnedPartition, dict[int, _Settled]] = {}

    @property
    def open(self) -> int:
        """Rows that wait."""
        return sum(len(rows) for rows, _, _ in self._waiting)

    def waiting_of(self, partitions: Iterable[Partition]) -> int:
        """Rows of these partitions that wait."""
        wanted = set(partitions)
        return sum(
            sum(rows.partitions[position] in wanted for position in rows.source.tolist())
            for rows, _, _ in self._waiting
        )

    def add(self, rows: Rows, entries: Int64, appended_ms: Int64) -> None:
        """Answer rows whose first occurrences are the cache's `entries`; `appended_ms` int64: the rows' own times."""
        if len(rows):
            self._waiting.append((rows, entries, appended_ms))

    def drop(self, partitions: Iterable[Partition]) -> None:
        """The partitions are another's."""
        gone = frozenset(partitions)
        kept = []
        for rows, entries, appended_ms in self._waiting:
            stay = ~np.array([one in gone for one in rows.partitions], bool)[rows.source]
            if stay.any():
                kept.append((rows.take(stay), entries[stay], appended_ms[stay]))
        self._waiting = kept

    def advance(self) -> None:
        """Answer those whose first decision is known by now."""
        waiting, self._waiting = self._waiting, []
        for rows, entries, appended_ms in waiting:
            self._look_up(rows, entries, appended_ms)
            first = self._first_decisions.first(entries)
            ready = first.known | ~first.held
            self._publish(rows.take(ready), self._filled(first, ready))
            rest = ~ready
            if rest.any():
                self._waiting.append((rows.take(rest), entries[rest], appended_ms[rest]))

    def _filled(self, first: FirstColumns, chosen: Array) -> FirstColumns:
        """Some of the rows, with `review` for what the cache has forgotten in the meantime."""
        gone = ~first.held[chosen]
        review, error = ACTIONS.index("review"), CAUSES.index("error")
        score = self._policy.review_from
        return FirstColumns(
            held=first.held[chosen],
            known=first.known[chosen],
            partitions=first.partitions[chosen],
            offsets=np.where(gone, -1, first.offsets[chosen]),
            actions=np.where(gone, review, first.actions[chosen]),
            stages=np.where(gone, 0, first.stages[chosen]),
            causes=np.where(gone, error, first.causes[chosen]),
            scores=np.where(gone, score, first.scores[chosen]),
            screener_scores=np.where(gone, score, first.screener_scores[chosen]),
            decision_times_ms=first.decision_times_ms[chosen],
            bundles=[first.bundles[row] for row in np.flatnonzero(chosen).tolist()],
        )

    def _look_up(self, rows: Rows, entries: Int64, appended_ms: Int64) -> None:
        """Settle first decisions that were made before this worker had the partition."""
        first = self._first_decisions.first(entries)
        for row in np.flatnonzero(first.held & ~first.known).tolist():
            one = self._owned[rows.partitions[rows.source[row]]]
            offset = first.offsets[row : row + 1]
            if not one.decided.mask(offset)[0]:
                continue  # still being made
            early = self._early.get(one, {}).pop(int(offset[0]), None)
            if early is not None:
                self._settle(one.number, [early])
                continue
            if self._hides(one) and self._clock.monotonic() >= self._read_s.get(one, -READ_AGAIN_S) + READ_AGAIN_S:
                self._read_decisions(int(appended_ms[row] - 1e3 * self._config.duplicates.window_s) - SKEW_MS_MAX)
            if self._hides(one) or self._first_decisions.first(entries[row : row + 1]).known[0]:
                continue
            log.warning("first decision of a duplicate not found: it goes to review", partition=one.number)
            self._settle(one.number, [_review(int(offset[0]), self._policy.review_from)])

    def _hides(self, one: OwnedPartition) -> bool:
        """Whether the topic may hold decisions of before the assignment that no reading has shown."""
        return self._read_s.get(one, 0.0) < one.assigned_s + HIDDEN_S_MAX

    def _read_decisions(self, earliest_ms: int) -> None:
        """Read the decisions of the window for all partitions that are ours now, and settle what they settle.

        Where they were read before for the same partitions, only what was added.
        """
        topic, codec = self._config.kafka.topics.decisions, self._config.kafka.codec
        started_s, records, enough = self._clock.monotonic(), 0, False
        ours = {f"{one.partition[0]}-{one.number}": one for one in self._owned.values()}
        more = earliest_ms >= self._read_from_ms and all(one in self._read_s for one in ours.values())
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
                    self._settle_all(fetched, codec, ours)
                enough = self._clock.monotonic() - started_s > READ_S_MAX or records > READ_RECORDS_MAX
            self._read_to = {partition: consumer.position(partition) for partition in partitions}
        finally:
            consumer.close()
        self._early = {one: early for one, early in self._early.items() if one in ours.values()}
        now_s = self._clock.monotonic()
        if enough:
            log.warning("the decisions of the window are more than are read", records=records)
        self._read_s = dict.fromkeys(ours.values(), math.inf if enough else now_s)
        self._read_from_ms = self._read_from_ms if more else earliest_ms
        log.info("decisions read for duplicates", records=records, seconds=round(now_s - started_s, 3))

    def _settle_all(self, fetched: FetchedBatch, codec: CodecName, ours: Mapping[str, OwnedPartition]) -> None:
        found: dict[int, list[_Settled]] = {}
        for value in fetched.values:
            try:
                decision = decode_decision(value or b"", codec)
                place, _, offset = decision.decision_id.rpartition("-")
                settled = _Settled(
                    int(offset), ACTIONS.index(decision.decision), STAGES.index(decision.stage),
                    CAUSES.index(decision.degraded_cause or ""), decision.score, decision.screener_score,
                    decision.decision_time_ms, decision.bundle,
                )  # fmt: skip
            except (msgspec.MsgspecError, ValueError):
                continue  # not written by us
            if place in ours and not decision.duplicate:
                found.setdefault(ours[place].number, []).append(settled)
        for one in ours.values():
            decisions = found.get(one.number, [])
            self._settle(one.number, decisions)
            ahead = set(one.decided.ahead[one.decided.ahead >= one.next].tolist())
            for settled in decisions:
                if settled.offset in ahead:
                    self._early.setdefault(one, {}).setdefault(settled.offset, settled)

    def _settle(self, number: int, decisions: Sequence[_Settled]) -> None:
        for bundle in {one.bundle for one in decisions}:
            of_bundle = [one for one in decisions if one.bundle == bundle]
            offsets, actions, stages, causes, scores, screener_scores, times_ms = (
                np.array([one[column] for one in of_bundle]) for column in range(7)
            )
            self._first_decisions.settle(
                number, offsets, actions, stages, causes, scores, screener_scores, times_ms, bundle
            )


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
