"""Texts in arrays of octets: most are plain ASCII, and only the others are decoded one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from cascade.columns import Array, Bool
from cascade.schema import Field
from streaming.codecs.faults import Faults
from streaming.codecs.protocol import RejectReason
from streaming.codecs.validate import check_text

_FIRST_PLAIN, _PLAIN = 0x20, 0x7F - 0x20


def not_plain(octets: Array) -> Bool:
    """Which texts are not printable ASCII, bool [rows]; `octets`: uint8 [rows, width], padded with zeros.

    A zero before another octet is a part of the text.
    """
    zero = octets == 0
    # a single comparison for both bounds: smaller values wrap around
    plain = (octets - np.uint8(_FIRST_PLAIN) < _PLAIN) | zero
    inner = zero[:, :-1] > zero[:, 1:]
    if plain.all() and not inner.any():
        return np.zeros(len(octets), np.bool_)
    found: Bool = ~plain.all(axis=1) | inner.any(axis=1)
    return found


class DoubtfulTexts:
    """The texts of a field that are not plain ASCII or too long, decoded one by one.

    Must be made for all fields before any other rule: invalid UTF-8 is a fault of the message, and comes first.
    """

    def __init__(self, name: str, field: Field, rows: Iterable[int], whole: Callable[[int], bytes]) -> None:
        """`rows`: of these texts; `whole`: returns the octets of a row's text."""
        self._name, self._field = name, field
        self._texts: dict[int, str] = {}
        self._broken: list[int] = []
        for row in rows:
            try:
                self._texts[row] = whole(row).decode()
            except UnicodeDecodeError:
                self._broken.append(row)

    def note_broken(self, faults: Faults) -> None:
        """Notes texts that are not UTF-8."""
        for row in self._broken:
            faults.setdefault(row, (RejectReason.ENCODING, "a text is not UTF-8"))

    def note_rest(self, faults: Faults) -> None:
        """Notes texts that are too long, or contain an invisible character."""
        for row, text in self._texts.items():
            fault = check_text(self._name, self._field, text)
            if fault is not None:
                faults.setdefault(row, fault)
