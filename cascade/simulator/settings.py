"""What to simulate, and the names that the frames use."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import IntEnum
from typing import Final

from cascade.errors import SettingError

DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
MINUTE_MS: Final = 60_000
YEAR_MS: Final = 365.25 * DAY_MS
# Measured: 175 to 190 bytes per row at the peak, so a run needs at most about 9.5 GB.
ROWS_MAX: Final = 50_000_000

ENTRY_MODES: Final = ("chip", "contactless", "online")
PATTERNS: Final = (
    "none",
    "stolen_card",
    "compromised_terminal",
    "card_testing",
    "account_takeover",
    "large_amount",
    "leaked_merchant",
    "mule_ring",
)
CATEGORIES: Final = (
    "grocery",
    "restaurant",
    "fuel",
    "transit",
    "clothing",
    "electronics",
    "home",
    "health",
    "travel",
    "entertainment",
    "digital",
    "services",
)
# ISO 3166-1 alpha-2; the first ones have the most towns.
COUNTRIES: Final = (
    *("DE", "FR", "NL", "IT", "ES", "AT", "BE", "PL", "CZ", "IE"),
    *("PT", "DK", "SE", "FI", "GR", "HU", "GB", "CH", "US", "CN"),
)


class Kind(IntEnum):
    """The process that makes a transaction. The frauds are those from STOLEN_CARD to MULE_RING, named as in PATTERNS.

    What follows them are their genuine twins: processes with nearly equal counts, sums and maxima over every window.
    """

    PURCHASE = 0
    SUBSCRIPTION = 1
    STOLEN_CARD = 2
    COMPROMISED_TERMINAL = 3
    CARD_TESTING = 4
    ACCOUNT_TAKEOVER = 5
    LARGE_AMOUNT = 6
    LEAKED_MERCHANT = 7
    MULE_RING = 8
    TRAVEL_DAY = 9
    BASKET = 10
    TRANSIT_DAY = 11
    NEW_HOBBY = 12
    NEW_PHONE = 13
    CONCERT = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorSettings:
    """What to simulate. Raises SettingError if a value is out of range.

    - `cards`: cards in use on any day.
    - `terminals`: shops and online merchants together.
    - `start`, `days`: the first day, which begins at 00:00 UTC, and the number of days.
    - `fraud_share`: share of frauds in all transactions, before some of them stay unreported.
    - `transactions_per_card_day`: mean over cards and days.
    - `spend_inflation_per_year`: growth of the amounts (0.05 is five per cent).
    - `online_growth_per_year`: growth of the log-odds of an online purchase.
    - `card_turnover_per_year`: share of the cards that new cards, with new habits, replace.
    """

    cards: int = 5_000
    terminals: int = 10_000
    days: int = 180
    start: date = date(2025, 1, 1)
    seed: int = 1
    fraud_share: float = 0.007
    transactions_per_card_day: float = 1.2
    spend_inflation_per_year: float = 0.06
    online_growth_per_year: float = 0.4
    card_turnover_per_year: float = 0.3

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                remedy = f"use {low:,} to {high:,}".replace(",", " ")
                raise SettingError("simulator", name, value, "out of range", remedy)
        if not date(2000, 1, 1) <= self.start <= date(2100, 1, 1) - timedelta(days=self.days):
            raise SettingError("simulator", "start", str(self.start), "out of range", "stay within 2000 to 2099")
        rows = self.cards * self.days * self.transactions_per_card_day
        if rows > ROWS_MAX:
            problem = f"about {rows:.0f} transactions do not fit in memory"
            remedy = f"make cards x days x transactions_per_card_day at most {ROWS_MAX}"
            raise SettingError("simulator", "days", self.days, problem, remedy)

    @property
    def start_ms(self) -> int:
        """First moment of the simulation, ms since the epoch."""
        return round(datetime.combine(self.start, time(), UTC).timestamp() * 1_000)

    @property
    def span_ms(self) -> int:
        """Length of the simulation, ms."""
        return self.days * DAY_MS


_LIMITS: Final[dict[str, tuple[float, float]]] = {
    "cards": (10, 10_000_000),
    "terminals": (20, 1_000_000),
    "days": (1, 3_650),
    "seed": (0, 2**63 - 1),
    "fraud_share": (0.0, 0.2),
    "transactions_per_card_day": (0.01, 100.0),
    "spend_inflation_per_year": (-0.5, 1.0),
    "online_growth_per_year": (-3.0, 3.0),
    "card_turnover_per_year": (0.0, 5.0),
}
