"""Durations as people write them."""

import pytest

from cascade.durations import parse_ms

NOT_DURATIONS = "|7|d|7 d| 7d|7d |7d\n|-7d|+7d|1.5h|7D|7days|1h30m|7w|1e3s|∞s"


@pytest.mark.parametrize(
    ("text", "ms"),
    [("250ms", 250), ("90s", 90_000), ("15m", 900_000), ("1h", 3_600_000), ("007d", 604_800_000), ("0s", 0)],
)
def test_whole_numbers_with_a_unit(text: str, ms: int) -> None:
    assert parse_ms(text) == ms


@pytest.mark.parametrize("text", NOT_DURATIONS.split("|"))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_ms(text)
