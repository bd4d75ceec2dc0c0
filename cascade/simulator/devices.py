"""Devices: the phone or computer with which a card's owner buys online.

An owner has a main device, which a new one replaces about every two years. Some owners have a second device as well,
and some share the main device of somebody in the family. Some purchases have no device: paid as a guest or by phone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.columns import Float64, Int64
from cascade.simulator.settings import SimulatorSettings

NO_DEVICE: Final = 0
GUEST_SHARE: Final = 0.15
SECOND_SHARE: Final = 0.2
_HAS_SECOND: Final = 0.25
_SHARES: Final = 0.1
_NEW_PER_YEAR: Final = 0.5


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of the cards, numbered from 1; numbers from `count` + 1 on are free.

    - `owner` int64 [cards]: the card whose main device this card uses, mostly itself.
    - `code` int64 [devices]: owner x span + first moment of a main device, ascending; device i has number i + 1.
    - `second` int64 [cards]: number of the second device; the card's owner has none where it is 0.
    """

    span_ms: int
    owner: Int64
    code: Int64
    second: Int64
    count: int

    def main(self, card: Int64, time_ms: Int64) -> Int64:
        """Numbers of the main devices of cards at times, int64 [rows]."""
        found: Int64 = np.searchsorted(self.code, self.owner[card] * self.span_ms + time_ms, side="right")
        return found

    def draw(self, rng: np.random.Generator, card: Int64, time_ms: Int64) -> Int64:
        """Devices of genuine online purchases, int64 [rows]."""
        chance = rng.random(len(card))
        second = self.second[card]
        device = np.where((second > 0) & (chance < SECOND_SHARE), second, self.main(card, time_ms))
        return np.where(rng.random(len(card)) < GUEST_SHARE, NO_DEVICE, device)

    def probability(self, card: Int64, time_ms: Int64, device: Int64) -> Float64:
        """The probability that `draw` returns a device, float64 [rows]."""
        second = np.where(self.second[card] > 0, SECOND_SHARE, 0.0)
        of_second = (device == self.second[card]) & (device > 0)
        known = np.where(device == self.main(card, time_ms), 1.0 - second, 0.0) + np.where(of_second, second, 0.0)
        return np.where(device == NO_DEVICE, GUEST_SHARE, (1.0 - GUEST_SHARE) * known)


def make_devices(rng: np.random.Generator, settings: SimulatorSettings, cards: int) -> Devices:
    """The devices of `cards` cards."""
    span = settings.span_ms
    renewals = rng.poisson(_NEW_PER_YEAR * settings.days / 365.25, cards)
    begins = rng.integers(0, span, int(renewals.sum()), dtype=np.int64)
    first = np.arange(cards, dtype=np.int64) * span
    code = np.sort(np.concatenate([first, np.repeat(first, renewals) + begins]))
    owner = np.where(rng.random(cards) < _SHARES, rng.integers(0, cards, cards), np.arange(cards))
    has_second = rng.random(cards) < _HAS_SECOND
    second = np.where(has_second, len(code) + np.cumsum(has_second), 0)
    return Devices(span, owner.astype(np.int64), code, second.astype(np.int64), len(code) + int(has_second.sum()))
