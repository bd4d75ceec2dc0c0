"""librdkafka's calls of a producer, with the names and the errors of its binding."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from confluent_kafka import KafkaError

from cascade.columns import ByteColumn, Int64
from streaming.kafka import rdkafka_send as kernels
from streaming.kafka.protocol import Headers, Offsets
from streaming.kafka.rdkafka_deliveries import Deliveries
from streaming.kafka.rdkafka_group import GroupMetadata
from streaming.kafka.rdkafka_handle import Handle
from streaming.kafka.rdkafka_library import (
    PRODUCER,
    PURGE_QUEUE_AND_IN_FLIGHT,
    check,
    check_error,
    milliseconds,
    offset_list,
    rdkafka,
)

_FUNCTIONS = [rdkafka.address(name) for name in ("poll", "outq_len", "produceva")]
# rd_kafka_vtype_t: what an argument of rd_kafka_produceva is; and a flag: librdkafka copies key and value.
# The types are in the order of the kernel's arguments: topic, value, key, private, flags, time.
_TYPES, _HEADER = (2, 4, 5, 6, 7, 8), 9
_COPY = 2
# RD_KAFKA_EVENT_DR
_DELIVERY_REPORTS = 1
# How long `flush` takes at most to notice that the last records have failed.
FAILED_S_MAX = 0.02
_NONE_ABSENT, _NO_TIMES = np.empty(0, np.bool_), np.empty(0, np.int64)


class ProducerHandle(Handle):
    """The owner of a producer; `deliveries`: the counts of its acknowledgements."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.deliveries = Deliveries()
        # With events `flush` waits for the acknowledgements; without, it looks for them every 10 ms. Those of records
        # that succeeded are not wanted.
        events = {"enabled_events": _DELIVERY_REPORTS, "delivery.report.only.error": True}
        super().__init__(PRODUCER, {**settings, **events}, self.deliveries.configure, kept=self.deliveries)
        self._session = np.array([*_FUNCTIONS, self.address, self.deliveries.state_address])
        self._arguments: dict[str, Int64] = {}
        self._load_kernel()

    def __len__(self) -> int:
        """The number of records that are not acknowledged, and of librdkafka's own events."""
        self.poll()
        return int(rdkafka.outq_len(self.address))

    def produce(
        self,
        topic: str,
        keys: ByteColumn,
        values: ByteColumn,
        times_ms: Sequence[int] | None,
        headers: Headers,
        cell: int,
        first: int,
        count: int,
        undelivered_max: int,
    ) -> int:
        """Queues records, and returns how many: fewer than `count` without room, and after a failure.

        topic: their topic. keys, values: the columns. times_ms: None or 0 for the present time. headers: of each
        record. cell: address of the delivery's cell. first, count: of the records to queue. undelivered_max: the limit
        of records in flight.
        """
        arguments = self._arguments.get(topic)
        if arguments is None:
            arguments = self._arguments[topic] = self._arguments_for(topic)
        # the texts exist until librdkafka has copied them
        texts = [(name.encode(), octets) for name, octets in headers] if headers else ()
        queued, error = kernels.produce(
            self._session,
            undelivered_max,
            np.concatenate([arguments, _header_arguments(texts)]) if texts else arguments,
            cell,
            keys.octets,
            keys.ends,
            _NONE_ABSENT if keys.absent is None else keys.absent,
            values.octets,
            values.ends,
            _NONE_ABSENT if values.absent is None else values.absent,
            _NO_TIMES if times_ms is None else np.asarray(times_ms, np.int64),
            first,
            count,
        )
        if error:
            _raise_unless_full(error)
        return int(queued)

    def flush(self, timeout_s: float) -> int:
        """Waits until all records are acknowledged; returns how many are not after this time.

        The events of records that failed count as such until `poll` drops them.
        """
        give_up_s = time.monotonic() + timeout_s
        while True:
            left_s = max(give_up_s - time.monotonic(), 0.0)
            code = rdkafka.flush(self.address, milliseconds(min(left_s, FAILED_S_MAX)))
            fatal = self.fatal_error()
            if fatal is not None:
                raise fatal
            if code != KafkaError._TIMED_OUT:
                check(code)
            left = len(self)
            if not left or left_s <= 0.0:
                return left

    def purge(self) -> None:
        """Drops the records that are not acknowledged."""
        check(rdkafka.purge(self.address, PURGE_QUEUE_AND_IN_FLIGHT))

    def init_transactions(self, timeout_s: float) -> None:
        """Fences earlier producers with the same transactional id."""
        with self.called():
            check_error(rdkafka.init_transactions(self.address, milliseconds(timeout_s)))

    def begin_transaction(self) -> None:
        """Begins a transaction."""
        check_error(rdkafka.begin_transaction(self.address))

    def send_offsets_to_transaction(self, offsets: Offsets, member: GroupMetadata, timeout_s: float) -> None:
        """Adds offsets to the transaction."""
        with self.called(), offset_list(offsets) as wanted:
            check_error(
                rdkafka.send_offsets_to_transaction(self.address, wanted, member.address, milliseconds(timeout_s))
            )

    def commit_transaction(self, timeout_s: float) -> None:
        """Commits the transaction."""
        with self.called():
            check_error(rdkafka.commit_transaction(self.address, milliseconds(timeout_s)))

    def abort_transaction(self, timeout_s: float) -> None:
        """Aborts the transaction."""
        with self.called():
            check_error(rdkafka.abort_transaction(self.address, milliseconds(timeout_s)))

    def _load_kernel(self) -> None:
        """Calls the kernel without a record: the first call loads it, or compiles it."""
        arguments = np.zeros((kernels.ARGUMENTS, kernels.ARGUMENT_WORDS), np.int64)
        columns = (np.empty(0, np.uint8), np.empty(0, np.int64), _NONE_ABSENT)
        cell = self.deliveries.open().address
        kernels.produce(self._session, 0, arguments, cell, *columns, *columns, _NO_TIMES, 0, 0)

    def _arguments_for(self, topic: str) -> Int64:
        """The arguments of rd_kafka_produceva, int64 [ARGUMENTS, ARGUMENT_WORDS], for records of a topic."""
        made = np.zeros((kernels.ARGUMENTS, kernels.ARGUMENT_WORDS), np.int64)
        made[:, 0] = _TYPES
        made[kernels.TOPIC, 1], made[kernels.FLAGS, 1] = self.topic(topic), _COPY
        return made


def _raise_unless_full(error: int) -> None:
    if rdkafka.error_code(error) != KafkaError._QUEUE_FULL:
        check_error(error)
    rdkafka.error_destroy(error)


def _header_arguments(headers: Sequence[tuple[bytes, bytes | None]]) -> Int64:
    """An argument of rd_kafka_produceva for each header, with the addresses of its name and value."""
    made = np.zeros((len(headers), kernels.ARGUMENT_WORDS), np.int64)
    for row, (name, value) in enumerate(headers):
        made[row, :4] = _HEADER, _address(name), 0 if value is None else _address(value), len(value or b"")
    return made


def _address(octets: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(octets), ctypes.c_void_p).value or 0
