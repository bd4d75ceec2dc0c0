"""Steps 7 to 9, decide, encode and send: rows with a score become records of the decisions topic.

Rejects become records of the dead-letter topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cascade.columns import Int64
from cascade.config import Config
from cascade.ledger import Ledger, Path, StageLaps
from cascade.policy import Policy
from cascade.protocols import Clock
from cascade.schema import Roles
from streaming.codecs import Reject
from streaming.kafka import FetchedBatch
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.dead_letters import HEADER_PREFIX, dead_letter
from streaming.pipeline.decisions import CAUSES, STAGES
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.encode import encode, encode_keys
from streaming.pipeline.privacy import CardHasher
from streaming.pipeline.table import Table
from streaming.worker.outbox import Outbox, Sent

_NO_QUEUE = np.zeros(0)


@dataclass(eq=False)
class Publisher:
    """Sends decisions, records them as the first decisions of their transactions, and dead-letters rejects."""

    _config: Config
    _roles: Roles
    _policy: Policy
    _outbox: Outbox
    _first_decisions: FirstDecisions
    _hasher: CardHasher | None
    _ledger: Ledger
    _clock: Clock
    _laps: StageLaps = field(default_factory=StageLaps, init=False)

    def decide(self, table: Table, chosen: Int64, laps: StageLaps) -> None:
        """Decides the rows with these positions by their scores, and sends the decisions.

        All of them have the same stage and cause. laps: gets the stages `decide` and `produce`.
        """
        if not len(chosen):
            return
        now_ms = self._clock.time() * 1e3
        kernels.decide(table.rows, chosen, self._policy.review_from, self._policy.decline_from, now_ms)
        laps.end("decide", len(chosen))
        self._send(table, chosen, _path(table, chosen))
        self._first_decisions.settle_rows(table, chosen)
        laps.end("produce", len(chosen))

    def decide_all(self, table: Table) -> None:
        """Decides and sends all rows of a table that has left its micro-batch, and records the stages."""
        self._laps.begin()
        self.decide(table, np.arange(len(table)), self._laps)
        self._ledger.record_batch(self._laps, _NO_QUEUE)

    def repeat(self, table: Table) -> None:
        """Sends first decisions again, for repeats whose columns have them, marked as duplicates."""
        if len(table):
            table.rows["decided_ms"] = self._clock.time() * 1e3
            self._laps.begin()
            self._send(table, np.arange(len(table)), "duplicate")
            self._laps.end("produce", len(table))
            self._ledger.record_batch(self._laps, _NO_QUEUE)

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

    def _send(self, table: Table, chosen: Int64, path: Path) -> None:
        values = encode(self._config.kafka.codec, table, chosen, self._roles.transaction_id)
        cards = table.batch[self._roles.card][chosen]
        keys = encode_keys(cards) if self._hasher is None else self._hasher.text(cards)
        offsets = table.offsets_by_partition(chosen)
        cause = CAUSES[table.rows["cause"][chosen[0]]] if path == "degraded" else None
        sent = Sent(offsets, table.rows["start_ms"][chosen], path, cause, table.records(chosen))
        self._outbox.send_many(self._config.kafka.topics.decisions, keys, values, sent)


def _path(table: Table, chosen: Int64) -> Path:
    first = table.rows[chosen[0]]
    return "degraded" if first["cause"] else "escalated" if STAGES[first["stage"]] == "deep" else "screened"
