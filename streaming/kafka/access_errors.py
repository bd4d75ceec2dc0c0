"""Errors of authentication, authorization and TLS: kafka-python 3.0 hides them while it makes its first connection.

kafka-python logs a wrong password, a refused token or an untrusted certificate, retries until the bootstrap timeout,
and then raises that there was no connection. `FailFastClient` raises the access error at once. After the first
connection it retries, as kafka-python does: a broker that is starting may refuse credentials that it accepts later.

It corrects two more faults. A broker sends its error and closes the connection; kafka-python drops bytes that arrive
together with the end of the connection, and so the error. And kafka-python sets no time limit for each of several
addresses, so that an address that drops packets uses up the whole bootstrap timeout.
"""

from __future__ import annotations

import ssl
from typing import Any

from kafka.errors import (
    AuthorizationError,
    IllegalSaslStateError,
    KafkaConfigurationError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net.compat import KafkaNetClient

from streaming.kafka.tokens import TokenRefusedError

ADDRESS_TIMEOUT_MS = 5_000
_ACCESS_ERRORS = (
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
    IllegalSaslStateError,
    AuthorizationError,
    KafkaConfigurationError,
    TokenRefusedError,
)
# Parts of the names of OpenSSL errors that a retry does not change.
_TLS_REASONS = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "WRONG_VERSION_NUMBER", "PEM", "KEY_VALUES_MISMATCH")


def is_access_error(error: BaseException | None) -> bool:
    """Whether the broker or TLS refuses these settings, so that a retry cannot succeed."""
    if isinstance(error, _ACCESS_ERRORS):
        return True
    if error is None:
        return False
    related = (error, error.__context__, *error.args)
    return any(
        isinstance(cause, ssl.SSLError) and any(reason in (cause.reason or "") for reason in _TLS_REASONS)
        for cause in related
    )


class FailFastClient(KafkaNetClient):  # type: ignore[misc]  # the vendor has no types
    """A `KafkaNetClient` (setting `kafka_client`) whose first connection raises access errors at once."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        manager, net = self._manager, self._net
        get_connection, build_transport = manager.get_connection, manager._build_transport

        async def build_draining_transport(*arguments: Any, **named: Any) -> Any:
            transport = await build_transport(*arguments, **named)
            _deliver_bytes_before_the_end(transport)
            return transport

        def get_connection_with_limit(node: Any, timeout_ms: float | None = None, **named: Any) -> Any:
            # kafka-python sets pop_on_close to False for bootstrap connections only
            if named.get("pop_on_close", True):
                return get_connection(node, timeout_ms=timeout_ms, **named)
            limit_ms = ADDRESS_TIMEOUT_MS if timeout_ms is None else min(timeout_ms, ADDRESS_TIMEOUT_MS)
            connection = get_connection(node, timeout_ms=limit_ms, **named)
            connection.init_future.add_errback(remember, node)
            return connection

        def remember(node: Any, error: BaseException) -> None:
            if is_access_error(error):
                # kafka-python clears the entry in this callback; set it afterwards, and the next attempt raises it
                net.call_soon(lambda: manager._auth_failures.__setitem__(node, error))

        manager.get_connection, manager._build_transport = get_connection_with_limit, build_draining_transport


def _deliver_bytes_before_the_end(transport: Any) -> None:
    receive = transport._sock_recv
    end: list[Exception] = []

    def receive_bytes_before_the_end() -> tuple[bytes, Exception | None]:
        if end:
            return b"", end[0]
        octets, error = receive()
        if octets and error is not None:
            end.append(error)
            return octets, None
        return octets, error

    transport._sock_recv = receive_bytes_before_the_end
