"""The report's words, by language."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Final

import msgspec

from cascade.errors import SettingError

LANGUAGES: Final = ("en", "ja")


class Words:
    """Texts of one language by name; those that take values have their names in braces."""

    def __init__(self, language: str, texts: dict[str, str]) -> None:
        self.language, self._texts = language, texts

    def __call__(self, name: str, /, **values: Any) -> str:
        """The text, with values put in."""
        return self._texts[name].format(**values) if values else self._texts[name]

    def either(self, name: str, otherwise: str) -> str:
        """The text where there is one."""
        return self._texts.get(name, otherwise)


@cache
def words(language: str) -> Words:
    """Raises SettingError for a language that there is not."""
    if language not in LANGUAGES:
        raise SettingError("report", "--lang", language, "is not there", f"use one of {', '.join(LANGUAGES)}")
    text = files("cascade.report").joinpath(f"texts/{language}.json").read_bytes()
    return Words(language, msgspec.json.decode(text, type=dict[str, str]))
