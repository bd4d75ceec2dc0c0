"""The check finds each kind of breach, and the rows of the steady load are new and in order in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import pytest

from bench.cluster import (
    EndlessData,
    LoggedDecisions,
    LoggedTransactions,
    Watch,
    check,
    check_log,
    parse_decision_id,
    simulated,
)
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Array
from cascade.config import Config
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


def decided(index: Sequence[int] = range(8), **changes: Array) -> LoggedDecisions:
    """The decisions at the positions `index` of those that are complete and in order; `changes`: other columns."""
    log, none = logged(), np.zeros(8, bool)
    columns = (np.arange(8), log.partition, log.offset, log.transaction_id, log.card, ~none, none, none)
    complete = replace(LoggedDecisions(*columns), **changes)
    return LoggedDecisions(*(getattr(complete, field.name)[list(index)] for field in fields(LoggedDecisions)))


def changed(column: Array, row: int, value: int) -> Array:
    column = column.copy()
    column[row] = value
    return column


CASES: dict[str, tuple[LoggedDecisions, dict[str, int]]] = {
    "a decision for each transaction in order passes": (decided(), {}),
    "a transaction without a decision is lost": (decided([0, 1, 3, 4, 5, 6, 7]), {"lost": 1}),
    "a second and a third decision are a transaction decided twice": (
        decided([0, 1, 2, 3, 1, 1, 4, 5, 6, 7]),
        {"twice": 1, "repeats": 2},
    ),
    "a decision of no transaction is a stray": (
        decided(offset=changed(logged().offset, 3, 9)),
        {"strays": 1, "lost": 1},
    ),
    "a decision with another transaction's id is a stray": (
        decided(transaction_id=changed(logged().transaction_id, 3, 4)),
        {"strays": 1},
    ),
    "screened decisions out of order within a card are counted": (
        decided([0, 3, 1, 2, 4, 5, 6, 7]),
        {"order_violations": 1},
    ),
    "the order between cards does not count": (decided([2, 0, 1, 3, 4, 5, 6, 7]), {}),
    "an escalated decision may come after later ones of its card": (
        decided([0, 3, 1, 2, 4, 5, 6, 7], screened=np.arange(8) != 1),
        {"escalated_behind": 1},
    ),
    "a repeat does not count as out of order": (decided([0, 1, 2, 3, 0, 1, 4, 5, 6, 7]), {"twice": 2, "repeats": 2}),
    # 0 was escalated, and its worker lost; 1 and 3 of its card were decided, but not committed
    "a decision is in order if later transactions of its card are decided again after it": (
        decided([1, 3, 0, 1, 3, 2, 4, 5, 6, 7]),
        {"twice": 2, "repeats": 2},
    ),
    "and is not if they were committed": (decided([1, 3, 0, 2, 4, 5, 6, 7]), {"order_violations": 1}),
    "without decisions every transaction is lost": (decided([]), {"lost": 8}),
}


@pytest.mark.parametrize(("decisions", "breaches"), CASES.values(), ids=CASES)
def test_the_check_counts_each_kind_of_breach(decisions: LoggedDecisions, breaches: dict[str, int]) -> None:
    found = check(logged(), decisions, SENT)
    names = ("lost", "twice", "repeats", "strays", "order_violations", "escalated_behind")
    assert {name: getattr(found, name) for name in names if getattr(found, name)} == breaches
    assert (found.transactions, found.decisions) == (8, len(decisions.offset))
    assert found.escalated == (~decisions.screened).sum()


def test_a_sent_transaction_that_is_not_in_the_log_is_lost_too() -> None:
    assert check(logged(), decided(), SENT + 2).lost == 2


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


@dataclass
class ThreeNodes:
    """In the place of a broker whose node 1, while it leads, serves records of an aborted transaction."""

    nodes: int = 3
    stopped: int | None = None
    calls: list[str] = field(default_factory=list)

    def stop_node(self, node: int) -> None:
        self.stopped = node
        self.calls.append(f"stop {node}")

    def start_node(self, node: int) -> None:
        self.stopped = None
        self.calls.append(f"start {node}")


@pytest.mark.parametrize(
    ("delivery", "committed", "expected"),
    [
        ("exactly-once", False, (0, 1)),
        # committed twice is an error of ours, and every node serves it
        ("exactly-once", True, (1, 0)),
        # without transactions nothing is aborted
        ("at-least-once", False, (1, 0)),
    ],
)
def test_a_repeat_that_not_every_node_serves_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    delivery: Literal["at-least-once", "exactly-once"],
    committed: bool,
    expected: tuple[int, int],
) -> None:
    broker, schema = ThreeNodes(), load_bundle(SHIPPED_BUNDLE).schema
    repeated = replace(decided([0, 1, 2, 3, 4, 5, 6, 7, 5]), record=np.arange(9))

    def read(config: Config) -> LoggedDecisions:
        return decided() if broker.stopped == 1 and not committed else repeated

    monkeypatch.setattr("bench.cluster.read_decisions", read)
    monkeypatch.setattr("bench.cluster.read_transactions", lambda config, schema: logged())
    monkeypatch.setattr("bench.cluster._wait_until_in_sync", lambda config, topic, replicas: None)
    found, left_out = check_log(Config(delivery=delivery), schema, SENT, broker)  # type: ignore[arg-type]  # a fake
    assert (found.twice, left_out) == expected
    assert found.lost == 0
    if delivery == "exactly-once":
        assert broker.calls == ["stop 0", "start 0", "stop 1", "start 1", "stop 2", "start 2"]
