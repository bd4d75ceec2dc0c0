"""CONTRIBUTING's guide, tried: the package that it shows is built, put on the path, and run by the real code."""

from __future__ import annotations

import re
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import Config, load_config
from cascade.errors import SettingError
from cascade.plugins import CLIENTS, CODECS, DEEP_STAGES, METERS
from stages.assembly import make_deep_stage
from streaming.codecs import topic_codec
from streaming.kafka import TopicSpec, client_named, ensure_topics, make_consumer, make_producer
from streaming.pipeline.decisions import decision_format
from streaming.service.doctor import examine
from streaming.service.kernel_compilation import compile_kernels
from streaming.service.serve import service_meters
from tests.conftest import Broker
from tests.docs.test_pages import ROOT, blocks

GUIDE = ROOT / "CONTRIBUTING.md"


def install(directory: Path, package: str, modules: dict[str, str], entry_points: dict[str, dict[str, str]]) -> None:
    """What pip installs: the package's modules, and the metadata with its entry points."""
    home = directory / package
    home.mkdir()
    for name, text in {"__init__": "", **modules}.items():
        (home / f"{name}.py").write_text(text)
    metadata = directory / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [
        line
        for group, entries in entry_points.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of installed packages, forgotten after the test."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    yield directory
    for name in [name for name in sys.modules if name.partition(".")[0] in ("acme", "other")]:
        del sys.modules[name]


@pytest.fixture
def acme(site: Path) -> Path:
    """The package of the guide: its blocks of Python, and its entry points."""
    (settings,) = blocks(GUIDE, "toml")
    modules = {}
    for block in blocks(GUIDE, "python"):
        (before,) = re.findall(r"\(`acme/(\w+)\.py`\):\n\n```python\n" + re.escape(block), GUIDE.read_text())
        modules[before] = block
    install(site, "acme", modules, tomllib.loads(settings)["project"]["entry-points"])
    return site


def config_of(directory: Path, **sections: Any) -> Config:
    return load_config(written(directory, **sections))


def written(directory: Path, **sections: Any) -> Path:
    path = directory / "cascade.toml"
    path.write_bytes(msgspec.toml.encode({"bundle": {"path": str(SHIPPED_BUNDLE)}, **sections}))
    return path


@pytest.mark.usefixtures("acme")
def test_the_guides_codec_decodes_what_it_encodes(tmp_path: Path) -> None:
    config, schema = config_of(tmp_path, kafka={"codec": "framed-json"}), load_bundle(SHIPPED_BUNDLE).schema
    plain, framed = (
        topic_codec(msgspec.structs.replace(config.kafka, codec=name), "transactions", schema.label_fields(), 1_000)
        for name in ("json", "framed-json")
    )
    fields = schema.label_fields()
    row = dict.fromkeys(fields, 1) | {"event_time": 1_748_764_812_345}
    labels = plain.decode([msgspec.json.encode(row)])
    assert labels.batch.rows == 1
    message = bytes(5) + b"{}"
    assert framed.decode([message]).rejects == plain.decode([b"{}"]).rejects
    assert framed.encode(labels.batch) == [bytes(5) + text for text in plain.encode(labels.batch)]
    assert decision_format("framed-json") == "json"


@pytest.mark.usefixtures("acme")
def test_the_guides_meter_is_read_where_its_hardware_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, energy={"meters": ["pdu"]})
    monkeypatch.setenv("PDU_COUNTER", str(tmp_path / "absent"))
    without = {meter.name for meter in service_meters(config)}
    counter = tmp_path / "energy_wh"
    counter.write_text("7")
    monkeypatch.setenv("PDU_COUNTER", str(counter))
    assert {meter.name for meter in service_meters(config)} - without == {"pdu"}
    assert "pdu" not in {meter.name for meter in service_meters(Config())}


@pytest.mark.usefixtures("acme")
def test_the_guides_deep_stage_answers_the_doctors_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.service.doctor.PROBE_TIMEOUT_S", 0.2)
    path = written(tmp_path, deep={"backend": "same-score"}, kafka={"bootstrap": "127.0.0.1:1"})
    found = {finding.check: finding for finding in examine(path)}
    assert (found["configuration"].status, found["deep model"].status) == ("ok", "ok")
    assert found["deep model"].text.startswith("same-score answers a probe")
    with closing(make_deep_stage(load_bundle(SHIPPED_BUNDLE), load_config(path).deep)) as stage:
        assert type(stage).__name__ == "SameScoreDeepStage"


