"""The documentation and the glossary name files, classes, functions and settings that exist."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "cascade", "docs", "k8s", "stages", "streaming", "tests", "triton_models")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CONFIG = tomllib.loads((ROOT / "docs" / "cascade.example.toml").read_text())
FILE = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/[\w./*-]*|[\w-]+\.py)")
CLASS = re.compile(r"([A-Z][a-z]\w+)(?:\.(\w+))?")
FUNCTION = re.compile(r"[a-z]+_[a-z_]+")
SETTING = re.compile(r"([a-z]+)\.([a-z_]+)")


@cache
def sources(*folders: str) -> dict[Path, str]:
    return {path: path.read_text() for folder in folders or FOLDERS for path in (ROOT / folder).rglob("*.py")}


def quoted(page: Path) -> list[str]:
    text = re.sub(r"^(```.*?^```|    .*?)$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_file_that_a_page_names_exists(page: Path) -> None:
    names = [name for name in quoted(page) if FILE.fullmatch(name)]
    files = {path.name for path in sources()}
    assert [name for name in names if not (name in files or any(ROOT.glob(name.rstrip("/"))))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_setting_that_a_page_names_is_in_the_example(page: Path) -> None:
    settings = [match for name in quoted(page) if not FILE.fullmatch(name) and (match := SETTING.fullmatch(name))]
    missing = [match[0] for match in settings if match[1] in CONFIG and match[2] not in CONFIG[match[1]]]
    assert missing == []


def test_each_class_and_function_of_the_architecture_exists() -> None:
    page = quoted(ROOT / "docs" / "architecture.md")
    text = "\n".join(sources().values())
    classes = [match for name in page if (match := CLASS.fullmatch(name))]
    functions = [name for name in page if FUNCTION.fullmatch(name)]
    assert len(classes) > 30
    assert len(functions) > 10
    defined = {name: source for source in sources().values() for name in re.findall(r"^class (\w+)", source, re.M)}
    assert [match[0] for match in classes if match[1] not in defined or (match[2] or "") not in defined[match[1]]] == []
    others = (ROOT / "docs" / "features.md").read_text() + text
    assert [name for name in functions if not re.search(rf"\b{name}\b", others)] == []


def names_of_the_glossary() -> list[str]:
    table = (ROOT / "docs" / "glossary.md").read_text().split("## Words that we do not use")[0]
    rows = re.findall(r"^\| (?!word \||--).*\| (.*) \|$", table, re.MULTILINE)
    assert len(rows) > 40
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def occurs(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


@pytest.mark.parametrize("name", names_of_the_glossary())
def test_the_code_has_each_name_of_the_glossary(name: str) -> None:
    texts = sources("cascade", "stages", "streaming")
    owner, _, attribute = name.partition(".")
    if name.endswith(".py"):
        assert any(path.match(name) for path in texts)
    elif attribute and owner[0].isupper():
        owners = [text for text in texts.values() if f"class {owner}" in text]
        assert any(re.search(rf"\b(def {attribute}\b|{attribute}:)", text) for text in owners)
    else:
        assert any(all(occurs(part, text) for part in name.split(".")) for text in texts.values())
