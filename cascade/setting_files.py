"""Files of settings, in TOML: read, decoded into a struct, and what is wrong in them explained."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from cascade.errors import SettingError

T = TypeVar("T")
# A step from a struct or a list to one of its parts: a key, or a position.
_Step = str | int

_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.+?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_PROBLEM = re.compile(r"(.+?) - at `\$\.(.*)`", re.DOTALL)
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def read_setting_file(path: Path) -> bytes:
    """The bytes of a TOML file. Raises SettingError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(path, "file", None, f"cannot be read ({error.strerror})", "check the path") from error


def parse_settings(octets: bytes, kind: type[T], file: object, example: str) -> T:
    """The settings in a TOML file. Raises SettingError with `file`, key, value and remedy.

    example: the page that a remedy names where the limits of the value are not enough.
    """
    try:
        content = tomllib.loads(octets.decode())
    except UnicodeDecodeError as error:
        raise SettingError(file, "file", None, "is not UTF-8", "save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        remedy = f"correct that line; {example} shows the form"
        raise SettingError(file, "file", None, f"is not TOML ({error})", remedy) from error
    return convert_settings(content, kind, file, f"see {example}")


def convert_settings(content: Mapping[str, Any], kind: type[T], file: object, see: str) -> T:
    """Converts decoded content to settings. Raises SettingError with `file`, key, value and remedy.

    see: the remedy where the limits of the value are not enough.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise SettingError(file, *_explained(content, inspect.type_info(kind), str(error), see)) from error


def _explained(content: Mapping[str, Any], kind: inspect.Type, text: str, see: str) -> tuple[str, object, str, str]:
    """Key, value, problem and remedy in the words of msgspec's `text`."""
    if (unknown := _UNKNOWN.fullmatch(text)) is not None:
        section = unknown[2] or ""
        known = [field.encode_name for field in getattr(_type_at(kind, _steps(section)), "fields", ())]
        near = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        # no value in the message: it may be a secret that the user put here by mistake
        return _key(section, unknown[1]), None, "unknown key", f"{hint}known: {', '.join(known)}"
    if (missing := _MISSING.fullmatch(text)) is not None:
        return _key(missing[2] or "", missing[1]), None, "missing", f"set it; {see}"
    problem = _PROBLEM.fullmatch(text)
    if problem is None:
        return "file", None, text, see
    words, key = problem[1].replace("`object`", "table").replace("`", ""), problem[2]
    words = words[0].lower() + words[1:]
    if "[...]" in key:  # a table with keys of any name: msgspec does not say which
        return key, None, words, see
    steps = _steps(key)
    value: Any = content
    for step in steps:
        value = value[step]
    if words.startswith("invalid enum value"):
        words = "not one of the choices"
    return key, None if isinstance(value, dict | list) else value, words, _remedy(_type_at(kind, steps), see)


def _key(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _steps(path: str) -> list[_Step]:
    """The steps of a path as msgspec writes it: `models[0].bursts`."""
    return [name or int(position) for name, position in _STEP.findall(path)]


def _type_at(kind: inspect.Type, steps: Sequence[_Step]) -> inspect.Type:
    """The type of what is at the end of these steps; AnyType where msgspec's description of types does not lead there.

    Of a choice between types it takes the first; in settings the other is None.
    """
    for step in steps:
        if isinstance(step, int):
            kind = getattr(kind, "item_type", inspect.AnyType())
        else:
            types = {field.encode_name: field.type for field in getattr(kind, "fields", ())}
            kind = types.get(step, inspect.AnyType())
        if isinstance(kind, inspect.UnionType):
            kind = next(found for found in kind.types if not isinstance(found, inspect.NoneType))
    return kind


def _remedy(kind: inspect.Type, see: str) -> str:
    if isinstance(kind, inspect.LiteralType):
        return "use " + " or ".join(f'"{choice}"' for choice in kind.values)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        low = kind.ge if kind.ge is not None else kind.gt
        if low is not None and kind.le is not None:
            return f"use {'more than ' if kind.gt is not None else ''}{low} to {kind.le}"
    return see
