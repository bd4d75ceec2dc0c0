"""Carbon: the formula of the standard on known numbers, intensities by place and hour, and unknown intensities."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cascade.config import CarbonSettings
from cascade.errors import SettingError
from cascade.ledger import Carbon, Ledger, make_carbon, merge_accounts, summarise
from cascade.ledger.carbon import HourlyGrid, YearlyGrid, intensity_table
from tests.cascade.ledger.helpers import NOON, FixedMeter, rendered


class FakeGrid:
    """A grid whose intensity the test sets."""

    basis = "a fake grid"

    def __init__(self) -> None:
        self.value: float | None = 360.0

    def g_per_kwh(self, at: datetime) -> float | None:
        assert at.tzinfo is not None
        return self.value


def test_the_formula_on_known_numbers() -> None:
    settings = CarbonSettings(region="DEU", pue=1.5, embodied_kg=350.64, reserved_share=0.25, life_years=4.0)
    carbon = make_carbon(settings)
    assert carbon is not None
    assert carbon.operational_g(3.6e6, NOON) == pytest.approx(1.5 * 381.0, abs=0.2)
    # 350.64 kg / 4 over 4 years of 8,766 hours are 2.5 g per hour
    assert carbon.embodied_g(7_200.0) == pytest.approx(5.0)
    assert carbon.bases == (
        "Germany, average of 2023: 380.9 g/kWh (Ember and Energy Institute, CC BY 4.0); PUE 1.5",
        "embodied: 2.5 g per hour",
    )


def test_the_table_has_the_published_values() -> None:
    table = intensity_table()
    assert len(table) == 212
    for region, published in {"SWE": 41, "FRA": 56, "USA": 369, "DEU": 381, "POL": 662, "IND": 713}.items():
        name, year, g_per_kwh = table[region]
        assert name
        assert year == 2023
        assert g_per_kwh == pytest.approx(published, abs=0.6)


def test_each_joule_counts_at_the_intensity_of_its_time() -> None:
    grid, meter = FakeGrid(), FixedMeter("gpu", "measured")
    ledger = Ledger(meters=[meter], carbon=Carbon(grid, 1.0, None))
    ledger.record_decisions("screened", np.full(1_000, 0.001))
    for joules, g_per_kwh in ((1_000.0, 360.0), (3_000.0, 36.0)):
        meter.energy_j, grid.value = joules, g_per_kwh
        ledger.sample_energy()
    carbon = ledger.summary().carbon
    assert carbon is not None
    # 1 kJ at 0.1 g/kJ and 2 kJ at 0.01 g/kJ
    assert carbon.totals[0].operational_g == pytest.approx(0.12)
    assert carbon.totals[0].per_million_g == pytest.approx(120.0)
    assert carbon.sci_g_per_million == pytest.approx(120.0)


def test_an_unknown_intensity_makes_the_grams_unknown_and_never_zero() -> None:
    grid, meter = FakeGrid(), FixedMeter("gpu", "measured")
    ledger = Ledger(meters=[meter], carbon=Carbon(grid, 1.0, None))
    ledger.record_decisions("screened", np.full(10, 0.001))
    grid.value, meter.energy_j = None, 100.0
    ledger.sample_energy()
    grid.value, meter.energy_j = 360.0, 200.0
    carbon = ledger.summary().carbon
    assert carbon is not None
    assert carbon.totals[0].operational_g is None
    assert carbon.sci_g_per_million is None


def test_measured_and_modelled_grams_have_no_sum() -> None:
    meters = [FixedMeter("gpu", "measured"), FixedMeter("cpu-model", "modelled")]
    ledger = Ledger(meters=meters, carbon=Carbon(FakeGrid(), 1.0, 1.0))
    ledger.record_decisions("screened", np.full(10, 0.001))
    meters[0].energy_j, meters[1].energy_j = 1_000.0, 2_000.0
    summary = ledger.summary()
    assert summary.carbon is not None
    grams = {total.kind: total.operational_g for total in summary.carbon.totals}
    assert grams == pytest.approx({"measured": 0.1, "modelled": 0.2})
    assert summary.carbon.sci_g_per_million is None
    text = rendered(summary)
    assert "a fake grid; PUE 1" in text
    assert "SCI" not in text


def test_the_hardware_counts_once_for_all_workers_of_a_service() -> None:
    settings = CarbonSettings(region="FRA", embodied_kg=100.0)
    supervisor = Ledger(carbon=make_carbon(settings), clock=iter([0.0, 3_600.0]).__next__)
    workers = [
        Ledger(meters=[FixedMeter("cpu-model", "modelled")], carbon=make_carbon(settings, embodied=False))
        for _ in range(2)
    ]
    accounts = [ledger.account() for ledger in (supervisor, *workers)]
    carbon = summarise(merge_accounts(accounts)).carbon
    assert carbon is not None
    assert carbon.embodied_g == pytest.approx(1e5 / (4 * 8_766))
    assert len(carbon.bases) == 2


def test_the_grams_of_an_account_survive_writing_and_division() -> None:
    meter, seconds = FixedMeter("gpu", "measured"), iter([0.0, 60.0, 120.0])
    ledger = Ledger(meters=[meter], carbon=Carbon(FakeGrid(), 1.0, 36.0), clock=seconds.__next__)
    meter.energy_j = 1_000.0
    first = ledger.account()
    meter.energy_j = 4_000.0
    part = type(first).from_json(ledger.account().to_json()).since(first)
    assert part.meters[0].carbon_g == pytest.approx(0.3)
    assert part.embodied_g == pytest.approx(0.6)
    assert merge_accounts([first, part]).meters[0].carbon_g == pytest.approx(0.4)


# --- by the hour ------------------------------------------------------------------------------------------------------


def csv_of(path: Path, values: dict[datetime, float]) -> Path:
    lines = [f"{time.isoformat()},{value}" for time, value in values.items()]
    path.write_text("\n".join(["time,g_per_kwh", *lines]))
    return path


def test_a_value_is_valid_until_the_next_value_and_for_25_hours_at_most(tmp_path: Path) -> None:
    grid = HourlyGrid(csv_of(tmp_path / "i.csv", {NOON: 300.0, NOON + timedelta(hours=1): 200.0}), "DEU", "marginal")
    assert grid.g_per_kwh(NOON - timedelta(seconds=1)) is None
    assert grid.g_per_kwh(NOON + timedelta(minutes=59)) == 300.0
    assert grid.g_per_kwh(NOON + timedelta(hours=26)) == 200.0
    assert grid.g_per_kwh(NOON + timedelta(hours=26, seconds=1)) is None
    assert grid.basis == "DEU, marginal, by the hour from i.csv"


def test_a_new_file_replaces_the_values_unless_it_is_broken(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "i.csv", {NOON: 300.0})
    grid = HourlyGrid(path, "", "average")
    for number, (text, expected) in enumerate(
        [("time,g_per_kwh\n2026-01-01T12:00:00Z,10", 10.0), ("time,g_per", 10.0), ("", 10.0), (None, 10.0)]
    ):
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
            os.utime(path, ns=(number + 1, number + 1))
        assert grid.g_per_kwh(NOON) == expected


@pytest.mark.parametrize(
    "content",
    [
        {"zone": "DE", "carbonIntensity": 302, "datetime": "2026-01-01T12:00:00.000Z", "updatedAt": "x"},
        {"zone": "DE", "history": [{"carbonIntensity": 302, "datetime": "2026-01-01T12:00:00Z"}]},
        {"zone": "DE", "data": [{"carbonIntensity": 302, "datetime": "2026-01-01T12:00:00+00:00"}]},
    ],
)
def test_the_json_of_a_feed_is_read(tmp_path: Path, content: object) -> None:
    path = tmp_path / "feed.json"
    path.write_text(json.dumps(content))
    carbon = make_carbon(CarbonSettings(file=str(path), pue=1.0))
    assert carbon is not None
    assert carbon.operational_g(3.6e6, NOON) == pytest.approx(302.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("i.csv", "time,grams\n2026-01-01,3"),
        ("i.csv", "time,g_per_kwh\n2026-01-01,much"),
        ("i.csv", "time,g_per_kwh\nnoon,3"),
        ("i.csv", "time,g_per_kwh\n2026-01-01,-1"),
        ("i.csv", "time,g_per_kwh\n2026-01-01,nan"),
        ("i.csv", "time,g_per_kwh"),
        ("i.csv", "\xff"),
        ("i.json", "[]"),
        ("i.json", "{"),
        ("i.json", '{"history": [1]}'),
        ("i.json", '{"history": []}'),
        ("absent.csv", None),
    ],
)
def test_a_bad_or_absent_file_is_a_setting_error_of_one_line(tmp_path: Path, name: str, text: str | None) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, "latin-1")
    with pytest.raises(SettingError, match=r"carbon\.file") as caught:
        make_carbon(CarbonSettings(file=str(path)))
    assert "\n" not in str(caught.value)
    assert text is not None or "cannot be read" in str(caught.value)


def test_a_region_is_found_in_any_case_and_an_unknown_region_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match=r"carbon\.region.*alpha-3"):
        make_carbon(CarbonSettings(region="Narnia"))
    assert YearlyGrid("deu").g_per_kwh(NOON) == YearlyGrid("DEU").g_per_kwh(NOON)


def test_without_settings_there_is_no_carbon_and_a_line_of_an_earlier_release_without_it_is_readable() -> None:
    ledger = Ledger(meters=[FixedMeter("gpu", "measured")], carbon=make_carbon(CarbonSettings()))
    assert ledger.summary().carbon is None
    account = ledger.account()
    plain = msgspec.json.decode(account.to_json())
    for name in ("carbon_bases", "embodied_g"):
        del plain[name]
    del plain["meters"][0]["carbon_g"]
    assert type(account).from_json(msgspec.json.encode(plain)).to_json() == account.to_json()
