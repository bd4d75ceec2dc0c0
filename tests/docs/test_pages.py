"""What a reader copies from the documentation works: commands, options, links, files, messages and code."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sqlite3
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import numpy as np
import pytest
import typer.main

from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.cli import COMMANDS
from cascade.columns import ColumnBatch
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.frames import read_labelled
from cascade.ledger import MeterError
from cascade.protocols import DeepInputs
from cascade.schema import Field, FieldType, Schema, parse_schema
from streaming.codecs import RejectReason, codec
from streaming.pipeline.decisions import CAUSES, Decision, LatencyMs
from streaming.pipeline.encode import encode
from streaming.pipeline.table import Table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCRIPTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "quick-start.md", DOCS / "quality.md"]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "k8s" / "README.md", *DOCS.rglob("*.md")])
# Pages of the site that consist of a file elsewhere.
INCLUDED = {DOCS / "contributing.md": ROOT / "CONTRIBUTING.md", DOCS / "kubernetes.md": ROOT / "k8s" / "README.md"}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each call of `cascade` in a block of commands or in back-ticks, with its page."""
    for page in SCRIPTS:
        lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
        for text in [*lines, *re.findall(r"`(cascade [a-z][^`\n]*)`", page.read_text())]:
            for part in text.split("#")[0].split("&"):
                words = shlex.split(part)
                if words[:1] == ["cascade"] and words[1:2] != ["COMMAND"]:
                    yield page.name, words[1:]


CALLS = sorted({(page, " ".join(words)) for page, words in commands()})


def test_the_readme_fits_into_six_kilobytes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6_144


@pytest.mark.parametrize(("page", "call"), CALLS)
def test_each_command_and_option_exists(page: str, call: str) -> None:
    name, *words = call.split()
    command: Any = typer.main.get_command(importlib.import_module(COMMANDS[name].module).app)
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        command = command.commands[words.pop(0) if COMMANDS[name].group else name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_each_make_target_exists() -> None:
    text = "\n".join(page.read_text() for page in [*SCRIPTS, DOCS / "proofs.md"])
    named = set(re.findall(r"^make ([a-z][\w-]*)|`make ([a-z][\w-]*)", text, re.MULTILINE))
    assert {target for pair in named for target in pair if target} <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        file = INCLUDED.get(file, file)
        assert file.exists(), target
        assert not anchor or anchor in heading_anchors(file), target


def test_each_configuration_loads(tmp_path: Path) -> None:
    pages = (DOCS / "quick-start.md", DOCS / "messages.md")
    secret = tmp_path / "registry"
    secret.write_text("hunter2\n")
    for block in (block for page in pages for block in blocks(page, "toml")):
        path = tmp_path / "cascade.toml"
        path.write_text(block.replace("/run/secrets/registry", str(secret)))
        assert load_config(path, {}) != Config()


def shop() -> Schema:
    (block,) = blocks(DOCS / "schema.md", "toml")
    return parse_schema(block.encode(), "schema.md")


def test_the_schema_page_names_each_reason_and_its_error() -> None:
    page = (DOCS / "schema.md").read_text()
    assert [reason for reason in RejectReason if f"`{reason.value}`" not in page] == []
    assert {field.type for field in shop().fields.values()} == set(get_args(FieldType))
    (block,) = blocks(DOCS / "schema.md", "toml")
    with pytest.raises(CascadeError) as raised:
        parse_schema(block.replace('card = "card_token"', 'card = "card_no"').encode(), "schema.toml")
    assert str(raised.value) in page


# --- messages ---------------------------------------------------------------------------------------------------------


def fields_of(kind: type[msgspec.Struct], prefix: str = "") -> list[str]:
    return [prefix + name for name in kind.__struct_fields__]


def test_the_decision_on_the_page_is_one_and_its_table_has_every_field() -> None:
    page = DOCS / "messages.md"
    example = json.loads(blocks(page, "json")[0])
    assert msgspec.to_builtins(msgspec.convert(example, Decision)) == example
    expected = [name for name in fields_of(Decision) if name != "latency_ms"] + fields_of(LatencyMs, "latency_ms.")
    table = page.read_text().split("## The decision")[1].split("**Order.**")[0]
    assert re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE) == expected
    assert [cause for cause in CAUSES if f'"{cause}"' not in table and cause] == []


def test_the_transaction_and_the_label_on_the_page_are_read() -> None:
    schema = load_bundle(SHIPPED_BUNDLE).schema
    _, transaction, label = blocks(DOCS / "messages.md", "json")
    for message, fields in ((transaction, schema.fields), (label, schema.label_fields())):
        assert codec("json", fields, 10_000).decode([message.encode()]).rejects == []


