"""What labels say of the certificate, in the ledger: added up, written, merged, printed and exported."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import StringIO

import msgspec
import pytest
from prometheus_client import generate_latest
from rich.console import Console

from cascade.evidence import alarm_nats, evidence_nats
from cascade.ledger import (
    Account,
    CertifiedRecall,
    Ledger,
    LedgerSummary,
    ledger_registry,
    merge_accounts,
    render,
    summarise,
)
from cascade.ledger.summary import WatchFigures

CERTIFIED = CertifiedRecall(at_least=0.6, alarm_level=0.01, expires=datetime(2100, 1, 1, tzinfo=UTC))


def counted(caught: int, missed: int, certified: CertifiedRecall | None = CERTIFIED) -> Ledger:
    ledger = Ledger(certified=certified)
    ledger.count_first_frauds(caught, 0)
    ledger.count_first_frauds(0, missed)
    return ledger


def watch_of(account: Account) -> WatchFigures | None:
    summary = summarise(account)
    assert LedgerSummary.from_json_line(summary.to_json_line()).watch == summary.watch
    return summary.watch


def printed(summary: LedgerSummary) -> str:
    output = StringIO()
    render(summary, Console(file=output, width=80))
    return output.getvalue()


def test_the_certificate_holds_as_long_as_there_is_no_evidence() -> None:
    account = counted(65, 35).account()
    assert Account.from_json(account.to_json()).certified == account.certified == CERTIFIED
    watch = watch_of(account)
    assert watch is not None
    assert (watch.first_frauds, watch.caught, watch.holds) == (100, 65, True)
    assert watch.evidence_nats == evidence_nats(65, 35, 0.6)
    assert "certificate holds: 65 of 100 first frauds caught, at least 60" in printed(counted(65, 35).summary())


def test_the_counts_of_workers_add_up_to_an_alarm_that_no_worker_has_alone() -> None:
    accounts = [counted(22, 28).account() for _ in range(4)]
    assert all(watch.holds for account in accounts if (watch := watch_of(account)))
    merged = watch_of(merge_accounts(accounts))
    assert merged is not None
    assert (merged.first_frauds, merged.caught) == (200, 88)
    assert not merged.holds
    assert "certificate no longer holds: 88 of 200" in printed(counted(88, 112).summary())


def test_accounts_of_different_certificates_have_none_together() -> None:
    other = msgspec.structs.replace(CERTIFIED, at_least=0.5)
    assert watch_of(merge_accounts([counted(1, 1).account(), counted(1, 1, other).account()])) is None
    assert watch_of(counted(0, 0, None).account()) is None
    assert "certificate" not in printed(counted(0, 0, None).summary())


def test_the_counts_between_two_accounts_are_those_of_the_time_between() -> None:
    ledger = counted(5, 5)
    before = ledger.account()
    ledger.count_first_frauds(3, 1)
    watch = watch_of(ledger.account().since(before))
    assert watch is not None
    assert (watch.caught, watch.first_frauds) == (3, 4)


def test_an_expired_certificate_is_printed_as_such() -> None:
    expired = msgspec.structs.replace(CERTIFIED, expires=datetime.now(UTC) - timedelta(seconds=1))
    assert "certificate has expired: 1 of 2" in printed(counted(1, 1, expired).summary())


def test_prometheus_gets_the_terms_of_the_alarm() -> None:
    text = generate_latest(ledger_registry(counted(22, 28))).decode()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found['cascade_first_frauds_total{caught="yes"}']) == 22
    assert float(found['cascade_first_frauds_total{caught="no"}']) == 28
    assert float(found["cascade_certificate_recall_ratio"]) == 0.6
    assert float(found["cascade_certificate_evidence_nats"]) == pytest.approx(evidence_nats(22, 28, 0.6))
    assert float(found["cascade_certificate_alarm_nats"]) == pytest.approx(alarm_nats(0.01))
    assert float(found["cascade_certificate_expires_seconds"]) == CERTIFIED.expires.timestamp()
    assert "certificate" not in generate_latest(ledger_registry(counted(0, 0, None))).decode()
