"""A refusal while a client makes its first connection, which kafka-python 3.0 keeps to itself.

A wrong password, a token that is not taken, a certificate that is not trusted: the vendor logs it, tries again until
the time for the first connection is up, and then says only that there was no connection. Here the refusal ends the
wait. A client that runs goes on trying, as the vendor does: a broker that starts may refuse what it takes later.

Often the vendor does not even hear it: a broker that refuses says so and hangs up, and of what comes together with the
end of a connection the vendor throws the words away. Here they are handed over first.

Nor does the vendor limit the time that one of several addresses may take: one that swallows packets would use up all
of it.
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

from streaming.clients.tokens import TokenRefusedError

ADDRESS_TIMEOUT_MS = 5_000
_REFUSALS = (
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
    IllegalSaslStateError,
    AuthorizationError,
    KafkaConfigurationError,
    TokenRefusedError,
)
# What OpenSSL calls the reasons that trying again does not change.
_TLS_REFUSALS = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "WRONG_VERSION_NUMBER", "PEM", "KEY_VALUES_MISMATCH")


def is_refusal(error: BaseException | None) -> bool:
    """Whether the error means that these settings are not accepted, whenever they are tried."""
    if isinstance(error, _REFUSALS):
        return True
    if error is None:
        return False
    related = (error, error.__context__, *error.args)
    return any(
        isinstance(one, ssl.SSLError) and any(reason in (one.reason or "") for reason in _TLS_REFUSALS)
        for one in related
    )


class RefusalTellingClient(KafkaNetClient):  # type: ignore[misc]  # the vendor has no types
    """Takes the place of `KafkaNetClient` (setting `kafka_client`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        manager, net = self._manager, self._net
        get_connection, build_transport = manager.get_connection, manager._build_transport

        async def build_hearing_transport(*arguments: Any, **named: Any) -> Any:
            transport = await build_transport(*arguments, **named)
            _hear_last_words(transport)
            return transport

        def get_connection_and_look(node: Any, timeout_ms: float | None = None, **named: Any) -> Any:
            # only the first connections are not taken from the list when they end
            if named.get("pop_on_close", True):
                return get_connection(node, timeout_ms=timeout_ms, **named)
            limit_ms = ADDRESS_TIMEOUT_MS if timeout_ms is None else min(timeout_ms, ADDRESS_TIMEOUT_MS)
            connection = get_connection(node, timeout_ms=limit_ms, **named)
            connection.init_future.add_errback(remember, node)
            return connection

        def remember(node: Any, error: BaseException) -> None:
            if is_refusal(error):
                # after the vendor has put it out of its mind; its next attempt raises it
                net.call_soon(lambda: manager._auth_failures.__setitem__(node, error))

        manager.get_connection, manager._build_transport = get_connection_and_look, build_hearing_transport


def _hear_last_words(transport: Any) -> None:
    receive = transport._sock_recv
    end: list[Exception] = []

    def receive_words_before_the_end() -> tuple[bytes, Exception | None]:
        if end:
            return b"", end[0]
        octets, error = receive()
        if octets and error is not None:
            end.append(error)
            return octets, None
        return octets, error

    transport._sock_recv = receive_words_before_the_end
