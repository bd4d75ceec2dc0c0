"""Burn rates from a journal: the windows, the alarms, and that the rules of Prometheus are the same."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import pytest

from cascade.cli import main
from cascade.ledger import Account, Ledger, LedgerSummary, Run, ServiceLevel, merged_between, read_journal
from cascade.ledger import Path as DecisionPath
from cascade.ledger.burn import ALARMS, WINDOWS_S, ObjectiveBurn, burn_rates
from cascade.ledger.journal import SUFFIX
from tests.cascade.ledger.helpers import NOON, rendered

RULES = Path(__file__).parents[3] / "k8s" / "prometheus" / "cascade-rules.yaml"
GOOD_S, BAD_S = 0.001, 0.1
MINUTE = timedelta(minutes=1)


class Service:
    """A service of 1,000 decisions per minute that writes a journal line each minute, and its journal in memory."""

    def __init__(self, path: DecisionPath = "screened", **level: float) -> None:
        self.ledger = Ledger(service_level=ServiceLevel(**level))  # type: ignore[arg-type]
        self._path: DecisionPath = path
        self._minutes = 0
        self.accounts: list[Account] = []

    def work(self, minutes: int, late: int, every: int = 1) -> Self:
        """Works for some minutes, with `late` late decisions in each, and a line `every` minutes."""
        for _ in range(minutes // every):
            self._minutes += every
            self.ledger.record_decisions(self._path, np.full((1_000 - late) * every, GOOD_S))
            self.ledger.record_decisions(self._path, np.full(late * every, BAD_S))
            ended = NOON + self._minutes * MINUTE
            self.accounts.append(msgspec.structs.replace(self.ledger.account(), started=NOON, ended=ended))
        return self

    @property
    def journal(self) -> list[Run]:
        return [Run("run", self.accounts, torn=0)]


def screened(service: Service, end_minute: int | None = None) -> ObjectiveBurn:
    end = None if end_minute is None else NOON + end_minute * MINUTE
    return next(burn for burn in burn_rates(service.journal, end=end) if burn.name == "p99 of screened")


def rates(burn: ObjectiveBurn) -> dict[str, float | None]:
    return {rate.window: rate.rate for rate in burn.rates}


def test_the_rate_of_a_window_comes_from_the_events_in_it() -> None:
    burn = screened(Service().work(330, 5).work(25, 20).work(5, 100))
    # late decisions of 1,000, over a budget of 1 %
    whole = (330 * 0.5 + 25 * 2 + 5 * 10) / 360
    short = {"5m": 10.0, "30m": (25 * 2 + 5 * 10) / 30, "1h": (30 * 0.5 + 25 * 2 + 5 * 10) / 60}
    assert rates(burn) == pytest.approx(short | {"6h": whole, "3d": whole}, rel=1e-9)
    assert burn.events == 360_000
    assert burn.budget_left == pytest.approx(1 - whole)


def test_a_window_has_the_seconds_that_the_journal_covers() -> None:
    covered_s = {rate.window: rate.covered_s for rate in screened(Service().work(90, 0, every=20)).rates}
    # with lines at 20, 40, 60 and 80 minutes, a window begins at the last line before it
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
def test_an_alarm_needs_both_of_its_windows(phases: list[tuple[int, int]], status: str) -> None:
    service = Service()
    for minutes, late in phases:
        service.work(minutes, late)
    assert screened(service).status == status


def test_windows_end_with_the_period_and_do_not_begin_before_it() -> None:
    service = Service().work(60, 100).work(60, 0)
    assert screened(service).rates[0].rate == 0.0
    assert screened(service, end_minute=60).rates[0].rate == pytest.approx(10.0)
    (cut, *_) = burn_rates(service.journal, start=NOON + 60 * MINUTE)
    assert (cut.events, cut.breaches, {rate.rate for rate in cut.rates}) == (60_000, 0, {0.0})
    assert merged_between(service.journal, NOON + 200 * MINUTE) is None
    assert burn_rates(service.journal, start=NOON + 200 * MINUTE) == Ledger().summary().burn == ()


def test_several_runs_burn_the_same_budget() -> None:
    (burn, *_) = burn_rates([*Service().work(60, 0).journal, *Service().work(60, 40).journal])
    assert rates(burn)["1h"] == pytest.approx(2.0, rel=1e-9)


def test_without_events_there_is_no_data_and_without_a_budget_no_rate() -> None:
    idle = screened(Service(path="escalated").work(10, 0))
    assert (idle.status, idle.budget_left) == ("no data", None)
    service = Service(degraded_share_max=0.0).work(10, 0)
    degraded = burn_rates(service.journal)[-1]
    assert (degraded.name, degraded.status, degraded.budget_left) == ("degraded share", "within", None)
    service.ledger.record_decisions("degraded", np.full(1, BAD_S), cause="error")
    service.work(1, 0)
    assert burn_rates(service.journal)[-1].status == "page"


def test_merge_has_the_burn_rates_in_its_table_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [account.to_json() + b"\n" for account in Service().work(20, 100).accounts]
    (tmp_path / f"run-000000{SUFFIX}").write_bytes(b"".join(lines))
    assert main(["ledger", "merge", str(tmp_path), "--json"]) == 0
    summary = LedgerSummary.from_json_line(capsys.readouterr().out.encode())
    assert summary.burn == burn_rates(read_journal([tmp_path]))
    assert json.loads(summary.to_json_line())["burn"][0]["status"] == "page"
    text = rendered(summary, width=80)
    (row,) = [line.split() for line in text.splitlines() if "p99 of screened" in line and "page" in line]
    assert [round(float(cell), 6) for cell in row[3:-1]] == [-900, 10, 10, 10, 10, 10]
    assert "the journal covers only 20 min 00 s of 30m" in " ".join(text.split())


def test_prometheus_rules_have_the_same_windows_factors_and_severities() -> None:
    text = RULES.read_text()
    recorded = dict(re.findall(r"record: cascade:objective_burn:rate(\w+)\n\s+expr: >-\n(.*\n.*\n.*\n)", text))
    assert set(recorded) == set(WINDOWS_S)
    for window, expression in recorded.items():
        assert re.findall(r"\[(\w+)\]", expression) == [window, window]
    burn = r"cascade:objective_burn:rate(\w+) > ([\d.]+)"
    alerts = re.findall(rf"expr: {burn} and {burn}\n\s+labels: {{severity: (\w+)}}", text)
    assert [(severity, long, short, float(factor)) for long, factor, short, _, severity in alerts] == [
        (alarm.severity, alarm.long, alarm.short, alarm.factor) for alarm in ALARMS
    ]
    assert all(factor == other for _, factor, _, other, _ in alerts)
