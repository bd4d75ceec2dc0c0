"""Translates `[kafka]` of the configuration into librdkafka's settings, and its errors into BrokerError."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.access_errors import is_access_error
from streaming.kafka.secret import Secret
from streaming.kafka.session_errors import deleted_offsets_error, fenced_error
from streaming.kafka.tokens import RENEW_BEFORE_S, UNSTATED_LIFE_S, make_token_provider

_FENCED = (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH)


def connection_settings(kafka: KafkaSettings, client_id: str, on_error: Callable[[KafkaError], None]) -> dict[str, Any]:
    """Returns addresses, TLS and SASL; `on_error` is called when a connection fails.

    Raises SettingError if a secret cannot be read, BrokerError if there is no token.
    """
    # librdkafka reports relevant problems as errors too, which are raised once, as a line
    logger = logging.getLogger("librdkafka")
    logger.setLevel(logging.CRITICAL + 1)
    return {
        "bootstrap.servers": ",".join(kafka.servers),
        "client.id": client_id,
        "error_cb": on_error,
        "logger": logger,
        "log.connection.close": False,
        "socket.timeout.ms": limits.REQUEST_TIMEOUT_MS,
        "socket.keepalive.enable": True,
        "socket.nagle.disable": True,
        "allow.auto.create.topics": False,
        "topic.metadata.propagation.max.ms": 5_000,
        **_security(kafka),
    }


def _security(kafka: KafkaSettings) -> dict[str, Any]:
    security = kafka.security
    settings: dict[str, Any] = {"security.protocol": security.protocol}
    if security.uses_tls:
        files = {
            "ssl.ca.location": security.ca_file,
            "ssl.certificate.location": security.certificate_file,
            "ssl.key.location": security.key_file or security.certificate_file,
            "ssl.key.password": Secret(security.key_password() or ""),
        }
        settings |= {name: value for name, value in files.items() if value}
    if security.uses_tokens:
        provider = make_token_provider(security)
        # without a token the binding would raise only after ten seconds
        provider.token()

        def token(_: str) -> tuple[str, float]:
            # the provider caches a valid token, so it may be asked at any time
            return str(provider.token()), time.time() + UNSTATED_LIFE_S + RENEW_BEFORE_S

        settings |= {"sasl.mechanisms": "OAUTHBEARER", "oauth_cb": token}
    elif security.uses_sasl:
        settings |= {
            "sasl.mechanisms": security.sasl_mechanism,
            "sasl.username": security.username,
            "sasl.password": Secret(security.password() or ""),
        }
    return settings


class Connection:
    """The errors of librdkafka's connections, which it retries itself, whatever the error."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.servers = kafka.bootstrap
        self._last: KafkaError | None = None

    def on_error(self, error: KafkaError) -> None:
        """For `error_cb`; "all brokers are down", which follows an access error, does not replace it."""
        if self._last is None or not is_access_error(self._last):
            self._last = error

    def wait(self, client: Any) -> None:
        """Waits for a broker's answer; raises BrokerError if there is none in time, and at once for an access error."""
        give_up_s = time.monotonic() + limits.BOOTSTRAP_TIMEOUT_S
        while True:
            try:
                client.ask_metadata(min(1.0, limits.BOOTSTRAP_TIMEOUT_S))
                return
            except KafkaException as error:
                answer = error.args[0]
            client.poll()
            problem = self._last or answer
            if is_access_error(problem) or time.monotonic() > give_up_s:
                raise self.error("connecting", problem)

    @contextlib.contextmanager
    def translated(self, action: str) -> Iterator[None]:
        """Raises librdkafka's errors as BrokerError, with the original error as the cause."""
        try:
            yield
        except KafkaException as error:
            raise self.error(action, error.args[0]) from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise BrokerError(f"Kafka at {self.servers}: {action}: {' '.join(str(error).split())}") from error

    def error(self, action: str, error: KafkaError) -> BrokerError:
        """Returns the BrokerError for an error of librdkafka."""
        if error.code() in _FENCED:
            return fenced_error(self.servers)
        if error.code() in {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}:
            return deleted_offsets_error(self.servers, action, worded(error))
        remedy = "; check kafka.security" if is_access_error(error) else ""
        return BrokerError(f"Kafka at {self.servers}: {action}: {worded(error)}{remedy}")


def vendor_error(error: BaseException) -> KafkaError | None:
    """The librdkafka error that caused a BrokerError, if any."""
    cause = error.__cause__
    return cause.args[0] if isinstance(cause, KafkaException) else None


def worded(error: KafkaError) -> str:
    """The error's text in a line."""
    return " ".join(str(error.str()).split())
