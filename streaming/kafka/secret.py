"""Texts that must not be shown."""

from __future__ import annotations


class Secret(str):
    """A password or token whose representation does not show it: kafka-python logs its configuration at DEBUG."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"
