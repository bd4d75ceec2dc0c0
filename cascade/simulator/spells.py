"""Journeys, and weeks of higher spending: genuine behaviour unlike the card's habits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.simulator.settings import DAY_MS, SimulatorSettings

_A_YEAR: Final = 5.0
_TRAVEL_SHARE: Final = 0.6
# A journey that would begin outside July and August is drawn anew with this probability.
_SUMMER_PULL: Final = 0.8


@dataclass(frozen=True, slots=True)
class Spells:
    """Spells, sorted by card and start. `code`: card x span + start; `town` is -1 at home."""

    span_ms: int
    code: Int64
    end_ms: Int64
    town: Int64
    log_factor: Float64

    def at(self, card: Int64, time_ms: Int64) -> tuple[Int64, Float64]:
        """Town (-1: at home) and log of the spend factor for each transaction, both [rows]."""
        if not len(self.code):
            return np.full(len(card), -1), np.zeros(len(card))
        found = np.searchsorted(self.code, card * self.span_ms + time_ms, side="right") - 1
        safe = np.maximum(found, 0)
        active = (found >= 0) & (self.code[safe] // self.span_ms == card) & (time_ms < self.end_ms[safe])
        return np.where(active, self.town[safe], -1), np.where(active, self.log_factor[safe], 0.0)


def make_spells(rng: np.random.Generator, settings: SimulatorSettings, cards: int, towns: int) -> Spells:
    """About five spells a year and card, of 2 to 12 days."""
    span = settings.span_ms
    per_card = rng.poisson(_A_YEAR * settings.days / 365.25, cards)
    card = np.repeat(np.arange(cards), per_card)
    travels = rng.random(len(card)) < _TRAVEL_SHARE
    start = rng.integers(0, span, len(card), dtype=np.int64)
    again = travels & ~_in_summer(settings, start) & (rng.random(len(card)) < _SUMMER_PULL)
    start[again] = rng.integers(0, span, int(again.sum()), dtype=np.int64)
    length = rng.integers(2 * DAY_MS, 12 * DAY_MS, len(card), dtype=np.int64)
    town = np.where(travels, rng.integers(0, towns, len(card)), -1)
    log_factor = np.where(travels, rng.uniform(0.0, 0.4, len(card)), rng.uniform(0.2, 0.9, len(card)))
    code = card * span + start
    order = np.argsort(code, kind="stable")
    return Spells(span, code[order], (start + length)[order], town[order], log_factor[order])


def _in_summer(settings: SimulatorSettings, time_ms: Int64) -> Bool:
    day = np.datetime64(settings.start, "D") + time_ms // DAY_MS
    month = day.astype("datetime64[M]").astype(np.int64) % 12
    summer: Bool = (month == 6) | (month == 7)
    return summer
