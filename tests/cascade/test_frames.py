from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cascade.errors import DataError
from cascade.frames import frame_to_batch, read_frame, read_labelled
from cascade.schema import Schema, parse_schema
from tests.cascade.test_schema import GOOD

T_MS = 1_735_732_800_123  # 2025-01-01T12:00:00.123Z


def schema(unit: str = "ms") -> Schema:
    """The schema of `test_schema` with texts as ids, short card numbers and another unit of time."""
    text = GOOD.replace('unit = "s"', f'unit = "{unit}"').replace("max_length = 20", "max_length = 4")
    return parse_schema(text.replace('type = "int64"', 'type = "string"', 1).encode(), "schema.toml")


def frame(**columns: object) -> pl.DataFrame:
    plain: dict[str, object] = {
        "id": ["a", "b", "c"],
        "at": [T_MS, T_MS + 1, T_MS + 2],
        "pan": ["k1", "k2", "k1"],
        "shop": [7, 8, 9],
        "paid": [1.5, 2.5, 100.0],
        "mode": ["chip", "online", "chip"],
        "fraud": [0, 1, 0],
    }
    return pl.DataFrame(plain | columns)


def refusal(tmp_path: Path, data: pl.DataFrame, unit: str = "ms") -> str:
    path = tmp_path / "data.parquet"
    data.write_parquet(path)
    with pytest.raises(DataError) as caught:
        read_labelled(path, schema(unit))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


def read(tmp_path: Path, data: pl.DataFrame, unit: str = "ms", suffix: str = ".parquet"):
    path = tmp_path / f"data{suffix}"
    data.write_parquet(path) if suffix == ".parquet" else data.write_csv(path)
    return read_labelled(path, schema(unit))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_columns_have_the_types_of_the_schema(tmp_path: Path, suffix: str) -> None:
    data = read(tmp_path, frame(), suffix=suffix)
    batch = data.batch
    assert batch.rows == 3
    assert set(batch.columns) == set(schema().fields), "the label must not be among the fields"
    assert batch["id"].dtype == np.dtype("S64")
    assert batch["pan"].tolist() == [b"k1", b"k2", b"k1"]
    assert batch["at"].tolist() == [T_MS, T_MS + 1, T_MS + 2]
    assert batch["mode"].tolist() == [0, 1, 0]
    assert (batch["shop"].dtype, batch["paid"].dtype) == (np.int64, np.float64)
    assert data.fraud.tolist() == [0, 1, 0]
    assert data.fraud.dtype == np.int64


