"""Settings out of range are refused by name."""

from datetime import date

import pytest

from cascade.errors import SettingError
from cascade.simulator import Kind, SimulatorSettings
from cascade.simulator.settings import PATTERNS

OUT_OF_RANGE: list[dict[str, object]] = [
    *({"cards": 0}, {"terminals": 3}, {"days": 0}, {"seed": -1}, {"fraud_share": 1.0}),
    *({"start": date(1999, 1, 1)}, {"transactions_per_card_day": float("nan")}),
]


@pytest.mark.parametrize("setting", OUT_OF_RANGE, ids=str)
def test_a_setting_out_of_range_is_named(setting: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        SimulatorSettings(**setting)  # type: ignore[arg-type]


def test_a_run_that_cannot_fit_in_memory_is_refused() -> None:
    with pytest.raises(SettingError, match="memory"):
        SimulatorSettings(cards=10_000_000, days=3_650)


def test_the_frauds_are_the_patterns_in_their_order() -> None:
    frauds = [Kind(number).name.lower() for number in range(Kind.STOLEN_CARD, Kind.MULE_RING + 1)]
    assert ["none", *frauds] == list(PATTERNS)
