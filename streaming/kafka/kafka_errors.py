"""Translates kafka-python's errors into BrokerError: a line with the addresses, the action and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kafka.errors import InvalidProducerEpochError, KafkaError, OffsetOutOfRangeError
from kafka.errors import ProducerFencedError as VendorProducerFencedError

from cascade.errors import BrokerError, ProducerFencedError
from streaming.kafka.access_errors import is_access_error


@contextlib.contextmanager
def translated(action: str, servers: str) -> Iterator[None]:
    """Raises kafka-python's errors as BrokerError, with the original error as the cause."""
    try:
        yield
    except OffsetOutOfRangeError as error:
        raise deleted_offsets_error(servers, action, worded(error)) from error
    except (KafkaError, OSError, ValueError, TypeError, AssertionError) as error:
        if is_fenced(error):
            raise fenced_error(servers) from error
        remedy = "; check kafka.security" if is_access_error(error) else ""
        raise BrokerError(f"Kafka at {servers}: {action}: {worded(error)}{remedy}") from error


def worded(error: BaseException) -> str:
    """The error's text in a line, or its type if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def is_fenced(error: object) -> bool:
    """Whether the broker fences this producer: a newer one with its transactional id exists.

    The coordinator also fences a producer whose transaction took longer than its timeout.
    """
    return isinstance(error, (VendorProducerFencedError, InvalidProducerEpochError))


def fenced_error(servers: str) -> ProducerFencedError:
    """The error of a fenced producer."""
    return ProducerFencedError(
        f"Kafka at {servers}: another producer with this transactional id has started, or the transaction timed out; "
        "the open transaction is aborted"
    )


def deleted_offsets_error(servers: str, action: str, reason: str) -> BrokerError:
    """The error of a consumer whose next records were deleted."""
    return BrokerError(
        f"Kafka at {servers}: {action}: the log no longer has the requested offsets ({reason}); records were deleted "
        "before they were read: to continue without them, commit a newer offset for the group"
    )