def test_the_consumer_stores_each_decision_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 3
    numbers = np.arange(rows)
    table = Table.of("transactions", ColumnBatch({"id": numbers}, rows), ("b",), offset=numbers, action=numbers)
    records = [types.SimpleNamespace(value=value) for value in encode("json", table, numbers, "id")] * 2
    kafka = types.SimpleNamespace(KafkaConsumer=lambda *_, **__: records)
    monkeypatch.setitem(sys.modules, "kafka", kafka)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    exec(blocks(DOCS / "messages.md", "python")[0], {})  # noqa: S102
    assert capsys.readouterr().out == "review 1 0.000 screener\ndecline 2 0.000 screener\n"
    assert sqlite3.connect("decisions.db").execute("SELECT count(*) FROM decisions").fetchone() == (rows,)


# --- data files -------------------------------------------------------------------------------------------------------

HEADER = "payment,paid_at,total,card_token,till,channel,fraud"
GOOD = "a1,1732100000000,12.5,c1,3,web,0"
REFUSED = {
    "a date": GOOD.replace("1732100000000", "2026-11-20T10:00:00Z"),
    "an empty cell": GOOD.replace("12.5", ""),
    "a value outside the limits": GOOD.replace("12.5", "-1"),
    "seconds": GOOD.replace("1732100000000", "1732100000"),
    "a category": GOOD.replace("web", "phone"),
    "a longer text": GOOD.replace("c1", "c" * 70),
    "labels `yes`": GOOD.replace("web,0", "web,no"),
    "a decimal comma": GOOD.replace("12.5", '"1,50"'),
    "ids that are numbers": "\n".join([GOOD.replace("a1", "1")] * 150 + [GOOD]),
}


def refusal(tmp_path: Path, content: str, suffix: str = ".csv") -> str:
    path = tmp_path / f"payments{suffix}"
    path.write_text(content)
    with pytest.raises(CascadeError) as raised:
        read_labelled(path, shop())
    return str(raised.value)


def quoted_message(problem: str) -> str:
    (line,) = [line for line in (DOCS / "data-files.md").read_text().splitlines() if line.startswith(f"| {problem}")]
    return line.split("|")[2].strip(" `")


@pytest.mark.parametrize("problem", REFUSED)
def test_the_data_page_quotes_the_message(problem: str, tmp_path: Path) -> None:
    assert quoted_message(problem) in refusal(tmp_path, f"{HEADER}\n{REFUSED[problem]}\n")


def test_the_data_page_quotes_what_a_wrong_header_or_file_gives(tmp_path: Path) -> None:
    both = f"{HEADER}\n{GOOD}\n"
    assert quoted_message("semicolons") in refusal(tmp_path, both.replace(",", ";"))
    assert quoted_message("another column name") in refusal(tmp_path, both.replace("channel", "kind"))
    assert quoted_message("another file type") in refusal(tmp_path, both, ".tsv")


def test_the_conversion_keeps_zeros_and_reads_local_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["001;2026-10-25 02:30:00;1,50;0042;7;web;no", "x9;2026-11-20 10:00:00;20,00;0043;8;shop;yes"]
    Path("export.csv").write_text("\n".join([HEADER.replace(",", ";"), *rows]))
    exec(blocks(DOCS / "data-files.md", "python")[0], {})  # noqa: S102
    data = read_labelled(Path("payments.parquet"), shop())
    assert data.batch["payment"].tolist() == [b"001", b"x9"]
    assert data.batch["paid_at"].tolist() == [1_792_888_200_000, 1_795_165_200_000]
    assert data.batch["total"].tolist() == [1.5, 20.0]
    assert data.fraud.tolist() == [0, 1]


# --- contributing -----------------------------------------------------------------------------------------------------


def defined(name: str) -> Any:
    """A class that CONTRIBUTING.md defines."""
    (block,) = [block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if f"class {name}" in block]
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102
    return names[name]


def test_the_codec_to_copy_reads_with_and_without_the_frame() -> None:
    fields = {"amount": Field(type="float64", minimum=0.0)}
    framed, plain = defined("FramedJsonCodec")(fields, 1_000), codec("json", fields, 1_000)
    values = [b'{"amount":1.5}', b'{"amount":-1}', b"{", b""]
    expected = plain.decode(values)
    for found in (framed.decode(values), framed.decode([bytes(5) + value for value in values])):
        assert found.batch["amount"].tolist() == expected.batch["amount"].tolist()
        assert found.rejects == expected.rejects
    assert framed.encode(expected.batch) == [bytes(5) + value for value in plain.encode(expected.batch)]


def test_the_meter_to_copy_counts_from_its_start_and_is_lost_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "energy_wh"
    file.write_text("100")
    meter = defined("PduMeter")(file)
    file.write_text("100.5")
    assert meter.read().energy_j == 1_800.0
    file.unlink()
    with pytest.raises(MeterError, match="cannot be read"):
        meter.read()


def test_the_stage_to_copy_returns_the_score_of_the_screener() -> None:
    stage = defined("SameScoreDeepStage")()
    inputs = DeepInputs(
        {"card_sequence": np.zeros((2, 16, 7), np.float32)}, np.array([[1, -3.5], [2, 0.5]], np.float32)
    )
    assert stage.submit(inputs, 1.0).result().tolist() == [-3.5, 0.5]
    assert len(stage.probe(1.0).result()) == 1
