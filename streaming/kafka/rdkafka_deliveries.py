"""Counts acknowledgements in librdkafka's threads, in compiled code: neither a callback in Python nor a poll.

Each record carries the address of the cell of its delivery. The cells lie in blocks; a block exists until all of its
deliveries are done.
"""

from __future__ import annotations

from ctypes import c_void_p
from typing import Any, NamedTuple

import numpy as np

from cascade.columns import Int64
from streaming.kafka import rdkafka_kernels as kernels
from streaming.kafka.rdkafka_library import ON_NEW_CALLBACK, rdkafka

CELLS_OF_A_BLOCK = 1_024


class Failure(NamedTuple):
    """The first record that was not delivered: librdkafka's error code, and the handle of the record's topic."""

    code: int
    topic: int


class Cell:
    """The count of a delivery's records; `address`: for the records' private word."""

    __slots__ = ("_words", "address")

    def __init__(self, words: Int64, address: int) -> None:
        self._words, self.address = words, address

    def done(self) -> bool:
        """Whether the broker has acknowledged all records."""
        # the time is written last
        return bool(self._words[kernels.DONE_US]) and not self._words[kernels.FAILED]

    def done_s(self) -> float:
        """When the last record was acknowledged, seconds since the epoch."""
        return int(self._words[kernels.DONE_US]) / 1e6


class Deliveries:
    """The deliveries of a producer; must exist as long as the rd_kafka_t."""

    def __init__(self) -> None:
        self._state = np.zeros(kernels.STATE_WORDS, np.int64)
        self._blocks: list[Int64] = []
        self._used = CELLS_OF_A_BLOCK
        self._counter = kernels.acknowledgement_counter()
        self._on_new = ON_NEW_CALLBACK(self._intercept)

    def configure(self, configuration: int) -> None:
        """Lets the client that is made from a rd_kafka_conf_t count its acknowledgements here."""
        rdkafka.conf_interceptor_add_on_new(configuration, b"cascade", self._on_new, None)

    def open(self, records: int) -> Cell:
        """A new delivery of this many records."""
        if self._used == CELLS_OF_A_BLOCK:
            self._blocks = [block for block in self._blocks if block[:, kernels.LEFT].any()]
            self._blocks.append(np.zeros((CELLS_OF_A_BLOCK, kernels.CELL_WORDS), np.int64))
            self._used = 0
        words = self._blocks[-1][self._used]
        self._used += 1
        words[kernels.LEFT] = records
        return Cell(words, words.ctypes.data)

    def failure(self) -> Failure | None:
        """The first failure that was not of a dropped record."""
        code, topic, _ = self._state.tolist()
        return Failure(code, topic) if code else None

    def drop(self, dropping: bool) -> None:
        """From now on failures are those of records that are dropped on purpose, or not any more."""
        self._state[kernels.ABORTING] = dropping

    def _intercept(self, client: int, configuration: int, opaque: Any, reason: Any, reason_bytes: int) -> int:
        return int(
            rdkafka.interceptor_add_on_acknowledgement(
                client, b"cascade", c_void_p(self._counter.address), self._state.ctypes.data
            )
        )
