"""Durations as text (`7d`, `90s`, `250ms`) and in milliseconds."""

from __future__ import annotations

import re

_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FORM = re.compile(r"(\d+)(ms|s|m|h|d)")


def parse_ms(text: str) -> int:
    """The milliseconds of a duration such as `15m`, `7d` or `250ms`.

    Raises ValueError if the text is not a whole number followed by ms, s, m, h or d.

    >>> parse_ms("7d")
    604800000
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError("not a duration (a whole number and one of ms, s, m, h, d)")
    return int(match[1]) * _MS[match[2]]
