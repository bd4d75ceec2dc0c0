"""Tokens for SASL/OAUTHBEARER: from a file, or from an OAuth token endpoint with client credentials (RFC 6749, 4.4).

kafka-python asks for a token at each connection, in the thread that sends heartbeats, so a request must be short.
"""

from __future__ import annotations

import base64
import http.client
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import msgspec

from cascade.config import SecuritySettings
from cascade.errors import BrokerError
from streaming.kafka.secret import Secret
from streaming.service.web import make_opener

# Below the group's session timeout (10 s), since no heartbeat is sent meanwhile.
FETCH_TIMEOUT_S = 5.0
TOKEN_BYTES_MAX = 64 * 1024
# A token is renewed this long before its expiry, or at half of its life if that is later.
RENEW_BEFORE_S = 30.0
# The life of a token whose response has no `expires_in`, which RFC 6749 only recommends.
UNSTATED_LIFE_S = 60.0
_REFUSING_STATUSES = (400, 401, 403, 404)
_ERROR_CODE = re.compile(r"[a-z0-9_.-]{1,64}")


class TokenRefusedError(BrokerError):
    """The token endpoint refuses the client; a retry cannot succeed."""


class FileToken:
    """The only line of a file, read again at each connection; another process renews it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def token(self) -> str:
        """The token; raises BrokerError."""
        try:
            with self._path.open("rb") as file:
                octets = file.read(TOKEN_BYTES_MAX + 1)
            text = octets.decode("ascii").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a token"
            raise BrokerError(f"kafka.security.token_file {self._path}: {reason.lower()}; check the path") from error
        if not _is_token(text) or len(octets) > TOKEN_BYTES_MAX:
            raise BrokerError(f"kafka.security.token_file {self._path}: must contain a token, on its only line")
        return Secret(text)


class _Answer(msgspec.Struct):
    access_token: str
    expires_in: float = UNSTATED_LIFE_S


class _Refusal(msgspec.Struct):
    error: str = ""


class ClientCredentialsToken:
    """A token from the endpoint for id and secret; cached until shortly before its expiry."""

    def __init__(self, security: SecuritySettings) -> None:
        self._endpoint = security.token_endpoint
        self._scope = security.scope
        pair = ":".join(urllib.parse.quote(text, safe="") for text in (security.client_id, security.client_secret()))
        self._credentials = Secret(base64.b64encode(pair.encode()).decode())
        self._opener = make_opener(self._endpoint, security.ca_file)
        self._lock = threading.Lock()
        self._token, self._renew_s = Secret(""), 0.0

    def token(self) -> str:
        """The token; raises TokenRefusedError, or BrokerError if the endpoint returns none."""
        with self._lock:
            if not self._token or time.monotonic() >= self._renew_s:
                asked_s = time.monotonic()
                answer = self._fetch()
                self._token = Secret(answer.access_token)
                life_s = answer.expires_in
                self._renew_s = asked_s + max(life_s - RENEW_BEFORE_S, life_s / 2)
            return self._token

    def _fetch(self) -> _Answer:
        form = {"grant_type": "client_credentials"} | ({"scope": self._scope} if self._scope else {})
        request = urllib.request.Request(  # noqa: S310  # the scheme is checked with the settings
            self._endpoint,
            data=urllib.parse.urlencode(form).encode(),
            headers={"Authorization": f"Basic {self._credentials}", "Accept": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=FETCH_TIMEOUT_S) as response:
                octets = response.read(TOKEN_BYTES_MAX + 1)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise BrokerError(f"token endpoint {self._endpoint}: {' '.join(str(reason).split())}") from error
        try:
            answer = msgspec.json.decode(octets, type=_Answer) if len(octets) <= TOKEN_BYTES_MAX else None
        except msgspec.DecodeError:
            answer = None
        if answer is None or not _is_token(answer.access_token) or answer.expires_in <= 0:
            # the response is not shown, since it may contain a token
            raise BrokerError(f"token endpoint {self._endpoint}: its response has no valid token")
        return answer

    def _refused(self, error: urllib.error.HTTPError) -> BrokerError:
        try:
            code = msgspec.json.decode(error.read(TOKEN_BYTES_MAX), type=_Refusal).error
        except (OSError, http.client.HTTPException, msgspec.DecodeError):
            code = ""
        status = f"status {error.code}" + (f" ({code})" if _ERROR_CODE.fullmatch(code) else "")
        if error.code in _REFUSING_STATUSES:
            return TokenRefusedError(
                f"token endpoint {self._endpoint}: {status}; check client_id, client secret and scope of kafka.security"
            )
        return BrokerError(f"token endpoint {self._endpoint}: {status}")


def make_token_provider(security: SecuritySettings) -> FileToken | ClientCredentialsToken:
    """Makes the token provider of these settings; raises SettingError if the secret cannot be read."""
    if security.token_file:
        return FileToken(Path(security.token_file))
    return ClientCredentialsToken(security)


def _is_token(text: str) -> bool:
    """Whether the text has only the characters of a bearer token (RFC 6750), and so no separators of the protocol."""
    return re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", text) is not None
