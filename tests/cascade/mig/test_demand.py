"""The demand of a plan, stated or from a journal."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from cascade.cli import main
from cascade.errors import DataError, SettingError
from cascade.ledger.account import Account
from cascade.ledger.journal import Run, read_journal
from cascade.mig.demand import MODELS_MAX, ModelEntry, journal_rates, read_models
from tests.cascade.ledger.helpers import NOON
from tests.cascade.ledger.test_journal import Service, written

ENTRY = '[[models]]\nrate = 1.0\np99 = "1s"\n'


def run_of(calls_by_minute: list[int], rows_per_call: int = 2, last_s: float = 60.0) -> Run:
    """A run with a journal line each minute; the last line comes after `last_s`."""
    accounts: list[Account] = []
    base = Service().account()
    counters = base.counters
    ended: datetime = NOON
    for number, calls in enumerate(calls_by_minute):
        counters = counters.copy()
        counters.deep_calls.record_many(1e-3, calls)
        counters.deep_rows += calls * rows_per_call
        counters.paths["escalated"].record_many(1e-3, 1)
        counters.paths["screened"].record_many(1e-3, 1)
        ended += timedelta(seconds=last_s if number == len(calls_by_minute) - 1 else 60.0)
        accounts.append(msgspec.structs.replace(base, started=NOON, ended=ended, counters=counters))
    return Run("run", accounts, torn=0)


def test_a_stated_demand_is_in_calls() -> None:
    entry = ModelEntry(rate=10_000.0, mean_rate=4_000.0, escalated=0.01, rows_per_call=2.0, p99="20ms")
    demand = entry.demand("here")
    assert (demand.calls_per_s, demand.calls_per_s_mean, demand.p99_s) == (50.0, 20.0, 0.02)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"p99": "fast"}, "here: p99 = 'fast'"),
        ({"p99": "0ms"}, "no call takes no time"),
        ({"mean_rate": 20_000.0}, "above the rate at the peak"),
    ],
)
def test_an_odd_demand_names_the_key(changes: dict[str, object], reason: str) -> None:
    entry = msgspec.structs.replace(ModelEntry(rate=10_000.0, p99="20ms"), **changes)
    with pytest.raises(SettingError, match=reason):
        entry.demand("here")


def test_the_busiest_minute_of_a_journal_is_the_peak() -> None:
    found = journal_rates([run_of([60, 300, 120])], 60.0)
    assert (found.intervals, found.calls_per_s_max) == (3, 5.0)
    assert found.calls_per_s_mean == pytest.approx(480 / 180)
    assert found.rows_per_call == 2.0
    assert found.escalated_share == 0.5
    # variance of 60, 300, 120 ÷ their mean
    assert found.dispersion == pytest.approx(15_600 / 160)


def test_a_stub_at_the_end_is_no_peak_and_workers_add_up() -> None:
    assert journal_rates([run_of([60, 60, 40], last_s=2.0)], 60.0).calls_per_s_max == 1.0
    assert journal_rates([run_of([60, 120]), run_of([60, 60])], 60.0).calls_per_s_max == 3.0


def test_a_journal_without_deep_calls_or_with_too_many_intervals_is_refused() -> None:
    with pytest.raises(DataError, match="no deep call"):
        journal_rates([run_of([0, 0])], 60.0)
    with pytest.raises(DataError, match="use longer ones"):
        journal_rates([run_of([1, 1])], 0.01)


def test_a_plan_takes_its_rates_from_the_journal_of_a_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    rates = journal_rates(read_journal([tmp_path]), 60.0)
    options = ("--gpu", "a100-40gb", "--simulate", "0", "--layouts", "1", "--p99", "1s")
    assert main(["mig", "plan", *options, "--journal", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"journal: {rates.intervals} intervals of 60 s" in out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "models: missing; set it; see docs/mig.md"),
        ("models = [", "file: is not TOML"),
        (ENTRY.replace('p99 = "1s"', ""), "models[0].p99: missing; set it"),
        (ENTRY + "speed = 3", "models[0].speed: unknown key; known: name, rate"),
        (ENTRY.replace("1.0", "-1.0"), "models[0].rate = -1.0: expected float > 0.0; use more than 0 to"),
        (
            ENTRY + "bursts = { factor = 3, share = 2 }",
            "models[0].bursts.share = 2: expected float <= 0.9; use 0.001 to",
        ),
        (ENTRY + "bursts = { fctor = 3 }", "models[0].bursts.fctor: unknown key; did you mean factor?"),
        (ENTRY + 'measured = { "1g.5gb" = 3 }', "models[0].measured[...]: expected str, got int"),
        (ENTRY * (MODELS_MAX + 1), f"models: expected array of length <= {MODELS_MAX}; see docs/mig.md"),
        (ENTRY * 2, "models[1].name = 'deep': names a model twice; give each its own"),
    ],
)
def test_a_wrong_plan_file_is_one_line_with_key_value_and_remedy(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(SettingError) as caught:
        read_models(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert len(str(caught.value).splitlines()) == 1
