"""Texts that lie in arrays of octets: most are plain ASCII, and only the others are looked at one by one."""

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
    """Which texts are more than printable ASCII; `octets` uint8 [rows, width], padded with zeros; bool [rows].

    A zero before another octet belongs to the text.
    """
    zero = octets == 0
    # one comparison for both bounds: what is less wraps around
    plain = (octets - np.uint8(_FIRST_PLAIN) < _PLAIN) | zero
    inner = zero[:, :-1] > zero[:, 1:]
    if plain.all() and not inner.any():
        return np.zeros(len(octets), np.bool_)
    found: Bool = ~plain.all(axis=1) | inner.any(axis=1)
    return found


class DoubtfulTexts:
    """The texts of a field that are not plain ASCII within the length, decoded one by one.

    Made for all fields before any other rule, as what is not UTF-8 is a fault of the message and comes first.
    """

    def __init__(self, name: str, field: Field, rows: Iterable[int], whole: Callable[[int], bytes]) -> None:
        """`rows`: which; `whole`: the octets of a row's text."""
        self._name, self._field = name, field
        self._texts: dict[int, str] = {}
        self._broken: list[int] = []
        for row in rows:
            try:
                self._texts[row] = whole(row).decode()
            except UnicodeDecodeError:
                self._broken.append(row)

    def note_broken(self, faults: Faults) -> None:
        """Note what is not UTF-8."""
        for row in self._broken:
            faults.setdefault(row, (RejectReason.ENCODING, "a text is not UTF-8"))

    def note_rest(self, faults: Faults) -> None:
        """Note what is too long, or holds what cannot be seen."""
        for row, text in self._texts.items():
            fault = check_text(self._name, self._field, text)
            if fault is not None:
                faults.setdefault(row, fault)
