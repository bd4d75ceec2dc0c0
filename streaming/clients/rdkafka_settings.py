"""From `[kafka]` of the configuration to librdkafka's, and from its errors to ours."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from cascade.config import KafkaSettings
from cascade.errors import BrokerError, ProducerFencedError
from streaming.clients.secret import Secret
from streaming.clients.tokens import RENEW_BEFORE_S, UNSTATED_LIFE_S, make_token_provider

# How long one request may take before it is tried again elsewhere.
REQUEST_TIMEOUT_MS = 15_000
_REFUSALS = (KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED)
_FENCED = (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH)


def connection_settings(kafka: KafkaSettings, client_id: str, told: Callable[[KafkaError], None]) -> dict[str, Any]:
    """Addresses, TLS and SASL; `told` hears of connections that fail.

    Raises SettingError where a secret that is named cannot be read, BrokerError where there is no token.
    """
    # what matters of it comes as errors, which are told once, in a line
    logger = logging.getLogger("librdkafka")
    logger.setLevel(logging.CRITICAL + 1)
    return {
        "bootstrap.servers": ",".join(kafka.servers),
        "client.id": client_id,
        "error_cb": told,
        "logger": logger,
        "log.connection.close": False,
        "socket.timeout.ms": REQUEST_TIMEOUT_MS,
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
        # where there is none, the binding would say so after ten seconds
        provider.token()

        def token(_: str) -> tuple[str, float]:
            # the provider keeps a token while it is good, so it may be asked at any time
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
    """What librdkafka tells of its connections: it goes on trying by itself, whatever it is told."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.servers = kafka.bootstrap
        self._last: KafkaError | None = None

    def told(self, error: KafkaError) -> None:
        """For `error_cb`; "all brokers are down", which follows a refusal, does not hide it."""
        if self._last is None or not _is_access_error(self._last):
            self._last = error

    def wait(self, client: Any, timeout_s: float) -> None:
        """Return once a broker has answered; raises BrokerError after `timeout_s`, at once where it refuses us."""
        give_up_s = time.monotonic() + timeout_s
        while True:
            try:
                client.list_topics("", timeout=min(1.0, timeout_s))
                return
            except KafkaException as error:
                asked = error.args[0]
            if hasattr(client, "poll"):
                client.poll(0)
            problem = self._last or asked
            if _is_access_error(problem) or time.monotonic() > give_up_s:
                raise self.error("connecting", problem)

    @contextlib.contextmanager
    def translated(self, action: str, fatal: Callable[[], KafkaException | None] = lambda: None) -> Iterator[None]:
        """What librdkafka raises within comes out as a BrokerError, with its error as the cause.

        A fatal error is raised by the binding before it calls back, and with an exception raised already a callback may
        run in vain, or drop the exception where the interpreter looks up an attribute. `fatal` asks for it again.
        """
        try:
            yield
        except KafkaException as error:
            raise self.error(action, error.args[0]) from error
        except SystemError as error:
            cause = error.__cause__
            while cause is not None and not isinstance(cause, KafkaException):
                cause = cause.__cause__
            if cause is None:
                cause = fatal()
            if cause is None:
                raise BrokerError(f"Kafka at {self.servers}: {action}: librdkafka failed without a reason") from error
            raise self.error(action, cause.args[0]) from cause
        except (RuntimeError, BufferError, ValueError, TypeError) as error:
            raise BrokerError(f"Kafka at {self.servers}: {action}: {' '.join(str(error).split())}") from error

    def error(self, action: str, error: KafkaError) -> BrokerError:
        """Ours for one of librdkafka's."""
        if error.code() in _FENCED:
            return fenced_error(self.servers)
        if error.code() in {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}:
            return BrokerError(
                f"Kafka at {self.servers}: {action}: the log no longer holds the wanted offsets ({worded(error)}); "
                "records were deleted before they were read: commit a newer offset for the group to go on without them"
            )
        remedy = "; check kafka.security" if _is_access_error(error) else ""
        return BrokerError(f"Kafka at {self.servers}: {action}: {worded(error)}{remedy}")


def _is_access_error(error: KafkaError) -> bool:
    # with TLS 1.3 a client's certificate is refused when the connection stands already, and all that tells is the alert
    return error.code() in _REFUSALS or "SSL alert number" in error.str()


def vendor_error(error: BaseException) -> KafkaError | None:
    """The error of librdkafka that a BrokerError tells of, if any."""
    cause = error.__cause__
    return cause.args[0] if isinstance(cause, KafkaException) else None


def worded(error: KafkaError) -> str:
    """The error's text on one line."""
    return " ".join(str(error.str()).split())


def fenced_error(servers: str) -> ProducerFencedError:
    """The error of a fenced producer."""
    return ProducerFencedError(
        f"Kafka at {servers}: another producer with this transactional id has begun, or the transaction timed out; "
        "what it had not committed is not kept"
    )
