"""The writers' schemas that messages name, found by their number and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from cascade.schema import Field
from streaming.codecs.avro_schemas import SchemaRefusedError, WriterSchema, parse_writer
from streaming.codecs.faults import Fault
from streaming.codecs.protocol import RejectReason

NUMBER_MAX = 2**31 - 1  # registries count in 32-bit integers
# Schemas that were looked at; beyond it all are forgotten and asked for again.
KNOWN_MAX = 1_000
# A number that no schema has may have one later: a registry's replica can lag behind the one that the producer asked.
ABSENT_S = 60.0
# Who writes numbers at random must not hold up the loop: of each window at most so much is spent on looking for what
# is not there, each look counted with MISS_S_MIN at least. Then unknown numbers are refused unasked, known ones read.
WINDOW_S, MISSES_S_MAX, MISS_S_MIN = 10.0, 1.0, 0.01


class Schemas(Protocol):
    """Where schemas are found by their number."""

    def text(self, number: int) -> str | None:
        """The schema with this number, None where there is none.

        Raises SchemaRefusedError where it is none that can be read, BrokerError where that cannot be told now.
        """
        ...

    def register(self, text: str) -> int:
        """The number of a schema of ours, a new one where it has none; raises BrokerError or SettingError."""
        ...


class Writers:
    """The schemas of those who write, as steps towards `fields`; what was found is kept, what was not for a while."""

    def __init__(
        self, schemas: Schemas, fields: Mapping[str, Field], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._schemas, self._fields, self._monotonic = schemas, fields, monotonic
        self._known: dict[int, WriterSchema | Fault] = {}
        self._absent_until_s: dict[int, float] = {}
        self._window_ends_s, self._missed_s = 0.0, 0.0

    def find(self, number: int) -> WriterSchema | Fault:
        """How to read what this schema has written, or why that cannot be; raises BrokerError where nobody can say."""
        known = self._known.get(number)
        if known is not None:
            return known
        now_s = self._monotonic()
        if number > NUMBER_MAX or now_s < self._absent_until_s.get(number, 0.0):
            return RejectReason.OTHER_SCHEMA, "there is no schema of the number that it names"
        if now_s >= self._window_ends_s:
            self._window_ends_s, self._missed_s = now_s + WINDOW_S, 0.0
        if self._missed_s >= MISSES_S_MAX:
            return RejectReason.OTHER_SCHEMA, "it names a schema that is not known, as too many did of late"
        found = self._look_up(number)
        if not isinstance(found, WriterSchema):
            self._missed_s += max(self._monotonic() - now_s, MISS_S_MIN)
        return found

    def _look_up(self, number: int) -> WriterSchema | Fault:
        found: WriterSchema | Fault
        try:
            text = self._schemas.text(number)
            if text is None:
                if len(self._absent_until_s) >= KNOWN_MAX:
                    self._absent_until_s.clear()
                self._absent_until_s[number] = self._monotonic() + ABSENT_S
                return RejectReason.OTHER_SCHEMA, "there is no schema of the number that it names"
            found = parse_writer(text, self._fields)
        except SchemaRefusedError as refused:
            found = refused.fault
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[number] = found
        return found