def test_rows_are_put_in_order_of_time_and_ties_keep_theirs(tmp_path: Path) -> None:
    data = read(tmp_path, frame(at=[T_MS + 5, T_MS, T_MS + 5], fraud=[1, 0, 0]))
    assert data.batch["id"].tolist() == [b"b", b"a", b"c"]
    assert data.fraud.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("unit", "time", "time_ms"),
    [("s", T_MS // 1000, T_MS // 1000 * 1000), ("ms", T_MS, T_MS), ("us", T_MS * 1000 + 999, T_MS)],
)
def test_whole_numbers_are_times_in_the_schemas_unit(unit: str, time: int, time_ms: int) -> None:
    row = frame()[:1].with_columns(at=pl.Series([time], dtype=pl.Int64))
    assert frame_to_batch(row, schema(unit), "data")["at"].tolist() == [time_ms]


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
@pytest.mark.parametrize("resolution", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_datetimes_are_times_whatever_the_schemas_unit(unit: str, resolution: str, zone: str | None) -> None:
    times = pl.Series([T_MS]).cast(pl.Datetime("ms")).cast(pl.Datetime(resolution))
    times = times.dt.replace_time_zone("UTC").dt.convert_time_zone(zone) if zone else times
    batch = frame_to_batch(frame()[:1].with_columns(at=times), schema(unit), "data")
    assert batch["at"].tolist() == [T_MS], "a time without a zone is UTC"


def test_dates_are_midnight_utc() -> None:
    batch = frame_to_batch(frame()[:1].with_columns(at=pl.Series([date(2025, 1, 1)])), schema(), "data")
    assert batch["at"].tolist() == [int(datetime(2025, 1, 1, tzinfo=UTC).timestamp() * 1000)]


def test_strings_become_utf8_bytes_up_to_their_limit() -> None:
    batch = frame_to_batch(frame(pan=["äö", "k", "1234"]), schema(), "data")
    assert [text.decode() for text in batch["pan"].tolist()] == ["äö", "k", "1234"]


def test_numbers_serve_as_string_ids() -> None:
    assert frame_to_batch(frame(id=[10, 11, 12]), schema(), "data")["id"].tolist() == [b"10", b"11", b"12"]


def test_a_string_that_is_too_long_is_refused_not_cut(tmp_path: Path) -> None:
    line = refusal(tmp_path, frame(pan=["k1", "k2", "12345"]))
    assert "column pan has texts of 5 bytes, more than max_length = 4" in line


@pytest.mark.parametrize("column", ["id", "at", "pan", "shop", "paid", "mode"])
def test_a_missing_column_is_named_and_nulls_are_counted(tmp_path: Path, column: str) -> None:
    assert f"has no column {column}" in refusal(tmp_path, frame().drop(column))
    with_null = frame().with_columns(pl.when(pl.int_range(3) != 1).then(pl.col(column)).alias(column))
    assert f"column {column} has 1 nulls" in refusal(tmp_path, with_null)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("at", ["now", "then", "soon"]),
        ("shop", ["x", "y", "z"]),
        ("paid", ["a", "b", "c"]),
        ("mode", ["chip", "cash", "chip"]),
        ("at", [[1], [2], [3]]),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(tmp_path: Path, column: str, values: list[object]) -> None:
    assert f"column {column} " in refusal(tmp_path, frame(**{column: values}))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("paid", [1.0, -0.01, 2.0]),
        ("paid", [1.0, 100.01, 2.0]),
        ("paid", [1.0, float("nan"), 2.0]),
        ("paid", [1.0, float("inf"), 2.0]),
        ("at", [T_MS, 0, T_MS]),
        ("at", [T_MS, 2**62, T_MS]),
    ],
)
def test_a_value_out_of_limits_is_named_with_its_row(tmp_path: Path, column: str, values: list[float]) -> None:
    line = refusal(tmp_path, frame(**{column: values}))
    assert f"1 values of {column} are not numbers within" in line
    assert "first in row 1" in line


def test_a_file_without_labels_is_refused(tmp_path: Path) -> None:
    line = refusal(tmp_path, frame().drop("fraud"))
    assert "has no column fraud (label.field of schema shop)" in line


@pytest.mark.parametrize("labels", [[0, 2, 1], [0, -1, 0], [0, None, 1], [0.0, 0.5, 1.0], ["no", "yes", "no"]])
def test_labels_besides_0_and_1_are_refused(tmp_path: Path, labels: list[object]) -> None:
    assert "column fraud" in refusal(tmp_path, frame(fraud=labels))


@pytest.mark.parametrize("kind", [pl.Int8, pl.UInt32, pl.Float64, pl.Boolean])
def test_labels_of_any_kind_of_0_and_1_are_read(tmp_path: Path, kind: type[pl.DataType]) -> None:
    assert read(tmp_path, frame().with_columns(pl.col("fraud").cast(kind))).fraud.tolist() == [0, 1, 0]


def test_an_empty_file_is_an_empty_batch(tmp_path: Path) -> None:
    data = read(tmp_path, frame()[:0])
    assert data.batch.rows == 0
    assert len(data.fraud) == 0


@pytest.mark.parametrize("name", ["data.parquet", "empty.csv", "data.xlsx", "data", "absent.parquet", "absent.csv"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"PAR1 not really" if name == "data.parquet" else b"")
    with pytest.raises(DataError, match=name) as caught:
        read_frame(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_taking_rows_keeps_labels_beside_their_transactions(tmp_path: Path) -> None:
    taken = read(tmp_path, frame()).take(np.array([1, 0]))
    assert (taken.batch["id"].tolist(), taken.fraud.tolist()) == ([b"b", b"a"], [1, 0])
