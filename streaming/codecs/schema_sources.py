"""Sources of Avro schemas: a schema registry (Confluent's REST API), or a directory of files."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cascade.config import SchemaRegistrySettings
from cascade.errors import BrokerError, SettingError
from streaming.codecs.avro_schemas import SCHEMA_BYTES_MAX, SchemaRefusedError
from streaming.codecs.avro_writers import KNOWN_MAX, Schemas
from streaming.codecs.protocol import RejectReason
from streaming.service.web import make_opener

# A schema is requested once, and the loop waits for it: the timeout is short, and the next session tries again.
ASK_TIMEOUT_S = 2.0
TRIES, TRY_PAUSE_S = 3, 0.2
# A schema as a JSON text may take twice its length.
ANSWER_BYTES_MAX = 2 * SCHEMA_BYTES_MAX + 4_096
_MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"
# Confluent's code for "no schema of this number"; another 404 may as well be a wrong URL.
_NO_SUCH_SCHEMA = 40403
_REFUSING_STATUSES = (401, 403)


@lru_cache(maxsize=16)
def make_schemas(registry: SchemaRegistrySettings, topic: str) -> Schemas:
    """Returns the source of a topic's schemas; raises SettingError.

    It is cached for the whole process, so that later sessions need no request, and the registry may be down.
    """
    if registry.directory:
        return DirectorySchemas(Path(registry.directory))
    return RegistrySchemas(registry, f"{topic}-value")


class DirectorySchemas:
    """Schemas in files `{number}.avsc` of a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def text(self, number: int) -> str | None:
        """Returns the content of its file; raises BrokerError if the file cannot be read."""
        path = self._directory / f"{number}.avsc"
        try:
            with path.open("rb") as file:
                return file.read(SCHEMA_BYTES_MAX + 1).decode()
        except FileNotFoundError as error:
            if self._directory.is_dir():
                return None
            raise BrokerError(f"schema directory {self._directory}: does not exist; check the path") from error
        except UnicodeDecodeError as error:
            raise SchemaRefusedError(RejectReason.OTHER_SCHEMA, "its schema is not UTF-8") from error
        except OSError as error:
            raise BrokerError(f"schema file {path}: {error.strerror}; check the path and its permissions") from error

    def register(self, text: str) -> int:
        """Returns the number of the file with this schema; raises SettingError if there is none."""
        wanted = msgspec.json.decode(text)
        for path in sorted(self._directory.glob("*.avsc"))[:KNOWN_MAX]:
            try:
                if path.stem.isdecimal() and msgspec.json.decode(path.read_bytes()) == wanted:
                    return int(path.stem)
            except (OSError, msgspec.DecodeError, UnicodeDecodeError):
                continue
        raise SettingError(
            "configuration",
            "kafka.schema_registry.directory",
            str(self._directory),
            "no file has the schema of the messages to write",
            f"save it there, for example as 1.avsc: {text}",
        )


class _Schema(msgspec.Struct):
    schema: str
    schemaType: str = "AVRO"  # as the registry spells it


class _Registered(msgspec.Struct):
    id: int


class _Problem(msgspec.Struct):
    error_code: int = 0


_Answer = TypeVar("_Answer", _Schema, _Registered)


class _AnswerError(Exception):
    """An error response: the registry's status and code."""

    def __init__(self, status: int, code: int) -> None:
        super().__init__(f"status {status}" + (f" (code {code})" if code else ""))
        self.status, self.code = status, code


