"""Errors that end a session, of either client library: a fenced producer, records that were deleted."""

from __future__ import annotations

from cascade.errors import BrokerError, ProducerFencedError


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
