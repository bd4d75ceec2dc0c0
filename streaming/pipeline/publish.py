"""Turns outcomes and rejects into records of the decisions and dead-letter topics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cascade.columns import Int64
from cascade.config import Config
from cascade.ledger import Ledger, Path, StageClock
from cascade.policy import Policy
from cascade.protocols import Clock
from cascade.schema import Roles
from streaming.codecs import Reject
from streaming.kafka import FetchedBatch, Partition
from streaming.pipeline.dead_letters import HEADER_PREFIX, dead_letter
from streaming.pipeline.decisions import (
    CAUSES,
    STAGES,
    DecisionColumns,
    RecordPositions,
    Verdicts,
    encode_decisions,
    message_keys,
)
from streaming.pipeline.duplicates import FirstColumns, FirstDecisions
from streaming.pipeline.escalations import Outcome
from streaming.pipeline.in_flight import Rows
from streaming.pipeline.privacy import CardHasher
from streaming.worker.outbox import Outbox, Sent


@dataclass(eq=False)
class Publisher:
    """Sends decisions, records them as the first decisions of their transactions, and dead-letters rejects."""

    _config: Config
    _roles: Roles
    _bundle_version: str
    _policy: Policy
    _outbox: Outbox
    _first_decisions: FirstDecisions
    _hasher: CardHasher | None
    _ledger: Ledger
    _clock: Clock
    _stage_clock: StageClock = field(default_factory=StageClock, init=False)

    def decide(self, outcome: Outcome) -> None:
        """Decides rows by their scores, and sends the decisions."""
        rows, count = outcome.rows, len(outcome.rows)
        if not count:
            return
        with self._stage_clock:
            actions = self._policy.actions(outcome.score)
        self._ledger.record_stage("decide", self._stage_clock.wall_s, self._stage_clock.cpu_s, count)
        path: Path = "degraded" if outcome.cause is not None else "escalated" if outcome.stage == "deep" else "screened"
        now_ms = self._clock.time() * 1e3
        verdicts = Verdicts(
            actions=actions,
            stages=np.full(count, STAGES.index(outcome.stage), np.uint8),
            causes=np.full(count, CAUSES.index(outcome.cause or ""), np.uint8),
            scores=outcome.score,
            screener_scores=rows.screener_score,
            times_ms=np.full(count, int(now_ms)),
        )
        bundles, no_first = [self._bundle_version] * count, np.full(count, -1, np.int64)
        self._send(rows, verdicts, bundles, no_first, now_ms, outcome.deep_ms, path, outcome.cause)
        for index in np.unique(rows.partition_index):
            chosen = np.flatnonzero(rows.partition_index == index)
            partition_id = rows.partitions[index][1]
            self._first_decisions.settle(
                partition_id, rows.offsets[chosen], verdicts.take(chosen), self._bundle_version
            )

    def repeat(self, rows: Rows, first: FirstColumns) -> None:
        """Sends the first decisions of repeated transactions again, marked as duplicates."""
        if len(rows):
            now_ms = self._clock.time() * 1e3
            self._send(rows, first.verdicts, first.bundles, first.offsets, now_ms, 0.0, "duplicate", None)

    def reject(self, fetched: FetchedBatch, rejects: Sequence[Reject]) -> None:
        """Dead-letters messages of a fetch; if card ids are hashed, without the message, which may contain one."""
        now_ms = self._clock.time() * 1e3
        partition = (fetched.topic, fetched.partition)
        for reject in rejects:
            index = reject.index
            key, value, headers = fetched.keys[index], fetched.values[index], list(fetched.headers[index])
            if self._hasher is not None:
                headers = []
                key = None if key is None else self._hasher.text(self._hasher.hash_column(np.array([key], "S")))[0]
                value = None
            letter = dead_letter(
                reject, topic=fetched.topic, partition=fetched.partition, offset=int(fetched.offsets[index]),
                time_ms=int(now_ms), key=key, value=value, headers=headers,
            )  # fmt: skip
            if self._hasher is not None:
                letter.headers.append((HEADER_PREFIX + "withheld", b"value and headers: privacy.hash_card"))
            offsets = fetched.offsets[index : index + 1]
            self._outbox.send(
                self._config.kafka.topics.dead_letters, letter.key, letter.value, letter.headers,
                Sent({partition: offsets}, np.zeros(0), "", None),
            )  # fmt: skip
            self._ledger.count_dead_letters(reject.reason.value, 1)

    def _send(
        self,
        rows: Rows,
        verdicts: Verdicts,
        bundles: Sequence[str],
        first_offsets: Int64,
        now_ms: float,
        deep_ms: float,
        path: Path,
        cause: str | None,
    ) -> None:
        keys: list[bytes] = []
        messages: list[bytes] = []
        offsets: dict[Partition, Int64] = {}
        with self._stage_clock:
            for index in np.unique(rows.partition_index):
                chosen = np.flatnonzero(rows.partition_index == index)
                topic, partition = rows.partitions[index]
                count = len(chosen)
                columns = DecisionColumns(
                    topic=topic,
                    partition=partition,
                    bundles=[bundles[row] for row in chosen.tolist()],
                    offsets=rows.offsets[chosen],
                    first_offsets=first_offsets[chosen],
                    transaction_ids=rows.batch[self._roles.transaction_id][chosen],
                    actions=verdicts.actions[chosen],
                    stages=verdicts.stages[chosen],
                    scores=verdicts.scores[chosen],
                    screener_scores=verdicts.screener_scores[chosen],
                    causes=verdicts.causes[chosen],
                    event_times_ms=rows.batch[self._roles.event_time][chosen],
                    decision_times_ms=np.full(count, int(now_ms)),
                    queue_ms=rows.queue_ms[chosen],
                    features_ms=np.full(count, rows.features_ms),
                    screener_ms=np.full(count, rows.screener_ms),
                    deep_ms=np.full(count, deep_ms),
                    total_ms=now_ms - rows.start_ms[chosen],
                )
                messages += encode_decisions(self._config.kafka.codec, columns)
                cards = rows.batch[self._roles.card][chosen]
                keys += message_keys(cards) if self._hasher is None else self._hasher.text(cards)
                offsets[topic, partition] = columns.offsets
            positions = RecordPositions(rows.partitions, rows.partition_index, rows.offsets)
            sent = Sent(offsets, rows.start_ms, path, cause, positions)
            self._outbox.send_many(self._config.kafka.topics.decisions, keys, messages, sent)
        self._ledger.record_stage("produce", self._stage_clock.wall_s, self._stage_clock.cpu_s, len(rows))
