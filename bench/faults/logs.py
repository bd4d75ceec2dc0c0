"""The log of one partition: records, open transactions, transaction markers, and a log start that moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streaming.kafka import Headers

State = Literal["committed", "open", "aborted", "marker"]


@dataclass(slots=True)
class Record:
    """One entry of a log.

    `time_ms`: append time. `producer`: producer id, -1 outside transactions and for markers. `state`: of the record's
    transaction; "committed" for records outside transactions. `sender`, `sent_s`: the session that sent it, and when.
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
    """The records by offset, from 0. Clients cannot read those before `beginning`; `records` still has them.

    `open`: the first offset of the open transaction of each producer id.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.beginning = 0
        self.open: dict[int, int] = {}

    @property
    def end(self) -> int:
        """The offset of the next record."""
        return len(self.records)

    @property
    def stable_end(self) -> int:
        """The last stable offset, where `read_committed` ends: the first record of an open transaction, or the end."""
        return min(self.open.values(), default=len(self.records))

    def append(
        self,
        now_ms: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        producer: int = -1,
        sender: str = "",
        sent_s: float = 0.0,
    ) -> Record:
        """Append a record; the fields of Record explain the arguments. Append times never decrease."""
        offset = len(self.records)
        state: State = "committed"
        if producer >= 0:
            state = "open"
            self.open.setdefault(producer, offset)
        time_ms = max(now_ms, self.records[-1].time_ms if self.records else 0)
        record = Record(offset, time_ms, key, value, headers, producer, state, sender, sent_s)
        self.records.append(record)
        return record

    def write_marker(self, producer: int, commit: bool, now_ms: int) -> None:
        """End a producer's transaction in this partition. The marker occupies an offset."""
        first = self.open.pop(producer, None)
        if first is None:
            return
        for record in self.records[first:]:
            if record.producer == producer and record.state == "open":
                record.state = "committed" if commit else "aborted"
        self.append(now_ms, None, None).state = "marker"

    def read(self, position: int, records_max: int) -> tuple[list[Record], int]:
        """Up to `records_max` committed records from `position`, and the position after them.

        Skips aborted records and markers, also those that follow the last record.
        """
        end = self.stable_end
        found: list[Record] = []
        while position < end:
            record = self.records[position]
            if record.state == "committed":
                if len(found) == records_max:
                    break
                found.append(record)
            position += 1
        return found, position

    def at_time(self, time_ms: int) -> int:
        """The first offset whose append time is `time_ms` or later; the end if there is none."""
        later = (record.offset for record in self.records[self.beginning :] if record.time_ms >= time_ms)
        return next(later, self.end)

    def committed_records(self) -> list[Record]:
        """All records that a `read_committed` consumer sees."""
        return [record for record in self.records if record.state == "committed"]