@pytest.mark.kafka
@pytest.mark.usefixtures("acme")
def test_the_guides_client_sends_and_reads(broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, delivery="exactly-once", kafka={"client": "logged", "bootstrap": broker.bootstrap})
    ensure_topics(config.kafka, [TopicSpec("of-the-guide", 1)])
    with capture_logs() as lines:
        producer = make_producer(config.kafka)
        producer.send("of-the-guide", b"key", b"value")
        producer.flush(10.0)
        producer.close(1.0)
        with closing(make_consumer(config.kafka, None)) as consumer:
            consumer.assign(consumer.partitions_for("of-the-guide"))
            give_up_s, found = time.monotonic() + 20.0, []
            while not found and time.monotonic() < give_up_s:
                found = [value for fetched in consumer.poll(0.2, 10) for value in fetched.values]
    assert found == [b"value"]
    assert [line["event"] for line in lines] == ["producer", "consumer"]


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"kafka": {"codec": "xml"}}, ["kafka.codec = 'xml'", '"framed-json" or "json" or "msgpack"']),
        ({"kafka": {"client": "x"}}, ["kafka.client = 'x'", 'use "kafka-python" or "librdkafka" or "logged"']),
        ({"deep": {"backend": "x"}}, ["deep.backend = 'x'", 'use "onnxruntime" or "same-score" or "triton"']),
        ({"energy": {"meters": ["x"]}}, ["energy.meters = 'x'", 'use "pdu"']),
        ({"energy": {"meters": ["pdu", "pdu"]}}, ["energy.meters = 'pdu'", "named twice"]),
    ],
)
def test_an_unknown_name_is_refused_with_all_names(tmp_path: Path, sections: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SettingError) as raised:
        config_of(tmp_path, **sections)
    for part in [str(tmp_path / "cascade.toml"), *parts]:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_part_is_imported_only_if_it_is_chosen(site: Path, tmp_path: Path) -> None:
    install(site, "other", {"parts": "raise ValueError('broken\\nhere')"}, {CODECS.group: {"broken": "other.parts:X"}})
    assert "broken" in CODECS.names()
    config_of(tmp_path)
    assert "other" not in sys.modules
    with pytest.raises(SettingError, match=r"cannot be imported \(ValueError: broken here\)") as raised:
        config_of(tmp_path, kafka={"codec": "broken"})
    assert raised.value.file == str(tmp_path / "cascade.toml")


def test_no_package_replaces_a_part_of_our_own(site: Path) -> None:
    names = {
        registry.group: dict.fromkeys(registry.own, "other.parts:X") for registry in (CODECS, CLIENTS, DEEP_STAGES)
    }
    install(site, "other", {"parts": "raise SystemExit"}, names)
    assert type(client_named("librdkafka")).__name__ == "LibrdkafkaClient"
    for registry in (CODECS, CLIENTS, DEEP_STAGES):
        assert registry.names() == sorted(registry.own)
        for name, place in registry.own.items():
            assert registry.load(name).__module__ == place.partition(":")[0]


def test_a_name_that_two_packages_register_is_refused(site: Path) -> None:
    for package in ("acme", "other"):
        install(site, package, {"parts": "X = 1"}, {METERS.group: {"pdu": f"{package}.parts:X"}})
    with pytest.raises(SettingError, match=r"registered more than once \(acme.parts:X, other.parts:X\)"):
        METERS.check("pdu")


def test_a_meter_with_the_name_of_another_is_refused(site: Path, tmp_path: Path) -> None:
    twin = "class Twin:\n    name = 'cpu-worker'\n\ndef find():\n    return [Twin()]\n"
    install(site, "other", {"parts": twin}, {METERS.group: {"twin": "other.parts:find"}})
    with pytest.raises(SettingError, match="cpu-worker has the name of another meter"):
        service_meters(config_of(tmp_path, energy={"meters": ["twin"]}))


def test_a_codec_that_writes_decisions_in_no_known_format_stops_the_start(site: Path) -> None:
    bad = "from streaming.codecs.json import JsonCodec\n\nclass Bad(JsonCodec):\n    decisions = 'xml'\n"
    install(site, "other", {"parts": bad}, {CODECS.group: {"bad": "other.parts:Bad"}})
    with pytest.raises(SettingError, match="writes decisions in 'xml'"):
        decision_format("bad")


def test_the_kernels_of_a_chosen_codec_are_compiled_at_the_start(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = (
        "from streaming.codecs.json import JsonCodec\ncalls = []\n\n"
        "class Counting(JsonCodec):\n    warm_up = staticmethod(lambda: calls.append(1))\n"
    )
    install(site, "other", {"parts": counting}, {CODECS.group: {"counting": "other.parts:Counting"}})
    for name in ("warm_up_encoder", "warm_up_ahead", "warm_up_table", "warm_up_offsets", "warm_up_watch"):
        monkeypatch.setattr(f"streaming.service.kernel_compilation.{name}", lambda: None)

    class NoEngine:
        def warm_up(self, rows: int) -> None:
            pass

    compile_kernels(NoEngine(), Config(), ["counting"])  # type: ignore[arg-type]
    assert CODECS.load("counting").warm_up.__module__ == "other.parts"
    assert sys.modules["other.parts"].calls == [1]
