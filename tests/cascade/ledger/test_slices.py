"""MIG slices: the rows add up to the counter, idle is divided by size, and joules of no slice have their own rows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.cli import main
from cascade.errors import DataError
from cascade.ledger.slices import (
    EMPTY,
    STRANDED,
    UNEXPLAINED,
    Slice,
    Window,
    attribute_window,
    attribute_windows,
    read_trace,
)

WINDOW = Window(
    device="GPU-1",
    seconds=10.0,
    energy_j=1_600.0,
    idle_w=54.0,
    sms=108,
    check_j=1_590.0,
    slices=(
        Slice(name="big", sms=42, activity=0.5),
        Slice(name="small", sms=14, activity=0.5),
        Slice(name="free", sms=28),
    ),
)


def test_idle_is_divided_by_size_and_the_rest_by_activity_times_size() -> None:
    rows = {row.name: row for row in attribute_window(WINDOW)}
    assert rows.keys() == {"big", "small", EMPTY, STRANDED}
    # 540 J of idle are 5 J per SM; 1,060 J are divided 21 to 7
    assert (rows["big"].idle_j, rows["small"].idle_j) == pytest.approx((210.0, 70.0))
    assert (rows["big"].dynamic_j, rows["small"].dynamic_j) == pytest.approx((795.0, 265.0))
    assert rows[EMPTY].energy_j == pytest.approx(140.0)
    assert rows[STRANDED].energy_j == pytest.approx(120.0)


def test_dynamic_joules_without_any_activity_belong_to_no_slice() -> None:
    quiet = msgspec.structs.replace(WINDOW, slices=(Slice(name="idle one", sms=98, activity=0.0),))
    rows = {row.name: row.energy_j for row in attribute_window(quiet)}
    assert rows[UNEXPLAINED] == pytest.approx(1_060.0)
    assert sum(rows.values()) == pytest.approx(1_600.0)


def test_the_methods_of_other_tools_divide_dynamic_joules_by_activity_or_all_joules_by_size() -> None:
    assert [row.energy_j for row in attribute_window(WINDOW, "activity")] == pytest.approx([530.0, 530.0])
    assert [row.energy_j for row in attribute_window(WINDOW, "occupied")] == pytest.approx([1_200.0, 400.0])


slices = st.lists(st.tuples(st.integers(1, 30), st.one_of(st.none(), st.floats(0, 1))), min_size=0, max_size=7).filter(
    lambda found: sum(sms for sms, _ in found) <= 108
)


@given(found=slices, energy_j=st.floats(0, 1e6), idle_w=st.floats(0, 500), seconds=st.floats(0.1, 1e4))
def test_the_rows_add_up_to_the_counter(
    found: list[tuple[int, float | None]], energy_j: float, idle_w: float, seconds: float
) -> None:
    parts = tuple(Slice(name=str(n), sms=sms, activity=activity) for n, (sms, activity) in enumerate(found))
    window = Window(device="d", seconds=seconds, energy_j=energy_j, idle_w=idle_w, sms=108, slices=parts)
    rows = attribute_window(window)
    assert sum(row.energy_j for row in rows) == pytest.approx(energy_j, rel=1e-9, abs=1e-9)
    assert all(row.idle_j >= 0 and row.dynamic_j >= 0 for row in rows)
    assert not {row.name for row in rows} & {str(n) for n, (_, activity) in enumerate(found) if activity is None}


def test_windows_add_up_by_device_and_have_a_check_if_all_of_them_do() -> None:
    unchecked = msgspec.structs.replace(WINDOW, device="GPU-2", check_j=None)
    first, second = attribute_windows([WINDOW, unchecked, WINDOW])
    assert (first.device, first.energy_j, first.check_j) == ("GPU-1", 3_200.0, 3_180.0)
    assert (second.device, second.check_j) == ("GPU-2", None)
    assert abs(first.residual_share) < 1e-12
    with pytest.raises(DataError, match="no window"):
        attribute_windows([])


def _line(energy_j: float, *slices: str) -> str:
    return f'{{"device":"d","seconds":1,"energy_j":{energy_j},"idle_w":1,"sms":8,"slices":[{",".join(slices)}]}}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"device": "d"}', "seconds"),
        (_line(-1), "energy_j"),
        (_line(1, '{"name":"a","sms":9}'), "more SMs"),
        (_line(1, '{"name":"a","sms":1}', '{"name":"a","sms":1}'), "the same name"),
        (_line(1, '{"name":"a","sms":1,"activity":1.5}'), "activity"),
        ("nonsense", "malformed"),
    ],
)
def test_an_impossible_window_is_an_error_with_its_line(line: str, reason: str) -> None:
    good = msgspec.json.encode(WINDOW)
    with pytest.raises(DataError, match=rf"trace, line 3: .*{reason}"):
        read_trace(good + b"\n\n" + line.encode(), "trace")


def test_the_command_prints_the_rows_and_the_residual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(msgspec.json.encode(WINDOW))
    assert main(["ledger", "slices", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "1,600.0 J in 10 s" in out
    assert "residual 0.00%; power integrated -0.62%" in out
    assert main(["ledger", "slices", str(trace), "--method", "guess"]) == 1
    assert "activity-size" in capsys.readouterr().err
