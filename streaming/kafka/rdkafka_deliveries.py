"""Counts acknowledgements in librdkafka's threads, in compiled code: neither a callback in Python nor a poll.

Each record carries the address of the cell of its delivery. The cells lie in blocks; a block exists until all of its
deliveries are done.
"""

from __future__ import annotations

from ctypes import c_void_p
from typing import Any, NamedTuple

import numpy as np

from cascade.columns import Int64
from streaming.kafka import rdkafka_send as kernels
from streaming.kafka.rdkafka_library import ON_NEW_CALLBACK, rdkafka
from streaming.kafka.rdkafka_memory import WORD_BYTES

CELLS_OF_A_BLOCK = 1_024
_NAME = b"cascade"
_CELL_BYTES = kernels.CELL_WORDS * WORD_BYTES


class Failure(NamedTuple):
    """The first record that was not delivered: librdkafka's error code, and the handle of the record's topic."""

    code: int
    topic: int


class Cell(NamedTuple):
    """The count of a delivery's records: a row of a block, int64 [CELLS_OF_A_BLOCK, CELL_WORDS]; and its address."""

    block: Int64
    row: int
    address: int


class Deliveries:
    """The deliveries of a producer; must exist as long as the rd_kafka_t.

    `state`: int64 [STATE_WORDS]; `state_address`: its address.
    """

    def __init__(self) -> None:
        self.state = np.zeros(kernels.STATE_WORDS, np.int64)
        self.state_address: int = self.state.ctypes.data
        self._blocks: list[Int64] = []
        self._block_address = 0
        self._used = CELLS_OF_A_BLOCK
        self._counter = kernels.acknowledgement_counter()
        self._on_new = ON_NEW_CALLBACK(self._intercept)

    def configure(self, configuration: int) -> None:
        """Lets the client that is made from a rd_kafka_conf_t count its acknowledgements here."""
        rdkafka.conf_interceptor_add_on_new(configuration, _NAME, self._on_new, None)

    def open(self) -> Cell:
        """The cell of a new delivery."""
        if self._used == CELLS_OF_A_BLOCK:
            # the time of a delivery is written last
            self._blocks = [block for block in self._blocks if not block[:, kernels.DONE_US].all()]
            self._blocks.append(np.zeros((CELLS_OF_A_BLOCK, kernels.CELL_WORDS), np.int64))
            self._block_address = self._blocks[-1].ctypes.data
            self._used = 0
        row = self._used
        self._used += 1
        return Cell(self._blocks[-1], row, self._block_address + row * _CELL_BYTES)

    def failure(self) -> Failure | None:
        """The first failure that was not of a dropped record."""
        code = self.state.item(kernels.FAILURE)
        return Failure(code, self.state.item(kernels.FAILURE_TOPIC)) if code else None

    def drop(self, dropping: bool) -> None:
        """From now on failures are those of records that are dropped on purpose, or not any more."""
        self.state[kernels.DROPPING] = dropping

    def forget_failure(self) -> None:
        """Forgets the first failure: its transaction is aborted."""
        self.state[kernels.FAILURE] = 0

    def _intercept(self, client: int, configuration: int, opaque: Any, reason: Any, reason_bytes: int) -> int:
        counter, state = c_void_p(self._counter.address), self.state_address
        return int(rdkafka.interceptor_add_on_acknowledgement(client, _NAME, counter, state))