class RegistrySchemas:
    """Schemas of a registry at `registry.url`, by Confluent's REST API; registers schemas under `subject`."""

    def __init__(
        self, registry: SchemaRegistrySettings, subject: str, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._url = registry.url.rstrip("/")
        self._subject = subject
        self._sleep = sleep
        self._headers = {"Accept": _MEDIA_TYPE, "Content-Type": _MEDIA_TYPE}
        password = registry.password()
        if password is not None:
            pair = base64.b64encode(f"{registry.username}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
        self._opener = make_opener(self._url, registry.ca_file, registry.certificate_file, registry.key_file)
        self._texts: dict[int, str] = {}

    def text(self, number: int) -> str | None:
        """Returns the schema with this number; raises BrokerError if the registry does not answer."""
        if number in self._texts:
            return self._texts[number]
        try:
            octets = self._ask(f"/schemas/ids/{number}", None)
        except _AnswerError as answer:
            if answer.code == _NO_SUCH_SCHEMA:
                return None
            raise self._failed(answer) from answer
        if len(octets) > ANSWER_BYTES_MAX:
            raise SchemaRefusedError(RejectReason.OTHER_SCHEMA, f"its schema has more than {SCHEMA_BYTES_MAX} bytes")
        found = self._read(octets, _Schema)
        if found.schemaType != "AVRO":
            raise SchemaRefusedError(RejectReason.OTHER_SCHEMA, "its schema is not an Avro schema")
        if len(self._texts) >= KNOWN_MAX:
            self._texts.clear()
        self._texts[number] = found.schema
        return found.schema

    def register(self, text: str) -> int:
        """Registers the schema under the subject, and returns its number."""
        body = msgspec.json.encode({"schema": text})
        try:
            return self._read(self._ask(f"/subjects/{self._subject}/versions", body), _Registered).id
        except _AnswerError as answer:
            if answer.status in (409, 422):
                raise SettingError(
                    "configuration",
                    "kafka.schema_registry.url",
                    self._url,
                    f"refuses the schema of {self._subject} ({answer})",
                    f"delete the subject, or allow this schema: {text}",
                ) from answer
            raise self._failed(answer) from answer

    def _ask(self, path: str, body: bytes | None) -> bytes:
        """Returns a response, after TRIES attempts at most; raises _AnswerError, BrokerError."""
        for turn in range(TRIES):
            last = turn == TRIES - 1
            try:
                return self._ask_once(path, body)
            except _AnswerError as answer:
                if answer.status < 500 or last:
                    raise
            except (OSError, http.client.HTTPException) as error:
                if last:
                    reason = getattr(error, "reason", None) or error
                    raise BrokerError(f"schema registry {self._url}: {' '.join(str(reason).split())}") from error
            self._sleep(TRY_PAUSE_S)
        raise AssertionError("unreachable")

    def _ask_once(self, path: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self._url + path, body, self._headers)  # noqa: S310  # checked with settings
        give_up_s = time.monotonic() + ASK_TIMEOUT_S
        try:
            with self._opener.open(request, timeout=ASK_TIMEOUT_S) as response:
                return _within(response, give_up_s)
        except urllib.error.HTTPError as error:
            with error:
                octets = error.read(4_096)
            try:
                code = msgspec.json.decode(octets, type=_Problem).error_code
            except (msgspec.DecodeError, UnicodeDecodeError):
                code = 0
            raise _AnswerError(error.code, code) from error

    def _read(self, octets: bytes, kind: type[_Answer]) -> _Answer:
        try:
            return msgspec.json.decode(octets, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BrokerError(
                f"schema registry {self._url}: its response is not that of a registry; check kafka.schema_registry.url"
            ) from error

    def _failed(self, answer: _AnswerError) -> BrokerError:
        remedy = (
            "check username and password of kafka.schema_registry"
            if answer.status in _REFUSING_STATUSES
            else "check kafka.schema_registry.url"
        )
        return BrokerError(f"schema registry {self._url}: {answer}; {remedy}")


def _within(response: Any, give_up_s: float) -> bytes:
    """Returns a response, or the beginning of one that is too long; raises OSError after `give_up_s`."""
    octets = b""
    while len(octets) <= ANSWER_BYTES_MAX:
        piece = response.read1(65_536)
        if not piece:
            return octets
        octets += piece
        if time.monotonic() > give_up_s:
            raise OSError("its response takes too long")
    return octets
