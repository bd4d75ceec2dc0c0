"""Translates `[kafka]` of the configuration into kafka-python's keyword arguments."""

from __future__ import annotations

import logging
from typing import Any

from kafka.net.sasl.oauth import AbstractTokenProvider

from cascade.config import KafkaSettings
from streaming.kafka.secret import Secret
from streaming.kafka.tokens import ClientCredentialsToken, FileToken, make_token_provider


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]  # the vendor has no types
    """A token provider as kafka-python takes it."""

    def __init__(self, provider: FileToken | ClientCredentialsToken) -> None:
        super().__init__()
        self._provider = provider

    def token(self) -> str:
        """The token; raises BrokerError."""
        return self._provider.token()


def connection_settings(kafka: KafkaSettings, client_id: str) -> dict[str, Any]:
    """Returns addresses, TLS and SASL; raises SettingError if a secret cannot be read."""
    limit_vendor_log()
    return {
        "bootstrap_servers": kafka.servers,
        "client_id": client_id,
        **_security(kafka),
    }


def _security(kafka: KafkaSettings) -> dict[str, Any]:
    security = kafka.security
    settings: dict[str, Any] = {"security_protocol": security.protocol}
    if security.uses_tls:
        key_password = security.key_password()
        settings |= {
            "ssl_check_hostname": True,
            "ssl_cafile": security.ca_file or None,
            "ssl_certfile": security.certificate_file or None,
            "ssl_keyfile": security.key_file or None,
            "ssl_password": Secret(key_password) if key_password else None,
        }
    if security.uses_tokens:
        settings |= {
            "sasl_mechanism": "OAUTHBEARER",
            "sasl_oauth_token_provider": TokenProvider(make_token_provider(security)),
        }
    elif security.uses_sasl:
        settings |= {
            "sasl_mechanism": security.sasl_mechanism,
            "sasl_plain_username": security.username,
            "sasl_plain_password": Secret(security.password() or ""),
        }
    return settings


def limit_vendor_log() -> None:
    """Sets kafka-python's log level to WARNING at least.

    At DEBUG it logs keys and values, which are card numbers; at INFO it logs every connection.
    """
    logger = logging.getLogger("kafka")
    if logger.getEffectiveLevel() < logging.WARNING:
        logger.setLevel(logging.WARNING)
