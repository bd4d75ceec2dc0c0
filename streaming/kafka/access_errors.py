"""Errors of authentication, authorization and TLS: a retry cannot succeed."""

from __future__ import annotations

import ssl

from confluent_kafka import KafkaError, KafkaException

from streaming.kafka.tokens import TokenRefusedError

_LIBRDKAFKA = (KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED)
# Parts of the names of OpenSSL errors that a retry does not change.
_TLS_REASONS = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "WRONG_VERSION_NUMBER", "PEM", "KEY_VALUES_MISMATCH")


def is_access_error(error: object) -> bool:
    """Whether the broker, the token endpoint or TLS refuses these settings; `error`: of librdkafka or Python.

    `kafka_errors` has those of kafka-python, whose import a worker on librdkafka does not wait for.
    """
    if isinstance(error, KafkaException):
        return is_access_error(error.args[0])
    if isinstance(error, KafkaError):
        # with TLS 1.3 a client certificate is refused after the handshake, and only the alert shows it
        return error.code() in _LIBRDKAFKA or "SSL alert number" in error.str()
    if isinstance(error, TokenRefusedError):
        return True
    if not isinstance(error, BaseException):
        return False
    related = (error, error.__context__, *error.args)
    return any(
        isinstance(cause, ssl.SSLError) and any(reason in (cause.reason or "") for reason in _TLS_REASONS)
        for cause in related
    )
