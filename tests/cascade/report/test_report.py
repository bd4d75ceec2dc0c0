"""The report: it loads nothing, has the figures of the ledger, never mixes kinds of energy, and has two languages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cascade.cli import main
from cascade.ledger import Account, Ledger, merged_between, read_journal, summarise
from cascade.ledger import Path as DecisionPath
from cascade.ledger.account import MeterState
from cascade.ledger.attribution import DEEP, IDLE, RESIDUAL, UNDIVIDED, WASTED, WORKER_REST
from cascade.ledger.carbon import intensity_table
from cascade.ledger.journal import SUFFIX
from cascade.ledger.render import number_text
from cascade.report.business import Assumptions, energy_text, mass_text, swings, year
from cascade.report.figures import POINTS_MAX, gather
from cascade.report.words import LANGUAGES, words
from tests.cascade.ledger.helpers import NOON
from tests.cascade.ledger.test_account import some_work

CHROMIUM = shutil.which("chromium")
CARBON = ("Germany, average of 2023: 381 g/kWh; PUE 1.54", "embodied: 0.74 g an hour")


def _meters(minute: int, gpu: bool) -> tuple[MeterState, ...]:
    worker = MeterState("cpu-worker", "modelled", ("CPU s",), 30.0 * minute, None, carbon_g=0.005 * minute)
    if not gpu:
        return (worker,)
    checked = {"carbon_g": 0.1 * minute, "uncertainty": 0.05, "check_j": 594.0 * minute}
    return (worker, MeterState("gpu0", "measured", ("NVML",), 600.0 * minute, None, **checked))


def _journal(directory: Path, minutes: int = 6, gpu: bool = False) -> list[Account]:
    directory.mkdir()
    ledger = Ledger(watts_per_core=7.0, bundle_version="b-<1>", screener="quickscorer")
    settings = {"carbon_bases": CARBON, "gpu_idle_watts": 5.0 if gpu else None}
    accounts = []
    for minute in range(1, minutes + 1):
        some_work(minute)(ledger)
        times = {"started": NOON, "ended": NOON + timedelta(minutes=minute), "embodied_g": 0.01 * minute}
        meters = _meters(minute, gpu)
        accounts.append(msgspec.structs.replace(ledger.account(), meters=meters, **times, **settings))
    _write(directory, accounts)
    return accounts


def _write(directory: Path, accounts: list[Account]) -> None:
    text = b"".join(account.to_json() + b"\n" for account in accounts)
    (directory / f"20261125T120000-0a0b0c0d-000000{SUFFIX}").write_bytes(text)


class _Text(HTMLParser):
    """The text that a reader sees, and the addresses that a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.fetched, self._hidden = "", list[str](), 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("style", "svg")
        self.text += " "
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.fetched.append(value)
        assert tag not in ("script", "link", "iframe", "img", "object")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "svg")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


def _page(tmp_path: Path, *options: str, gpu: bool = False) -> str:
    if not (tmp_path / "journal").exists():
        _journal(tmp_path / "journal", gpu=gpu)
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "journal"), "--out", str(out), *options]) == 0
    return out.read_text("utf-8")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_loads_nothing_and_has_the_figures_of_the_ledger(tmp_path: Path, language: str) -> None:
    page = _page(tmp_path, "--lang", language)
    seen = _Text(page)
    assert seen.fetched == []
    assert f"<html lang={language}>" in page
    assert page.count("<svg") == 7
    account = merged_between(read_journal([tmp_path / "journal"]))
    assert account is not None
    summary = summarise(account)
    (total,) = summary.energy_totals
    assert total.per_transaction_mj is not None
    assert f"{summary.transactions:,}" in seen.text
    assert number_text(1e3 * total.per_transaction_mj) in seen.text
    for path in ("screened", "escalated", "degraded"):
        latency = summary.paths[path].latency
        assert latency is not None
        assert number_text(latency.p99_ms) in seen.text
        assert words(language)(f"path_{path}") in seen.text
    assert summary.carbon is not None
    assert number_text(summary.carbon.sci_g_per_million) in seen.text
    # the name of a bundle is text, not HTML
    assert "b-<1>" in seen.text
    assert "b-<1>" not in page


def test_both_languages_have_the_same_texts_with_the_same_values() -> None:
    texts = [words(language)._texts for language in LANGUAGES]
    assert texts[0].keys() == texts[1].keys()
    assert {f"line_{line}" for line in (DEEP, IDLE, RESIDUAL, UNDIVIDED, WASTED, WORKER_REST)} <= texts[0].keys()
    for name, text in texts[0].items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", texts[1][name])), name


def test_measured_and_modelled_joules_are_separate_and_marked(tmp_path: Path) -> None:
    page = _page(tmp_path, gpu=True)
    account = merged_between(read_journal([tmp_path / "journal"]))
    assert account is not None
    decisions = account.counters.decisions
    text = _Text(page).text
    assert number_text(1e6 * 180.0 / decisions) in text
    assert number_text(1e6 * 3_600.0 / decisions) in text
    assert number_text(1e6 * 3_780.0 / decisions) not in text
    assert 'class="kind measured"' in page
    assert "-1.00%" in text  # the counter checked by integrated power
    assert page.count("<svg") == 9  # a pair of sensitivity plots for each kind


