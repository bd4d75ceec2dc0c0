"""TLS and SASL for the local broker, for tests of the clients.

The broker's properties file and the command line that formats its storage contain the secrets: use them for tests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# Kafka's login modules by mechanism; the one for tokens accepts unsigned ones (JSON Web Tokens with "alg": "none").
_COMMON = "org.apache.kafka.common.security"
_SCRAM = f"{_COMMON}.scram.ScramLoginModule"
_PLAIN = f"{_COMMON}.plain.PlainLoginModule"
_TOKENS = f"{_COMMON}.oauthbearer.OAuthBearerLoginModule"


@dataclass(frozen=True, slots=True)
class SecureListener:
    """A further listener of the broker: `protocol` as in kafka.security, `mechanism` of SASL.

    `client_certificate`: clients must have a certificate that the authority has signed.
    """

    protocol: Literal["SSL", "SASL_SSL", "SASL_PLAINTEXT"] = "SSL"
    mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = ""
    client_certificate: bool = False


@dataclass(frozen=True, slots=True)
class LocalSecurity:
    """The listeners by name (capital letters), the broker's certificate, and the users.

    `certificate_file`, `key_file` (PKCS #8), `ca_file`: PEM. `host`: the advertised host. `users`: names and passwords
    for PLAIN and SCRAM, of letters and digits.
    """

    listeners: Mapping[str, SecureListener]
    certificate_file: Path
    key_file: Path
    ca_file: Path
    host: str = "localhost"
    users: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Rejects characters with a meaning in properties files and commands."""
        if not all(name.isalnum() and word.isalnum() for name, word in self.users.items()):
            raise ValueError("users: only letters and digits in names and passwords")
        if not all(name.isalpha() and name.isupper() for name in self.listeners):
            raise ValueError(f"listeners {list(self.listeners)}: only capital letters in their names")

    def write_keystore(self, file: Path) -> None:
        """Writes the broker's key and certificate into a file, as Kafka reads them."""
        file.touch(mode=0o600)
        file.write_text(self.key_file.read_text() + self.certificate_file.read_text())

    def settings(self, keystore: Path) -> dict[str, str]:
        """Returns the broker's properties, except the addresses."""
        found = {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(keystore),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.ca_file),
        }
        for name, listener in self.listeners.items():
            prefix = f"listener.name.{name.lower()}"
            found[f"{prefix}.ssl.client.auth"] = "required" if listener.client_certificate else "none"
            if listener.mechanism:
                found[f"{prefix}.sasl.enabled.mechanisms"] = listener.mechanism
                found[f"{prefix}.{listener.mechanism.lower()}.sasl.jaas.config"] = self._module(listener.mechanism)
        return found

    def format_arguments(self) -> list[str]:
        """Returns the arguments of Kafka's storage tool that add the users for SCRAM."""
        mechanisms = {listener.mechanism for listener in self.listeners.values()}
        return [
            argument
            for mechanism in sorted(mechanisms)
            if mechanism.startswith("SCRAM")
            for name, password in self.users.items()
            for argument in ("--add-scram", f"{mechanism}=[name={name},password={password}]")
        ]

    def _module(self, mechanism: str) -> str:
        if mechanism == "OAUTHBEARER":
            return f'{_TOKENS} required unsecuredLoginStringClaim_sub="broker";'
        if mechanism == "PLAIN":
            users = " ".join(f'user_{name}="{password}"' for name, password in self.users.items())
            return f"{_PLAIN} required {users};"
        return f"{_SCRAM} required;"
