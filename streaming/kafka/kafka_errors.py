"""Translates kafka-python's errors into BrokerError: a line with the addresses, the action and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kafka.errors import (
    AuthorizationError,
    IllegalSaslStateError,
    InvalidProducerEpochError,
    KafkaConfigurationError,
    KafkaError,
    OffsetOutOfRangeError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.errors import ProducerFencedError as VendorProducerFencedError

from cascade.errors import BrokerError
from streaming.kafka.access_errors import is_access_error
from streaming.kafka.session_errors import deleted_offsets_error, fenced_error

_REFUSALS = (
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
    IllegalSaslStateError,
    AuthorizationError,
    KafkaConfigurationError,
)


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
        remedy = "; check kafka.security" if isinstance(error, _REFUSALS) or is_access_error(error) else ""
        raise BrokerError(f"Kafka at {servers}: {action}: {worded(error)}{remedy}") from error


def worded(error: BaseException) -> str:
    """The error's text in a line, or its type if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def is_fenced(error: object) -> bool:
    """Whether the broker fences this producer: a newer one with its transactional id exists.

    The coordinator also fences a producer whose transaction took longer than its timeout.
    """
    return isinstance(error, (VendorProducerFencedError, InvalidProducerEpochError))
