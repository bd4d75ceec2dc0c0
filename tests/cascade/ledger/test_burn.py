"""Burn rates from a journal: what each window has, what the rule makes of it, and that Prometheus' rules agree."""

from __future__ import annotations

import io
import json
import re
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from cascade.cli import main
from cascade.ledger import Account, Journal, Ledger, LedgerSummary, ServiceLevel, merged_between, read_journal
from cascade.ledger import Path as DecisionPath
from cascade.ledger.burn import ALARMS, WINDOWS_S, ObjectiveBurn, burn_rates
from cascade.ledger.render import render
from tests.cascade.ledger.test_account import NOON

RULES = Path(__file__).parents[3] / "k8s" / "prometheus" / "cascade-rules.yaml"
GOOD_S, BAD_S = 0.001, 0.1
MINUTE = timedelta(minutes=1)


class Kept:
    """A journal with a line a minute, in which `late` of 1,000 decisions a minute took too long."""

    def __init__(self, directory: Path, path: DecisionPath = "screened", **level: float) -> None:
        self._ledger = Ledger(service_level=ServiceLevel(**level))  # type: ignore[arg-type]
        self._path: DecisionPath = path
        self.minutes = 0
        self.journal = Journal(directory, self.account, 10**9, 100)

    def account(self) -> Account:
        return msgspec.structs.replace(self._ledger.account(), started=NOON, ended=NOON + self.minutes * MINUTE)

    def run(self, minutes: int, late: int, every: int = 1) -> Kept:
        for _ in range(minutes // every):
            self.minutes += every
            self._ledger.record_decisions(self._path, np.full((1_000 - late) * every, GOOD_S))
            self._ledger.record_decisions(self._path, np.full(late * every, BAD_S))
            self.journal.write()
        return self


def screened(directory: Path, end_minute: int | None = None) -> ObjectiveBurn:
    end = None if end_minute is None else NOON + end_minute * MINUTE
    return next(one for one in burn_rates(read_journal([directory]), end=end) if one.name == "p99 of screened")


def rates(burn: ObjectiveBurn) -> dict[str, float]:
    return {one.window: pytest.approx(one.rate, rel=1e-9) for one in burn.rates}


def test_each_window_burns_by_what_happened_in_it(tmp_path: Path) -> None:
    Kept(tmp_path).run(330, 5).run(25, 20).run(5, 100)
    burn = screened(tmp_path)
    # late of 1,000 over a budget of 1 %
    assert rates(burn) == {
        "5m": 10.0, "30m": (25 * 2 + 5 * 10) / 30, "1h": (30 * 0.5 + 25 * 2 + 5 * 10) / 60,
        "6h": (330 * 0.5 + 25 * 2 + 5 * 10) / 360, "3d": (330 * 0.5 + 25 * 2 + 5 * 10) / 360,
    }  # fmt: skip
    assert burn.events == 360_000
    assert burn.budget_left == pytest.approx(1 - (330 * 0.5 + 25 * 2 + 5 * 10) / 360)


def test_a_window_says_how_much_of_it_the_journal_has(tmp_path: Path) -> None:
    Kept(tmp_path).run(90, 0, every=20)
    covered_s = {one.window: one.covered_s for one in screened(tmp_path).rates}
    # lines at 20, 40, 60 and 80 minutes: a window begins with the last line before it
    assert covered_s == {"5m": 1_200.0, "30m": 2_400.0, "1h": 3_600.0, "6h": 4_800.0, "3d": 4_800.0}


@pytest.mark.parametrize(
    ("phases", "status"),
    [
        ([(360, 9)], "within"),
        ([(360, 11)], "ticket"),
        ([(300, 0), (60, 150)], "page"),  # 15 × over the hour and five minutes
        ([(300, 0), (50, 150), (10, 0)], "ticket"),  # the fast alarm is over
        ([(360, 65)], "page"),  # 6.5 × for six hours
        ([(320, 70), (40, 0)], "ticket"),
    ],
)
def test_the_status_follows_the_rule_of_two_windows(tmp_path: Path, phases: list[tuple[int, int]], status: str) -> None:
    kept = Kept(tmp_path)
    for minutes, late in phases:
        kept.run(minutes, late)
    assert screened(tmp_path).status == status


def test_windows_end_where_the_span_does_and_begin_no_earlier(tmp_path: Path) -> None:
    Kept(tmp_path).run(60, 100).run(60, 0)
    assert screened(tmp_path).rates[0].rate == 0.0
    assert screened(tmp_path, end_minute=60).rates[0].rate == pytest.approx(10.0)
    lives = read_journal([tmp_path])
    (cut, *_) = burn_rates(lives, start=NOON + 60 * MINUTE)
    assert (cut.events, cut.breaches, {one.rate for one in cut.rates}) == (60_000, 0, {0.0})
    assert burn_rates(lives, start=NOON + 200 * MINUTE) == ()


def test_services_and_restarts_burn_one_budget(tmp_path: Path) -> None:
    for name, late in (("a", 0), ("b", 40)):
        Kept(tmp_path / name).run(60, late)
    (burn, *_) = burn_rates(read_journal([tmp_path / "a", tmp_path / "b"]))
    assert rates(burn)["1h"] == 2.0


def test_no_events_is_no_data_and_no_budget_is_no_rate(tmp_path: Path) -> None:
    Kept(tmp_path / "idle", path="escalated").run(10, 0)
    assert screened(tmp_path / "idle").status == "no data"
    assert screened(tmp_path / "idle").budget_left is None
    kept = Kept(tmp_path / "none", degraded_share_max=0.0).run(10, 0)
    degraded = burn_rates(read_journal([tmp_path / "none"]))[-1]
    assert (degraded.name, degraded.status, degraded.budget_left) == ("degraded share", "within", None)
    kept._ledger.record_decisions("degraded", np.full(1, BAD_S), cause="error")
    kept.run(1, 0)
    assert burn_rates(read_journal([tmp_path / "none"]))[-1].status == "page"


def test_merge_tells_them_in_its_table_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Kept(tmp_path).run(20, 100)
    assert main(["ledger", "merge", str(tmp_path), "--json"]) == 0
    summary = LedgerSummary.from_json_line(capsys.readouterr().out.encode())
    assert summary.burn == burn_rates(read_journal([tmp_path]))
    assert json.loads(summary.to_json_line())["burn"][0]["status"] == "page"
    out = io.StringIO()
    render(summary, Console(file=out, width=80))
    (row,) = [line.split() for line in out.getvalue().splitlines() if "p99 of screened" in line and "page" in line]
    assert [round(float(cell), 6) for cell in row[3:-1]] == [-900, 10, 10, 10, 10, 10]
    assert "the journal reaches back less far: 30m 20 min 00 s" in " ".join(out.getvalue().split())


def test_a_ledger_without_a_journal_tells_none() -> None:
    assert Ledger().summary().burn == ()


def test_prometheus_rules_have_the_same_windows_factors_and_severities() -> None:
    text = RULES.read_text()
    recorded = dict(re.findall(r"record: cascade:objective_burn:rate(\w+)\n\s+expr: >-\n(.*\n.*\n.*\n)", text))
    assert set(recorded) == set(WINDOWS_S)
    for window, expression in recorded.items():
        assert re.findall(r"\[(\w+)\]", expression) == [window, window]
    burn = r"cascade:objective_burn:rate(\w+) > ([\d.]+)"
    alerts = re.findall(rf"expr: {burn} and {burn}\n\s+labels: {{severity: (\w+)}}", text)
    assert [(severity, long, short, float(factor)) for long, factor, short, _, severity in alerts] == [
        (one.severity, one.long, one.short, one.factor) for one in ALARMS
    ]
    assert all(one[1] == one[3] for one in alerts)


def test_an_empty_span_has_no_account(tmp_path: Path) -> None:
    Kept(tmp_path).run(1, 0)
    assert merged_between(read_journal([tmp_path]), NOON + 2 * MINUTE) is None
