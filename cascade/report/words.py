"""The texts of the report, by language."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Final

import msgspec

from cascade.errors import SettingError

LANGUAGES: Final = ("en", "ja")


class Words:
    """The texts of one language, by key. A text may contain the names of values in braces."""

    def __init__(self, language: str, texts: dict[str, str]) -> None:
        self.language, self._texts = language, texts

    def __call__(self, key: str, /, **values: Any) -> str:
        """The text of a key, with the values inserted."""
        return self._texts[key].format(**values) if values else self._texts[key]

    def get(self, key: str, default: str) -> str:
        """The text of a key, or `default` if there is none."""
        return self._texts.get(key, default)


@cache
def words(language: str) -> Words:
    """The texts of a language; raises SettingError if the report does not have it."""
    if language not in LANGUAGES:
        raise SettingError("report", "--lang", language, "not available", f"use one of {', '.join(LANGUAGES)}")
    text = files("cascade.report").joinpath(f"texts/{language}.json").read_bytes()
    return Words(language, msgspec.json.decode(text, type=dict[str, str]))
