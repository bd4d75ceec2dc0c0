"""The division of the data: parts do not touch, and the validation part is as long as its frauds need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cascade.columns import ColumnBatch
from cascade.errors import DataError
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData
from cascade.schema import Schema, load_schema
from stages.settings import DataSettings, TrainingFile
from stages.split import FRAUDS_MIN, VALIDATION_DAYS_MIN, VALIDATION_SHARE_MAX, Split, split

SCHEMA: Schema = load_schema(Path(__file__).parents[2] / "cascade" / "schemas" / "simulator.toml")
PER_DAY = 50
START_MS = 1_700_000_000_000


def stream(days: int, frauds_per_day: int) -> LabelledData:
    """PER_DAY transactions each day, evenly; the first ones of a day are frauds."""
    row = np.arange(days * PER_DAY)
    times = START_MS + row * (DAY_MS // PER_DAY)
    return LabelledData(
        ColumnBatch({SCHEMA.roles.event_time: times}, len(row)), (row % PER_DAY < frauds_per_day).astype(np.int64)
    )


def divided(data: LabelledData, until_ms: int | None = None, **settings: str | int) -> Split:
    file = TrainingFile(data=DataSettings(**{"warm_up": "10d"} | settings))  # type: ignore[arg-type]
    return split(data, SCHEMA, file, until_ms, "data.parquet")


def days_of(data: LabelledData, rows: np.ndarray) -> tuple[float, float]:
    """First and last event of some rows, in days since the start."""
    times = (data.batch[SCHEMA.roles.event_time][rows] - START_MS) / DAY_MS
    return float(times.min()), float(times.max())


def test_the_parts_are_cut_by_time_and_do_not_touch() -> None:
    data = stream(60, 5)
    parts = divided(data, validation="8d")
    assert not (parts.training & parts.validation).any()
    times = data.batch[SCHEMA.roles.event_time]
    until_ms = int(times[-1]) + 1
    np.testing.assert_array_equal(parts.validation, times >= until_ms - 8 * DAY_MS)
    np.testing.assert_array_equal(parts.training, (times >= START_MS + 10 * DAY_MS) & ~parts.validation)


def test_nothing_after_the_end_belongs_to_a_part() -> None:
    data = stream(60, 5)
    until_ms = START_MS + 40 * DAY_MS
    parts = divided(data, until_ms, validation="8d")
    assert days_of(data, parts.validation) == (32.0, 40.0 - 1 / PER_DAY)
    assert days_of(data, parts.training) == (10.0, 32.0 - 1 / PER_DAY)


@pytest.mark.parametrize(
    ("frauds_per_day", "frauds_min", "days"),
    [
        (10, 120, 12),  # as many as need be
        (10, 121, 13),
        (10, 119, 12),
        (10, 30, VALIDATION_DAYS_MIN),  # a rhythm of the week, though fewer days have enough
        (10, 160, 16),
        (10, 500, 16),  # a third of the 50 days after the warm-up
        (3, 120, 16),
    ],
)
def test_validation_has_as_many_days_as_frauds_need(frauds_per_day: int, frauds_min: int, days: int) -> None:
    assert int(VALIDATION_SHARE_MAX * 50) == 16
    data = stream(60, frauds_per_day)
    parts = divided(data, START_MS + 60 * DAY_MS, validation_frauds_min=frauds_min)
    assert days_of(data, parts.validation) == (60.0 - days, 60.0 - 1 / PER_DAY)
    frauds = int(data.fraud[parts.validation].sum())
    assert frauds == days * frauds_per_day
    assert bool(parts.note) == (frauds < frauds_min)


def test_a_note_says_how_many_frauds_there_are_and_should_be() -> None:
    parts = divided(stream(60, 4), validation="7d", validation_frauds_min=300)
    assert parts.note == "28 frauds in the validation data, fewer than 300: the intervals are wide"


def test_the_days_before_the_end_are_counted_not_those_of_the_file() -> None:
    data = stream(90, 10)
    parts = divided(data, START_MS + 70 * DAY_MS, validation_frauds_min=100)
    assert days_of(data, parts.validation) == (60.0, 70.0 - 1 / PER_DAY)


def test_frauds_of_the_warm_up_are_not_counted() -> None:
    # 17 days follow the warm-up: the least length is used, although a third of them is less
    data = stream(27, 10)
    parts = divided(data, START_MS + 27 * DAY_MS)
    assert days_of(data, parts.validation)[0] == 27.0 - VALIDATION_DAYS_MIN
    assert days_of(data, parts.training)[0] == 10.0


def without_frauds(data: LabelledData, rows: np.ndarray) -> LabelledData:
    return LabelledData(data.batch, np.where(rows, 0, data.fraud))


@pytest.mark.parametrize("kept", [0, FRAUDS_MIN - 1])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_part_with_too_few_frauds_is_refused_and_named(part: str, kept: int) -> None:
    data = stream(60, 5)
    rows = getattr(divided(data, validation="8d"), part)
    frauds = np.flatnonzero(rows & (data.fraud == 1))
    rows[frauds[:kept]] = False
    with pytest.raises(
        DataError, match=rf"^data\.parquet: {kept} frauds among \d+ {part} transactions.*shorten data\."
    ):
        divided(without_frauds(data, rows), validation="8d")
    rows[frauds[:FRAUDS_MIN]] = False
    divided(without_frauds(data, rows), validation="8d")


def test_frauds_alone_are_refused_as_well() -> None:
    data = stream(60, 5)
    with pytest.raises(DataError, match=r"training transactions, at least 20 of each kind"):
        divided(LabelledData(data.batch, np.ones_like(data.fraud)), validation="8d")


@pytest.mark.parametrize("days", [0, 1, 10, 17])
@pytest.mark.parametrize("validation", ["auto", "8d"])
def test_too_little_data_is_refused_with_a_remedy(days: int, validation: str) -> None:
    with pytest.raises(
        DataError, match=rf"the data spans {days}\.0|the data spans \d+\.\d days: shorten data\.warm_up"
    ):
        divided(stream(days, 5), validation=validation)
