"""The watch: of the frauds that labels name, what share had been reviewed or declined when they were decided?

It compares this recall with the least that the bundle's certificate states. The unit is a card's first fraud in a
period, as in the certificate (`stages.certificate.first_frauds`). The memory is bounded: a sample of the decisions by
partition and offset, of which an older half is dropped where too many are younger than labels can be late, and a table
of the cards that have had their first fraud. Which decisions are in the sample does not depend on what was decided.

It lives as long as the process: after a restart the decisions before it are forgotten, their labels count for nothing,
and the test begins anew.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Final

import numpy as np
import structlog

from cascade.certificate import Certificate
from cascade.columns import Array, ColumnBatch, Int64
from cascade.evidence import alarm_nats, evidence_nats
from cascade.features.spec import DAY_MS
from cascade.ledger import Ledger
from cascade.protocols import Clock
from cascade.schema import Schema
from streaming.health_state import HealthState
from streaming.pipeline import watch_kernels as kernels
from streaming.pipeline.row import ROW
from streaming.pipeline.table import Table

log = structlog.get_logger()
COMPONENT: Final = "certificate"
# 8 MB. At most half of the slots are in use, so that few decisions replace one whose label may still come.
SLOTS: Final = 1 << 19
# 1 MB each: the first frauds of 100,000 cards in a period, and those whose label was read before their decision.
CARDS: Final = 1 << 17
# Labels come this much later than `label.delay` at most; a later one finds its decision only by luck.
LATE_MS: Final = 14 * DAY_MS


class RecallWatch:
    """Counts first frauds by whether they were caught, and raises an alarm where the certificate no longer holds.

    certificate: of the bundle that decides. schema: of the bundle. ledger, health: get counts and state. clock: for
    the expiry. seed: secret, so that nobody can send transactions that replace others; None: a new one.

    For the worker's thread.
    """

    def __init__(
        self,
        certificate: Certificate,
        schema: Schema,
        ledger: Ledger,
        health: HealthState,
        clock: Clock,
        seed: int | None = None,
    ) -> None:
        self._recall, self._expires = certificate.recall, certificate.expires
        self._roles, self._label = schema.roles, schema.label.field
        self._ledger, self._health, self._clock = ledger, health, clock
        self._seed = secrets.randbits(62) if seed is None else seed
        self._horizon_ms = schema.label.delay_ms + LATE_MS
        # np.zeros takes address space only; memory is allocated as decisions come
        self._entries = np.zeros((SLOTS, 2), np.int64)
        self._seen = np.zeros(CARDS, np.int64)
        self._awaited = np.zeros(CARDS, np.int64)
        self._counts, self._reported = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self._depth_min = self._stored = 0
        self.alarmed = self.expired = False
        self._show()

    @property
    def sampled_share(self) -> float:
        """The share of the decisions that it remembers."""
        return 0.5**self._depth_min

    @property
    def missed(self) -> int:
        """First frauds that had been approved."""
        return int(self._counts[0])

    @property
    def caught(self) -> int:
        """First frauds that had been reviewed or declined."""
        return int(self._counts[1])

    def note(self, table: Table, chosen: Int64) -> None:
        """Remembers the decisions of the table's rows with these positions."""
        ids = _octets(table.batch[self._roles.transaction_id])
        stored, counted = kernels.note(
            table.rows, chosen, ids, self._seed, self._depth_min, self._entries, self._awaited, self._counts
        )
        self._stored += stored
        if counted:
            self._test()
        if self._stored >= SLOTS // 4:
            self._make_room()

    def judge(self, labels: ColumnBatch) -> None:
        """Counts the frauds that labels name; their cards as in `note`."""
        before = self._counts.copy()
        kernels.judge(
            _octets(labels[self._roles.transaction_id]), _octets(labels[self._roles.card]),
            labels[self._roles.event_time], labels[self._label], self._seed, self._recall.period_days * DAY_MS,
            self._entries, self._awaited, self._seen, self._counts,
        )  # fmt: skip
        if not np.array_equal(before, self._counts):
            self._test()

    def _test(self) -> None:
        """Reports the counts that are new, and looks whether they are too much."""
        missed, caught = (self._counts - self._reported).tolist()
        self._reported = self._counts.copy()
        self._ledger.count_first_frauds(caught, missed)
        nats = evidence_nats(self.caught, self.missed, self._recall.at_least)
        if nats >= alarm_nats(self._recall.alarm_level) and not self.alarmed:
            self.alarmed = True
            log.warning(
                "the certificate no longer holds: certify the bundle again, or train it again",
                caught=self.caught,
                first_frauds=self.caught + self.missed,
                certified=round(self._recall.at_least, 4),
                level=self._recall.alarm_level,
            )
        if not self.expired and datetime.fromtimestamp(self._clock.time(), UTC) >= self._expires:
            self.expired = True
            log.warning("the certificate has expired: certify the bundle again", expired=f"{self._expires:%Y-%m-%d}")
        self._show()

    def _show(self) -> None:
        """Shows the state as a component of the health. It never makes a service unready: it decides as before."""
        judged = self.caught + self.missed
        state = "no longer holds" if self.alarmed else "expired" if self.expired else "holds"
        text = f"{state}: {self.caught} of {judged} first frauds caught, {self._recall.at_least:.1%} certified"
        self._health.ok(COMPONENT, text)

    def _make_room(self) -> None:
        """Drops the decisions whose labels should have come, and halves the sample while too many are left."""
        newest_ms = int(self._entries[:, kernels.FACTS].max()) >> kernels.TIME_SHIFT
        oldest_ms = newest_ms - self._horizon_ms
        left = kernels.drop(self._entries, oldest_ms, self._depth_min)
        while left > SLOTS // 4 and self._depth_min < kernels.DEPTH_MAX:
            self._depth_min += 1
            left = kernels.drop(self._entries, oldest_ms, self._depth_min)
        self._stored = 0


def warm_up_watch() -> None:
    """Compiles the kernels ahead of the first transactions."""
    none, octets, entries = np.zeros(0, np.int64), np.zeros((0, 8), np.uint8), np.zeros((8, 2), np.int64)
    keys, counts = np.zeros(8, np.int64), np.zeros(2, np.int64)
    kernels.note(np.zeros(0, ROW), none, octets, 0, 0, entries, keys, counts)
    kernels.drop(entries, 0, 0)
    kernels.judge(octets, octets, none, none, 0, 1, entries, keys, keys.copy(), counts)


def _octets(column: Array) -> Array:
    """The bytes of each value, uint8 [rows, width]; column: int64 or S[n]."""
    plain = np.ascontiguousarray(column)
    return plain.view(np.uint8).reshape(len(plain), plain.dtype.itemsize)
