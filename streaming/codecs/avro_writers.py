"""The writers' schemas of messages, found by their number and cached."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from cascade.schema import Field
from streaming.codecs.avro_schemas import SchemaRefusedError, WriterSchema, parse_writer
from streaming.codecs.faults import Fault
from streaming.codecs.protocol import RejectReason

NUMBER_MAX = 2**31 - 1  # registries count in 32-bit integers
# The most cached schemas; beyond it the cache is emptied.
KNOWN_MAX = 1_000
# An unknown number is requested again after this long: a registry's replica can lag behind the producer's.
ABSENT_S = 60.0
# Random numbers in messages must not delay the loop: of each window at most MISSES_S_MAX is spent on requests for
# unknown numbers, each counted as MISS_S_MIN at least. After that, unknown numbers are rejected without a request.
WINDOW_S, MISSES_S_MAX, MISS_S_MIN = 10.0, 1.0, 0.01


class Schemas(Protocol):
    """A source of schemas by number."""

    def text(self, number: int) -> str | None:
        """Returns the schema with this number, or None.

        Raises SchemaRefusedError if it cannot be read, BrokerError if the source does not answer.
        """
        ...

    def register(self, text: str) -> int:
        """Returns the number of a schema, registering it if it is new; raises BrokerError or SettingError."""
        ...


class Writers:
    """The writers' schemas as steps to `fields`; caches them, and for a while the numbers without a schema."""

    def __init__(
        self, schemas: Schemas, fields: Mapping[str, Field], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._schemas, self._fields, self._monotonic = schemas, fields, monotonic
        self._known: dict[int, WriterSchema | Fault] = {}
        self._absent_until_s: dict[int, float] = {}
        self._window_ends_s, self._missed_s = 0.0, 0.0

    def find(self, number: int) -> WriterSchema | Fault:
        """Returns the schema with this number, or the fault of its messages; raises BrokerError."""
        known = self._known.get(number)
        if known is not None:
            return known
        now_s = self._monotonic()
        if number > NUMBER_MAX or now_s < self._absent_until_s.get(number, 0.0):
            return RejectReason.OTHER_SCHEMA, "there is no schema with the number in its frame"
        if now_s >= self._window_ends_s:
            self._window_ends_s, self._missed_s = now_s + WINDOW_S, 0.0
        if self._missed_s >= MISSES_S_MAX:
            return RejectReason.OTHER_SCHEMA, "unknown schema number, after too many others in a short time"
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
                return RejectReason.OTHER_SCHEMA, "there is no schema with the number in its frame"
            found = parse_writer(text, self._fields)
        except SchemaRefusedError as refused:
            found = refused.fault
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[number] = found
        return found
