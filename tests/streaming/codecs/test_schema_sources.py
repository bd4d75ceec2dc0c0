"""Where Avro's schemas come from: a registry over HTTP, as it should be and as it should not, and a directory."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import streaming.codecs.schema_sources
from cascade.config import KafkaSettings, SchemaRegistrySettings
from cascade.errors import BrokerError, SettingError
from cascade.schema import Field
from streaming.codecs import RejectReason, topic_codec
from streaming.codecs.avro_schemas import SCHEMA_BYTES_MAX, SchemaRefusedError, schema_text
from streaming.codecs.schema_sources import ANSWER_BYTES_MAX, TRIES, DirectorySchemas, RegistrySchemas
from tests.streaming.codecs.registry import Answer, Registry

FIELDS = {"card_id": Field(type="int64"), "amount": Field(type="float64")}
TEXT = schema_text(FIELDS)


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    yield made
    made.close()


def source(registry: Registry, **settings: str) -> RegistrySchemas:
    return RegistrySchemas(SchemaRegistrySettings(url=registry.url + "/", **settings), "t-value", lambda _: None)


def answer(schema: str, **more: Any) -> Callable[[bytes], Answer]:
    return lambda _: (200, msgspec.json.encode({"schema": schema, **more}))


def test_a_schema_is_asked_for_once_and_a_missing_one_is_none(registry: Registry) -> None:
    registry.answers["/schemas/ids/7"] = answer(TEXT)
    schemas = source(registry)
    assert [schemas.text(7), schemas.text(7), schemas.text(9)] == [TEXT, TEXT, None]
    assert [path for path, _ in registry.seen] == ["/schemas/ids/7", "/schemas/ids/9"]
    assert "Authorization" not in registry.seen[0][1]


def test_name_and_password_are_sent_as_basic_authentication(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_PASSWORD", "é:secret")
    registry.answers["/schemas/ids/7"] = answer(TEXT)
    assert source(registry, username="user", password_env="REGISTRY_PASSWORD").text(7) == TEXT
    sent = registry.seen[0][1]["Authorization"].removeprefix("Basic ")
    assert base64.b64decode(sent).decode() == "user:é:secret"


FAULTY: dict[str, tuple[Answer, str, int]] = {
    "is in trouble": ((503, b""), "status 503; check kafka.schema_registry.url", TRIES),
    "wants a password": ((401, b"{}"), "status 401; check username and password", 1),
    "has another 404": ((404, b"<html>no such page</html>"), "status 404; check kafka.schema_registry.url", 1),
    "has another code": ((404, b'{"error_code":404}'), r"status 404 \(code 404\)", 1),
    "sends elsewhere": ((302, b""), "status 302", 1),
    "is something else": ((200, b"<html>hello</html>"), "its response is not that of a registry", 1),
    "has no schema in it": ((200, b'{"id":7}'), "its response is not that of a registry", 1),
}


@pytest.mark.parametrize("what", FAULTY)
def test_a_registry_without_an_answer_rejects_no_message(registry: Registry, what: str) -> None:
    answer, text, times = FAULTY[what]
    registry.answers["/schemas/ids/7"] = lambda _: answer
    with pytest.raises(BrokerError, match=f"schema registry {registry.url}: .*{text}"):
        source(registry).text(7)
    assert len(registry.seen) == times


def test_a_hiccup_is_got_over(registry: Registry) -> None:
    turns = iter([(500, b""), (502, b""), (200, msgspec.json.encode({"schema": TEXT}))])
    registry.answers["/schemas/ids/7"] = lambda _: next(turns)
    assert source(registry).text(7) == TEXT


def test_an_unreachable_registry_is_named_with_its_url() -> None:
    settings = SchemaRegistrySettings(url="http://127.0.0.1:1")
    with pytest.raises(BrokerError, match=r"schema registry http://127\.0\.0\.1:1: .*refused"):
        RegistrySchemas(settings, "t-value", lambda _: None).text(7)


def test_silence_and_a_trickle_have_an_end(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming.codecs.schema_sources, "ASK_TIMEOUT_S", 0.2)

    raised = threading.Event()

    def silent(_: bytes) -> Answer:
        raised.wait()
        return 200, b"{}"

    registry.answers["/schemas/ids/7"] = silent
    with pytest.raises(BrokerError, match="timed out"):
        source(registry).text(7)
    raised.set()

    class Trickle:
        def read1(self, _: int) -> bytes:
            return b" "

    with pytest.raises(OSError, match="takes too long"):
        streaming.codecs.schema_sources._within(Trickle(), time.monotonic())


@pytest.mark.parametrize("found", [{"schema": TEXT, "schemaType": "PROTOBUF"}, {"schema": "x" * ANSWER_BYTES_MAX}])
def test_what_is_there_and_no_schema_of_avro_is_refused_for_good(registry: Registry, found: dict[str, str]) -> None:
    registry.answers["/schemas/ids/7"] = answer(**found)
    with pytest.raises(SchemaRefusedError) as refused:
        source(registry).text(7)
    assert refused.value.fault[0] is RejectReason.OTHER_SCHEMA


def test_our_schema_is_registered_under_the_topic(registry: Registry) -> None:
    bodies = []

    def register(body: bytes) -> Answer:
        bodies.append(msgspec.json.decode(body))
        return 200, b'{"id":12}'

    registry.answers["/subjects/sent-value/versions"] = register
    registry.answers["/schemas/ids/12"] = answer(TEXT)
    kafka = KafkaSettings(codec="avro", schema_registry=SchemaRegistrySettings(url=registry.url))
    made = topic_codec(kafka, "sent", FIELDS, 1_000)
    batch = made.decode([]).batch
    assert made.encode(batch) == []
    assert bodies == [{"schema": TEXT}]
    message = b"\0\0\0\0\x0c\x02" + bytes(8)
    decoded = made.decode([message])
    assert decoded.batch["card_id"].tolist() == [1]
    assert made.encode(decoded.batch) == [message]
    assert len(bodies) == 1
    # another session: nothing is asked again
    registry.answers.clear()
    assert topic_codec(kafka, "sent", FIELDS, 1_000).decode([message]).rejects == []


def test_a_registry_that_refuses_our_schema_stops_in_one_line(registry: Registry) -> None:
    registry.answers["/subjects/t-value/versions"] = lambda _: (409, b'{"error_code":409}')
    with pytest.raises(SettingError, match=r"refuses the schema of t-value \(status 409 \(code 409\)\)"):
        source(registry).register(TEXT)


# --- a directory ------------------------------------------------------------------------------------------------------


def test_schemas_come_from_files_named_by_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "3.avsc").write_bytes(msgspec.json.format(TEXT.encode(), indent=2))
    (tmp_path / "1.avsc").write_text("{")
    (tmp_path / "README.avsc").write_text(TEXT)
    schemas = DirectorySchemas(tmp_path)
    assert msgspec.json.decode(schemas.text(3) or "") == msgspec.json.decode(TEXT)
    assert schemas.text(4) is None
    assert schemas.register(TEXT) == 3
    (tmp_path / "5.avsc").write_bytes(b"\xff")
    with pytest.raises(SchemaRefusedError):
        schemas.text(5)
    (tmp_path / "6.avsc").write_text(" " * 3 * SCHEMA_BYTES_MAX)
    assert len(schemas.text(6) or "") == SCHEMA_BYTES_MAX + 1


def test_without_a_file_for_the_schema_the_line_has_the_text_to_save(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match=r'kafka\.schema_registry\.directory .* save it there, for example as 1\.avsc.*"record"'
    ):
        DirectorySchemas(tmp_path).register(TEXT)


def test_a_missing_directory_rejects_no_message(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="does not exist"):
        DirectorySchemas(tmp_path / "gone").text(1)
    (tmp_path / "1.avsc").mkdir()
    with pytest.raises(BrokerError, match=r"1\.avsc: Is a directory"):
        DirectorySchemas(tmp_path).text(1)