def test_the_yearly_figures_follow_their_formulas() -> None:
    assumptions = Assumptions(volume=2e9, price=0.25, pue=1.5, region="DEU")
    found = year("modelled", 3.6, assumptions)
    assert found.kwh == pytest.approx(3_000.0)
    assert found.money == pytest.approx(750.0)
    assert found.t_co2e == pytest.approx(3_000.0 * intensity_table()["DEU"][2] / 1e6)
    money, tonnes = swings(found, assumptions)
    assert {swing.input for swing in money} == {"energy", "volume", "pue", "price"}
    assert {swing.input for swing in tonnes} == {"energy", "volume", "pue", "intensity"}
    by_input = {swing.input: swing for swing in money}
    assert (by_input["price"].low, by_input["price"].high) == pytest.approx((375.0, 1_500.0))
    assert by_input["pue"].high == pytest.approx(1_000.0)
    widths = [swing.high - swing.low for swing in money]
    assert widths == sorted(widths, reverse=True)
    measured, _ = swings(year("measured", 3.6, assumptions), assumptions)
    assert next(swing for swing in measured if swing.input == "energy").high == pytest.approx(750.0 * 1.05)


def test_numbers_have_three_significant_digits_and_units_of_suitable_size() -> None:
    shown = [number_text(value) for value in (0.012345, 1.2345, 9.996, 99.96, 12_345)]
    assert shown == ["0.0123", "1.23", "10.0", "100", "12,345"]
    assert [mass_text(value) for value in (12.3, 0.0123, 1.23e-5)] == ["12.3 t", "12.3 kg", "12.3 g"]
    assert [energy_text(value) for value in (1.5e4, 15.0, 0.015)] == ["15.0 MWh", "15.0 kWh", "15.0 Wh"]


def test_points_over_time_are_bounded_and_cover_everything(tmp_path: Path) -> None:
    accounts = _journal(tmp_path / "journal", minutes=150)
    figures = gather(read_journal([tmp_path / "journal"]), None, None)
    assert 40 < len(figures.points) <= POINTS_MAX
    assert sum(point.summary.transactions for point in figures.points) == accounts[-1].counters.decisions
    left = [point.budget_left["degraded share"] for point in figures.points]
    final = figures.events[-1]
    assert left[-1] == pytest.approx(1.0 - final.breaches / (final.events * final.budget))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lang", "de"], "--lang"),
        (["--region", "XYZ"], "--region"),
        (["--volume", "0"], "volume"),
        (["--pue", "0.5"], "pue"),
        (["--from", "yesterday"], "--from"),
        (["--from", "2031-01-01"], "no account"),
        (["--out", "/nowhere/report.html"], "cannot be written"),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    _journal(tmp_path / "journal", minutes=1)
    assert main(["report", str(tmp_path / "journal"), "--out", str(tmp_path / "r.html"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("path", "minutes", "lines", "options"),
    [
        (None, 0, 1, []),
        (None, 1, 1, ["--lang", "ja"]),
        ("screened", 1, 3, ["--price", "0"]),
        ("duplicate", 80, 2, []),
        ("escalated", 2_000, 2, []),
    ],
)
def test_no_journal_makes_matplotlib_warn(
    tmp_path: Path, path: DecisionPath | None, minutes: int, lines: int, options: list[str]
) -> None:
    ledger = Ledger()
    accounts = []
    for line in range(1, lines + 1):
        if path is not None:
            ledger.record_decisions(path, np.full(10, 0.001))
        times = {"started": NOON, "ended": NOON + line * timedelta(minutes=minutes)}
        meters = (MeterState("cpu-worker", "modelled", ("CPU s",), 30.0 * line, None),)
        accounts.append(msgspec.structs.replace(ledger.account(), meters=meters, **times))
    (tmp_path / "journal").mkdir()
    _write(tmp_path / "journal", accounts)
    assert "<svg" in _page(tmp_path, *options)


def test_the_command_prints_one_line_where_matplotlib_can_write_no_cache(tmp_path: Path) -> None:
    _journal(tmp_path / "journal", minutes=1)
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "cascade", "report", str(tmp_path / "journal"), "--out", str(tmp_path / "r.html")]
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "file" / "below")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("language", ["en", pytest.param("ja", marks=pytest.mark.long)])
def test_a_browser_draws_and_prints_the_page(tmp_path: Path, language: str) -> None:
    _page(tmp_path, "--lang", language, gpu=True)
    browser = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*browser, "--dump-dom", f"--print-to-pdf={tmp_path / 'r.pdf'}", (tmp_path / "report.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawn.count("<svg") == 9
    pdf = (tmp_path / "r.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
