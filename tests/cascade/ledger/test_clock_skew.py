"""The least wait: its bound on the clock offset, its ten minutes, and its place in accounts, metrics and tables."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest

from cascade.ledger import Account, Ledger, ledger_registry, merge_accounts, summarise
from cascade.ledger.clock_skew import WINDOW_S, WINDOWS, LeastWait
from cascade.ledger.counters import Counters
from tests.cascade.ledger.helpers import ManualClock, rendered


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def ledger(clock: ManualClock) -> Ledger:
    return Ledger(clock=clock)


def test_the_least_wait_is_the_offset_plus_the_least_delay(clock: ManualClock) -> None:
    rng = np.random.default_rng(1)
    for offset_s in (-0.040, 0.0, 0.250):
        waits, delays_s = LeastWait(clock), rng.exponential(0.005, 1_000)
        for delay_s in delays_s.tolist():
            waits.record(delay_s + offset_s)
            clock.now_s += 0.5
        assert waits.least_s == pytest.approx(offset_s + float(delays_s.min()))
        assert waits.least_s is not None
        assert offset_s <= waits.least_s < offset_s + 0.001


def test_the_bound_forgets_a_wait_after_ten_minutes(clock: ManualClock) -> None:
    waits, clock.now_s = LeastWait(clock), 0.0
    waits.record(-5.0)
    for _ in range(1, WINDOWS):
        clock.now_s += WINDOW_S
        waits.record(0.002)
        assert waits.least_s == -5.0
    clock.now_s += WINDOW_S
    waits.record(0.002)
    assert waits.least_s == 0.002
    clock.now_s += WINDOWS * WINDOW_S
    assert waits.least_s is None


def test_the_memory_of_the_least_wait_is_bounded(clock: ManualClock) -> None:
    waits = LeastWait(clock)
    for _ in range(10_000):
        clock.now_s += WINDOW_S
        waits.record(0.001)
    assert len(waits._windows) == WINDOWS


def test_merged_workers_have_the_lowest_and_the_highest_wait_and_the_sum_of_early_records() -> None:
    accounts = []
    for wait_s, early in ((-0.003, 7), (0.004, 0), (None, 0)):
        ledger = Ledger()
        if wait_s is not None:
            ledger.record_arrival(wait_s, early)
        accounts.append(ledger.account())
    clock = summarise(merge_accounts(accounts)).clock
    assert clock is not None
    assert (clock.least_wait_ms, clock.least_wait_ms_highest, clock.early_records) == (-3.0, 4.0, 7)


def test_a_difference_of_accounts_has_the_wait_at_its_end_and_its_own_early_records(
    ledger: Ledger, clock: ManualClock
) -> None:
    ledger.record_arrival(-0.010, 3)
    before = ledger.account()
    clock.now_s += WINDOWS * WINDOW_S
    ledger.record_arrival(0.002, 0)
    ledger.record_arrival(-0.001, 1)
    part = ledger.account().since(before).counters
    assert (part.early_records, part.least_wait_s) == (1, (-0.001, -0.001))


def test_the_wait_survives_writing_and_is_absent_in_lines_of_earlier_releases(ledger: Ledger) -> None:
    ledger.record_arrival(-0.010, 3)
    line = ledger.account().to_json()
    assert Account.from_json(line).counters.least_wait_s == (-0.010, -0.010)
    earlier = msgspec.json.decode(line)
    for name in ("early_records", "least_wait_s"):
        del earlier["counters"][name]
    counters = Account.from_json(msgspec.json.encode(earlier)).counters
    assert (counters.early_records, counters.least_wait_s) == (0, None)
    counters.merge(Counters.empty())
    assert counters.least_wait_s is None


def metrics(ledger: Ledger) -> str:
    return generate_latest(ledger_registry(ledger)).decode()


def test_the_bound_is_absent_before_the_first_record(ledger: Ledger) -> None:
    assert ledger.summary().clock is None
    assert "\ncascade_clock_skew_bound_seconds " not in metrics(ledger)
    ledger.record_arrival(-0.25, 2)
    assert "\ncascade_clock_skew_bound_seconds -0.25\n" in metrics(ledger)
    assert "\ncascade_early_records_total 2.0\n" in metrics(ledger)


@pytest.mark.parametrize(
    ("wait_s", "early", "text"),
    [
        (0.0009, 0, None),
        (-0.0009, 0, None),
        (0.0042, 0, "ahead by at most 4.20 ms"),
        (-0.030, 5, "behind by at least 30.0 ms, 5 records with a stamp ahead of it"),
    ],
)
def test_the_table_has_the_bound_if_it_exceeds_a_millisecond(
    ledger: Ledger, wait_s: float, early: int, text: str | None
) -> None:
    ledger.record_decisions("screened", np.full(5, 0.001))
    ledger.record_arrival(wait_s, early)
    shown = " ".join(rendered(ledger.summary(), width=200).split())
    assert ("the worker's clock" in shown) == (text is not None)
    assert text is None or f"the worker's clock against the stamps of records: {text}" in shown
