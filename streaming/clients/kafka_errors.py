"""From kafka-python's errors to ours: one line, with the addresses and what was being done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kafka.errors import InvalidProducerEpochError, KafkaError, OffsetOutOfRangeError
from kafka.errors import ProducerFencedError as VendorProducerFencedError

from cascade.errors import BrokerError, ProducerFencedError
from streaming.clients.access_errors import is_access_error

# How long one request may take before it is tried again elsewhere; the vendor's 30 s would hide a dead broker.
REQUEST_TIMEOUT_MS = 15_000


@contextlib.contextmanager
def translated(action: str, servers: str) -> Iterator[None]:
    """What the vendor raises within comes out as a BrokerError, with the vendor's error as its cause."""
    try:
        yield
    except OffsetOutOfRangeError as error:
        raise BrokerError(
            f"Kafka at {servers}: {action}: the log no longer holds the wanted offsets ({worded(error)}); "
            "records were deleted before they were read: commit a newer offset for the group to go on without them"
        ) from error
    except (KafkaError, OSError, ValueError, TypeError, AssertionError) as error:
        if is_fenced(error):
            raise fenced_error(servers) from error
        remedy = "; check kafka.security" if is_access_error(error) else ""
        raise BrokerError(f"Kafka at {servers}: {action}: {worded(error)}{remedy}") from error


def worded(error: BaseException) -> str:
    """The error's text on one line, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_fenced(error: object) -> bool:
    """Whether the broker refuses this producer because a newer one of its transactional id has begun.

    A producer whose transaction took longer than its timeout is told the same: the coordinator began anew without it.
    """
    return isinstance(error, (VendorProducerFencedError, InvalidProducerEpochError))


def fenced_error(servers: str) -> ProducerFencedError:
    """The error of a fenced producer."""
    return ProducerFencedError(
        f"Kafka at {servers}: another producer with this transactional id has begun, or the transaction timed out; "
        "what it had not committed is not kept"
    )
