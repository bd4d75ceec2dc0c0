"""Accounts: those of several ledgers, merged, equal the account of a single ledger with all the work."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import pytest

from cascade.errors import DataError
from cascade.ledger import Account, Ledger, LedgerSummary, ServiceLevel, StageLaps, merge_accounts, summarise
from cascade.ledger.account import SOURCES_MAX, MeterState
from cascade.protocols import EnergyReading
from tests.cascade.ledger.helpers import NOON, rendered

Work = Callable[[Ledger], None]


def dyadic(rng: np.random.Generator, count: int) -> np.ndarray:
    """Durations whose sums are exact in float64, so that tests can compare for equality."""
    return rng.integers(1, 1 << 16, count) / 2.0**20


def some_work(seed: int) -> Work:
    def work(ledger: Ledger) -> None:
        rng = np.random.default_rng(seed)
        ledger.record_stage("features", float(dyadic(rng, 1)[0]), float(dyadic(rng, 1)[0]), 100)
        ledger.record_batch(StageLaps(), dyadic(rng, 50))
        ledger.record_decisions("screened", dyadic(rng, 100 * (seed + 1)))
        ledger.record_decisions("escalated", dyadic(rng, 10))
        ledger.record_decisions("degraded", dyadic(rng, 3), cause=("deadline", "error")[seed % 2])
        ledger.record_decisions("duplicate", dyadic(rng, seed))
        ledger.count_dead_letters(("syntax", "type")[seed % 2], 2 + seed)
        ledger.count_labels(seed)
        ledger.count_late(1)
        ledger.record_recovery(float(dyadic(rng, 1)[0]))
        ledger.count_session()
        ledger.count_offset_gap()
        ledger.add_deep_call(7, float(dyadic(rng, 1)[0]))
        ledger.set_budget_factor(0.5**seed)
        ledger.set_state_covered(1.0 - seed / 8)

    return work


def account_of(*works: Work, started_s: float = 0.0, ended_s: float = 60.0, **settings: Any) -> Account:
    ledger = Ledger(watts_per_core=8.0, bundle_version="b-1", screener="walk", **settings)
    for work in works:
        work(ledger)
    return msgspec.structs.replace(
        ledger.account(), started=NOON + timedelta(seconds=started_s), ended=NOON + timedelta(seconds=ended_s)
    )


def test_merged_accounts_equal_the_account_of_a_single_ledger_with_all_the_work() -> None:
    parts = [account_of(some_work(seed)) for seed in range(4)]
    whole = account_of(*(some_work(seed) for seed in range(4)))
    merged = merge_accounts(parts)
    assert merged.to_json() == whole.to_json()
    assert summarise(merged) == summarise(whole)
    assert summarise(merged).transactions == sum(summarise(part).transactions for part in parts) == 1_058
    found = merged.counters
    assert (found.deep_rows, found.labels, found.late_answers, found.sessions, found.offset_gaps) == (28, 6, 4, 4, 4)
    hedged = account_of(lambda ledger: ledger.set_hedged(3))
    assert merge_accounts([hedged, hedged]).counters.hedged_calls == 6


def test_merging_is_associative_and_independent_of_the_order() -> None:
    parts = [
        account_of(some_work(seed), started_s=10.0 * seed, meters=[Meter(f"counter {seed}", float(seed))])
        for seed in range(3)
    ]
    first, second, third = parts
    left = merge_accounts([merge_accounts([first, second]), third]).to_json()
    assert left == merge_accounts([first, merge_accounts([second, third])]).to_json()
    by_counts = {json_with_sorted_counts(merge_accounts(order)) for order in itertools.permutations(parts)}
    assert len(by_counts) == 1


def json_with_sorted_counts(account: Account) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(account.to_json()), order="deterministic")


def test_merging_does_not_change_its_arguments() -> None:
    first, second = account_of(some_work(1)), account_of(some_work(2))
    before = first.to_json()
    merge_accounts([first, second])
    assert first.to_json() == before


def test_the_time_and_the_rate_of_a_merged_account_cover_all_ledgers() -> None:
    summary = summarise(
        merge_accounts([account_of(some_work(0), ended_s=60), account_of(some_work(0), started_s=50, ended_s=100)])
    )
    assert (summary.elapsed_s, summary.transactions) == (100.0, 226)
    assert summary.per_second == pytest.approx(2.26)


def test_an_account_survives_writing_and_reading() -> None:
    account = account_of(some_work(3), meters=[Meter("counter", 5.0)])
    assert Account.from_json(account.to_json()).to_json() == account.to_json()
    assert summarise(Account.from_json(account.to_json())) == summarise(account)


@pytest.mark.parametrize(
    "spoil", [lambda line: line[:-1], lambda _: b"{}", lambda line: line.replace(b":1,", b":9,", 1)]
)
def test_anything_but_an_account_is_an_error_of_one_line(spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(DataError, match="ledger account") as caught:
        Account.from_json(spoil(account_of(some_work(1)).to_json()))
    assert "\n" not in str(caught.value)


def test_accounts_with_different_service_levels_are_not_merged() -> None:
    other = account_of(some_work(1), service_level=ServiceLevel(degraded_share_max=0.5))
    with pytest.raises(DataError, match="service levels or stated watts differ"):
        merge_accounts([account_of(some_work(1)), other])
    with pytest.raises(DataError, match="none to merge"):
        merge_accounts([])


class Meter:
    """A meter that starts at 0 and reads `energy_j` from its second reading on."""

    name = "cpu-model"

    def __init__(self, source: str, energy_j: float) -> None:
        self._source, self._energy_j, self._readings = source, energy_j, 0

    def read(self) -> EnergyReading:
        self._readings += 1
        return EnergyReading(self._energy_j if self._readings > 1 else 0.0, "modelled", self._source)


def test_joules_of_the_same_meter_add_up_and_their_sources_are_named() -> None:
    accounts = [
        account_of(some_work(0), meters=[Meter(f"worker {number}", joules)]) for number, joules in enumerate((2.0, 3.0))
    ]
    (figure,) = summarise(merge_accounts(accounts)).energy
    assert (figure.energy_j, figure.kind, figure.source) == (5.0, "modelled", "worker 0; worker 1")


def state(source: str, energy_j: float | None, problem: str | None = None) -> MeterState:
    return MeterState("cpu-model", "modelled", (source,), energy_j, problem)


def test_a_merged_meter_has_no_joules_if_one_of_its_meters_was_lost() -> None:
    merged = state("a", 1.0).merged(state("b", None, "gone"))
    assert (merged.energy_j, merged.problem, merged.meters) == (None, "gone", 2)
    first, second = (msgspec.structs.replace(state("a", 1.0), uncertainty=share) for share in (0.05, 0.02))
    assert first.merged(second).uncertainty == 0.05


def test_the_number_of_sources_of_a_merged_meter_is_bounded() -> None:
    merged = state("00", 1.0)
    for number in range(1, 20):
        merged = merged.merged(state(f"{number:02}", 1.0))
    assert merged.energy_j == 20.0
    assert merged.source == "; ".join(f"{number:02}" for number in range(SOURCES_MAX)) + "; and 16 more"


def test_the_table_has_the_numbers_of_workers_and_of_restarts() -> None:
    summary = msgspec.structs.replace(summarise(account_of(some_work(1))), processes=3, restarts=2)
    assert LedgerSummary.from_json_line(summary.to_json_line()) == summary
    assert "3 workers, 2 unexpected ends (each lost its last second)" in rendered(summary, width=160)
