"""The log of one partition: records, transactions under way, markers that occupy offsets, a beginning that moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streaming.clients import Headers

State = Literal["kept", "open", "aborted", "marker"]


@dataclass(slots=True)
class Record:
    """One entry of a log. `state`: kept, of an open or an aborted transaction, or a transaction's marker.

    `time_ms`: of its append. `sender`, `sent_s`: which session sent it, and when, for the oracle.
    """

    offset: int
    time_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    producer: int
    state: State
    sender: str
    sent_s: float


class PartitionLog:
    """Records by offset from 0 on; those before `beginning` can be read no more (but `records` still has them)."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.beginning = 0
        # of each producer with a transaction under way, where that began
        self.open: dict[int, int] = {}

    @property
    def end(self) -> int:
        """The offset that the next record will get."""
        return len(self.records)

    @property
    def stable_end(self) -> int:
        """Where reading what is committed must stop: the first record of an open transaction, or the end."""
        return min(self.open.values(), default=len(self.records))

    def append(
        self,
        now_ms: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        producer: int = -1,
        transactional: bool = False,
        sender: str = "",
        sent_s: float = 0.0,
    ) -> Record:
        """Add a record; its time is never before the last one's."""
        if transactional:
            self.open.setdefault(producer, len(self.records))
        record = Record(
            len(self.records), max(now_ms, self.records[-1].time_ms if self.records else 0), key, value, headers,
            producer, "open" if transactional else "kept", sender, sent_s,
        )  # fmt: skip
        self.records.append(record)
        return record

    def mark(self, producer: int, kept: bool, now_ms: int) -> None:
        """End a producer's transaction in this partition: its marker takes an offset."""
        first = self.open.pop(producer, None)
        if first is None:
            return
        for record in self.records[first:]:
            if record.producer == producer and record.state == "open":
                record.state = "kept" if kept else "aborted"
        self.append(now_ms, None, None, producer=producer).state = "marker"

    def read(self, position: int, records_max: int) -> tuple[list[Record], int]:
        """Up to `records_max` committed records from `position` on, and the position after them.

        Aborted records and markers are passed over, those behind the last record returned too.
        """
        end = self.stable_end
        found: list[Record] = []
        while position < end:
            record = self.records[position]
            if record.state == "kept":
                if len(found) == records_max:
                    break
                found.append(record)
            position += 1
        return found, position

    def at_time(self, time_ms: int) -> int:
        """The first offset whose record is of `time_ms` or later, else the end."""
        return next((one.offset for one in self.records[self.beginning :] if one.time_ms >= time_ms), self.end)
