"""The third column of the glossary names what the code has."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cascade", "stages", "streaming")


def named() -> list[str]:
    table = (ROOT / "docs" / "glossary.md").read_text().split("## Words that we do not use")[0]
    rows = re.findall(r"^\| (?!word \||--).*\| (.*) \|$", table, re.MULTILINE)
    assert len(rows) > 40
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@cache
def sources() -> dict[str, str]:
    return {str(path): path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def occurs(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


@pytest.mark.parametrize("name", named())
def test_the_code_has_each_name_of_the_glossary(name: str) -> None:
    if name.endswith(".py"):
        assert any(path.endswith(f"/{name}") for path in sources())
        return
    owner, _, attribute = name.partition(".")
    if attribute and owner[0].isupper():
        texts = [text for text in sources().values() if f"class {owner}" in text]
        assert any(re.search(rf"\b(def {attribute}\b|{attribute}:)", text) for text in texts)
        return
    assert any(all(occurs(part, text) for part in name.split(".")) for text in sources().values())
