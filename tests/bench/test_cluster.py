"""The check finds each kind of breach, and the rows of the steady load are new and in order in every round."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from bench.cluster import (
    Check,
    EndlessData,
    LoggedDecisions,
    LoggedTransactions,
    Watch,
    check,
    parse_decision_id,
    simulated,
)
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Array
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData

SENT = 8


def logged() -> LoggedTransactions:
    # two partitions of four transactions; three cards
    return LoggedTransactions(
        partition=np.repeat([0, 1], 4),
        offset=np.tile(np.arange(4), 2),
        transaction_id=np.array([0, 2, 4, 6, 1, 3, 5, 7]),
        card=np.array([10, 10, 20, 10, 30, 30, 30, 30]),
        appended_ms=np.zeros(8, np.int64),
    )


def decided(**changes: Array) -> LoggedDecisions:
    log = logged()
    none = np.zeros(8, bool)
    whole = LoggedDecisions(log.partition, log.offset, log.transaction_id, log.card, ~none, none, none)
    return replace(whole, **changes)


def rows(decisions: LoggedDecisions, index: list[int]) -> LoggedDecisions:
    return LoggedDecisions(*(getattr(decisions, field.name)[index] for field in fields(LoggedDecisions)))


def breaches(found: Check) -> dict[str, int]:
    """The counts that are not zero and should be."""
    names = ("lost", "twice", "repeats", "strays", "order_violations", "escalated_behind")
    return {name: getattr(found, name) for name in names if getattr(found, name)}


def test_one_decision_for_each_transaction_in_order_passes() -> None:
    found = check(logged(), decided(), SENT)
    assert breaches(found) == {}
    assert (found.transactions, found.decisions, found.escalated) == (8, 8, 0)


def test_a_transaction_without_a_decision_is_lost() -> None:
    assert breaches(check(logged(), rows(decided(), [0, 1, 3, 4, 5, 6, 7]), SENT)) == {"lost": 1}


def test_a_sent_transaction_that_is_not_in_the_log_is_lost_too() -> None:
    assert breaches(check(logged(), decided(), SENT + 2)) == {"lost": 2}


def test_a_second_and_a_third_decision_are_one_transaction_decided_twice() -> None:
    again = rows(decided(), [0, 1, 2, 3, 1, 1, 4, 5, 6, 7])
    assert breaches(check(logged(), again, SENT)) == {"twice": 1, "repeats": 2}


def test_a_decision_of_no_transaction_is_a_stray() -> None:
    offsets = decided().offset.copy()
    offsets[3] = 9
    assert breaches(check(logged(), decided(offset=offsets), SENT)) == {"strays": 1, "lost": 1}


def test_a_decision_with_another_transactions_id_is_a_stray() -> None:
    identities = decided().transaction_id.copy()
    identities[3] = 4
    assert breaches(check(logged(), decided(transaction_id=identities), SENT)) == {"strays": 1}


def test_screened_decisions_out_of_order_within_a_card_are_counted_but_not_between_cards() -> None:
    assert breaches(check(logged(), rows(decided(), [0, 3, 1, 2, 4, 5, 6, 7]), SENT)) == {"order_violations": 1}
    assert breaches(check(logged(), rows(decided(), [2, 0, 1, 3, 4, 5, 6, 7]), SENT)) == {}


def test_an_escalated_decision_may_come_after_later_ones_of_its_card() -> None:
    screened = decided().screened.copy()
    screened[1] = False
    late = rows(decided(screened=screened), [0, 3, 1, 2, 4, 5, 6, 7])
    found = check(logged(), late, SENT)
    assert breaches(found) == {"escalated_behind": 1}
    assert found.escalated == 1


def test_a_repeat_does_not_count_as_out_of_order() -> None:
    again = rows(decided(), [0, 1, 2, 3, 0, 1, 4, 5, 6, 7])
    assert breaches(check(logged(), again, SENT)) == {"twice": 2, "repeats": 2}


def test_a_decision_is_in_order_if_later_transactions_of_its_card_are_decided_again_after_it() -> None:
    # 0 was escalated, and its worker lost; 1 and 3 of its card were decided, but not committed
    later = rows(decided(), [1, 3, 0, 1, 3, 2, 4, 5, 6, 7])
    assert breaches(check(logged(), later, SENT)) == {"twice": 2, "repeats": 2}
    committed = rows(decided(), [1, 3, 0, 2, 4, 5, 6, 7])
    assert breaches(check(logged(), committed, SENT)) == {"order_violations": 1}


def test_without_decisions_every_transaction_is_lost() -> None:
    assert breaches(check(logged(), rows(decided(), []), SENT)) == {"lost": 8}


def test_partition_and_offset_are_read_from_the_decision_id() -> None:
    assert parse_decision_id("transactions-of-2025-3-4711") == (3, 4711)


def test_a_watch_is_done_when_each_partition_has_reached_its_offset() -> None:
    watch = Watch({0: 5, 1: 2})
    watch.update({0: 9}, 1.0)
    assert not watch.done
    watch.update({0: 9, 1: 2}, 2.0)
    watch.update({0: 12, 1: 7}, 3.0)
    assert watch.done
    assert watch.seen_s == 2.0


@pytest.fixture(scope="module")
def data() -> LabelledData:
    return simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=40, terminals=40, days=20, seed=4)


@pytest.fixture
def endless(data: LabelledData) -> EndlessData:
    return EndlessData(load_bundle(SHIPPED_BUNDLE).schema, data)


def test_each_round_has_new_ids_and_later_times_at_the_same_hours_of_the_day(
    endless: EndlessData, data: LabelledData
) -> None:
    count = data.batch.rows
    found = endless.rows(0, 3 * count)
    assert found.batch["transaction_id"].tolist() == list(range(3 * count))
    times = found.batch["event_time"]
    assert (np.diff(times) >= 0).all()
    assert (times[count : 2 * count] % DAY_MS == data.batch["event_time"] % DAY_MS).all()
    assert (found.batch["card_id"][2 * count :] == data.batch["card_id"]).all()


def test_the_label_of_every_fraud_is_sent_once_when_it_is_due(endless: EndlessData, data: LabelledData) -> None:
    schema = load_bundle(SHIPPED_BUNDLE).schema
    whole = endless.rows(0, 3 * data.batch.rows)
    sent, identities = 0, []
    for until_ms in whole.batch["event_time"][::50].tolist():
        labels, sent = endless.labels_due(sent, until_ms)
        assert labels.fraud.all()
        assert (labels.batch["event_time"] + schema.label.delay_ms <= until_ms).all()
        identities += labels.batch["transaction_id"].tolist()
    due = whole.batch["event_time"] + schema.label.delay_ms <= until_ms
    assert identities == np.flatnonzero(due & (whole.fraud == 1)).tolist()
    assert len(identities) > 10
