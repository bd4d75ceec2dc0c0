"""librdkafka's C functions, from the shared library that confluent-kafka ships; their documentation is `rdkafka.h`.

Only public functions and structures are used. They have been the same since version 2.0; what belongs to the binding is
not touched: every handle is made by `rd_kafka_new`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_ssize_t, c_void_p
from typing import Any, NamedTuple

import confluent_kafka.cimpl
from confluent_kafka import KafkaError, KafkaException

from cascade.errors import SettingError
from streaming.kafka.protocol import Offsets, Partition

# As rd_kafka_version() returns it: a byte each for major, minor, revision and pre-release.
VERSION_FIRST, VERSION_AFTER_LAST = 0x02000000, 0x03000000

PRODUCER, CONSUMER = 0, 1
CONF_OK = 0
PURGE_QUEUE_AND_IN_FLIGHT = 3
DESTROY_WITHOUT_LEAVING = 8
ANY_PARTITION, NO_OFFSET = -1, -1001
ERROR_BYTES = 512


class CMessage(ctypes.Structure):
    """rd_kafka_message_t."""

    _fields_ = (
        ("error", c_int),
        ("topic", c_void_p),
        ("partition", c_int32),
        ("value", c_void_p),
        ("value_bytes", c_size_t),
        ("key", c_void_p),
        ("key_bytes", c_size_t),
        ("offset", c_int64),
        ("private", c_void_p),
    )


class CTopicPartition(ctypes.Structure):
    """rd_kafka_topic_partition_t."""

    _fields_ = (
        ("topic", c_char_p),
        ("partition", c_int32),
        ("offset", c_int64),
        ("metadata", c_void_p),
        ("metadata_bytes", c_size_t),
        ("opaque", c_void_p),
        ("error", c_int),
        ("private", c_void_p),
    )


class CPartitionList(ctypes.Structure):
    """rd_kafka_topic_partition_list_t."""

    _fields_ = (("count", c_int), ("size", c_int), ("elements", POINTER(CTopicPartition)))


Partitions = POINTER(CPartitionList)

ERROR_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_void_p)
REBALANCE_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int, Partitions, c_void_p)
TOKEN_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_char_p, c_void_p)
ON_NEW_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t)

# Name without `rd_kafka_`: result, arguments. These return at once, and keep the interpreter's lock.
_QUICK: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "assignment_lost": (c_int, (c_void_p,)),
    "begin_transaction": (c_void_p, (c_void_p,)),
    "commit_queue": (c_int, (c_void_p, Partitions, c_void_p, c_void_p, c_void_p)),
    "conf_destroy": (None, (c_void_p,)),
    "conf_enable_sasl_queue": (None, (c_void_p, c_int)),
    "conf_interceptor_add_on_new": (c_int, (c_void_p, c_char_p, ON_NEW_CALLBACK, c_void_p)),
    "conf_new": (c_void_p, ()),
    "conf_set": (c_int, (c_void_p, c_char_p, c_char_p, c_char_p, c_size_t)),
    "conf_set_error_cb": (None, (c_void_p, ERROR_CALLBACK)),
    "conf_set_log_cb": (None, (c_void_p, c_void_p)),
    "conf_set_oauthbearer_token_refresh_cb": (None, (c_void_p, TOKEN_CALLBACK)),
    "conf_set_rebalance_cb": (None, (c_void_p, REBALANCE_CALLBACK)),
    "consumer_close_queue": (c_void_p, (c_void_p, c_void_p)),
    "consumer_closed": (c_int, (c_void_p,)),
    "consumer_group_metadata": (c_void_p, (c_void_p,)),
    "consumer_group_metadata_destroy": (None, (c_void_p,)),
    "error_code": (c_int, (c_void_p,)),
    "error_destroy": (None, (c_void_p,)),
    "error_is_fatal": (c_int, (c_void_p,)),
    "error_is_retriable": (c_int, (c_void_p,)),
    "error_string": (c_char_p, (c_void_p,)),
    "error_txn_requires_abort": (c_int, (c_void_p,)),
    "event_destroy": (None, (c_void_p,)),
    "event_error": (c_int, (c_void_p,)),
    "event_error_string": (c_char_p, (c_void_p,)),
    "event_topic_partition_list": (Partitions, (c_void_p,)),
    "fatal_error": (c_int, (c_void_p, c_char_p, c_size_t)),
    "header_get_all": (c_int, (c_void_p, c_size_t, c_void_p, c_void_p, c_void_p)),
    "incremental_assign": (c_void_p, (c_void_p, Partitions)),
    "incremental_unassign": (c_void_p, (c_void_p, Partitions)),
    "interceptor_add_on_acknowledgement": (c_int, (c_void_p, c_char_p, c_void_p, c_void_p)),
    "mem_free": (None, (c_void_p, c_void_p)),
    "memberid": (c_void_p, (c_void_p,)),
    "message_destroy": (None, (c_void_p,)),
    "message_errstr": (c_char_p, (POINTER(CMessage),)),
    "message_headers": (c_int, (c_void_p, c_void_p)),
    "message_timestamp": (c_int64, (c_void_p, c_void_p)),
    "metadata_destroy": (None, (c_void_p,)),
    "oauthbearer_set_token": (
        c_int,
        (c_void_p, c_char_p, c_int64, c_char_p, c_void_p, c_size_t, c_char_p, c_size_t),
    ),
    "oauthbearer_set_token_failure": (c_int, (c_void_p, c_char_p)),
    "outq_len": (c_int, (c_void_p,)),
    "pause_partitions": (c_int, (c_void_p, Partitions)),
    "poll": (c_int, (c_void_p, c_int)),
    "poll_set_consumer": (c_int, (c_void_p,)),
    "produceva": (c_void_p, (c_void_p, c_void_p, c_size_t)),
    "purge": (c_int, (c_void_p, c_int)),
    "queue_destroy": (None, (c_void_p,)),
    "queue_get_consumer": (c_void_p, (c_void_p,)),
    "queue_new": (c_void_p, (c_void_p,)),
    "queue_yield": (None, (c_void_p,)),
    "resume_partitions": (c_int, (c_void_p, Partitions)),
    "sasl_background_callbacks_enable": (c_void_p, (c_void_p,)),
    "topic_destroy": (None, (c_void_p,)),
    "topic_name": (c_char_p, (c_void_p,)),
    "topic_new": (c_void_p, (c_void_p, c_char_p, c_void_p)),
    "topic_partition_list_add": (POINTER(CTopicPartition), (Partitions, c_char_p, c_int32)),
    "topic_partition_list_destroy": (None, (Partitions,)),
    "topic_partition_list_new": (Partitions, (c_int,)),
    "version": (c_int, ()),
}
# These may wait: for a broker, a thread of librdkafka, or a record.
_WAITING: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "abort_transaction": (c_void_p, (c_void_p, c_int)),
    "assign": (c_int, (c_void_p, Partitions)),
    "assignment": (c_int, (c_void_p, POINTER(Partitions))),
    "commit_transaction": (c_void_p, (c_void_p, c_int)),
    "committed": (c_int, (c_void_p, Partitions, c_int)),
    "consume_batch_queue": (c_ssize_t, (c_void_p, c_int, c_void_p, c_size_t)),
    "destroy": (None, (c_void_p,)),
    "destroy_flags": (None, (c_void_p, c_int)),
    "flush": (c_int, (c_void_p, c_int)),
    "init_transactions": (c_void_p, (c_void_p, c_int)),
    "metadata": (c_int, (c_void_p, c_int, c_void_p, POINTER(c_void_p), c_int)),
    "new": (c_void_p, (c_int, c_void_p, c_char_p, c_size_t)),
    "query_watermark_offsets": (c_int, (c_void_p, c_char_p, c_int32, POINTER(c_int64), POINTER(c_int64), c_int)),
    "queue_poll": (c_void_p, (c_void_p, c_int)),
    "seek_partitions": (c_void_p, (c_void_p, Partitions, c_int)),
    "send_offsets_to_transaction": (c_void_p, (c_void_p, Partitions, c_void_p, c_int)),
    "subscribe": (c_int, (c_void_p, Partitions)),
    "unsubscribe": (c_int, (c_void_p,)),
}


class Library:
    """The functions of the tables above, each an attribute of its name."""

    def __init__(self, path: str) -> None:
        for loaded, table in ((ctypes.PyDLL(path), _QUICK), (ctypes.CDLL(path), _WAITING)):
            for name, (result, arguments) in table.items():
                function = getattr(loaded, f"rd_kafka_{name}")
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"rd_kafka_{name} is in none of the tables")

    def address(self, name: str) -> int:
        """The address of a function, for kernels."""
        return ctypes.cast(getattr(self, name), c_void_p).value or 0


def check_version(version: int) -> None:
    """Raises SettingError for a version of librdkafka whose functions may differ from the tables."""
    if not VERSION_FIRST <= version < VERSION_AFTER_LAST:
        raise SettingError(
            "configuration",
            "kafka.client",
            "librdkafka",
            f"is librdkafka {version >> 24}.{version >> 16 & 255}.{version >> 8 & 255}, and Cascade needs 2.x",
            "install confluent-kafka 2.x, or set it to kafka-python",
        )


# The extension module is linked with librdkafka, so that its functions are found in it whatever the library's file.
rdkafka = Library(confluent_kafka.cimpl.__file__)
check_version(rdkafka.version())


def check(code: int) -> None:
    """Raises KafkaException for an error code (rd_kafka_resp_err_t) other than 0."""
    if code:
        raise KafkaException(KafkaError(code))


def check_error(error: int | None) -> None:
    """Raises KafkaException for an error object (rd_kafka_error_t) other than NULL, and destroys the object."""
    if error is None:
        return
    raised = KafkaError(
        rdkafka.error_code(error),
        decoded(rdkafka.error_string(error)),
        fatal=bool(rdkafka.error_is_fatal(error)),
        retriable=bool(rdkafka.error_is_retriable(error)),
        txn_requires_abort=bool(rdkafka.error_txn_requires_abort(error)),
    )
    rdkafka.error_destroy(error)
    raise KafkaException(raised)


def decoded(text: bytes | None) -> str:
    """A text of librdkafka."""
    return (text or b"").decode(errors="replace")


def milliseconds(seconds: float) -> int:
    """A time limit as librdkafka takes it: whole milliseconds, rounded up."""
    return max(-int(-seconds * 1_000 // 1), 0)


@contextmanager
def partition_list(partitions: Iterable[Partition]) -> Iterator[Any]:
    """A list of partitions, which ends with the context."""
    with offset_list(dict.fromkeys(partitions, (NO_OFFSET, ""))) as made:
        yield made


@contextmanager
def offset_list(offsets: Offsets) -> Iterator[Any]:
    """A list of partitions with offset and metadata, which ends with the context."""
    made = rdkafka.topic_partition_list_new(len(offsets))
    # librdkafka frees the metadata of its own copies; here the list only borrows it
    texts = []
    try:
        for (topic, partition_id), (offset, metadata) in offsets.items():
            element = rdkafka.topic_partition_list_add(made, topic.encode(), partition_id).contents
            element.offset = offset
            if metadata:
                texts.append(ctypes.create_string_buffer(metadata.encode()))
                element.metadata = ctypes.addressof(texts[-1])
                element.metadata_bytes = len(texts[-1]) - 1
        yield made
    finally:
        for index in range(made.contents.count if texts else 0):
            made.contents.elements[index].metadata = None
        rdkafka.topic_partition_list_destroy(made)


class Listed(NamedTuple):
    """An element of a list of partitions: the error of this partition, None if there is none."""

    partition: Partition
    offset: int
    metadata: str
    error: KafkaError | None


def listed(partitions: Any) -> list[Listed]:
    """The elements of a list of partitions; empty for NULL."""
    if not partitions:
        return []
    return [
        Listed(
            (decoded(element.topic), element.partition),
            element.offset,
            decoded(ctypes.string_at(element.metadata, element.metadata_bytes) if element.metadata else None),
            KafkaError(element.error) if element.error else None,
        )
        for element in partitions.contents.elements[: partitions.contents.count]
    ]
