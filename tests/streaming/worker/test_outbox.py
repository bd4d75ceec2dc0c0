from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from cascade.errors import BrokerError, TransactionAbortedError
from streaming.health_state import HealthState
from streaming.kafka import GroupMember, Partition
from streaming.pipeline.send import Sent
from streaming.pipeline.table import Records
from streaming.worker.outbox import (
    COMMIT_FAILURE_S_MAX,
    LOOK_EVERY_S,
    REFUSED_PAUSE_S,
    REFUSED_S_MAX,
    ROWS_KEPT_MAX,
    AtLeastOnceOutbox,
    ExactlyOnceOutbox,
)
from tests.timing import SetClock

PARTITION: Partition = ("t", 0)
OTHER: Partition = ("t", 1)
LETTER = [("cascade-reason", b"r")]
TRANSACTION_S_MIN = 0.005


class ManualDelivery:
    done_s = 12.5
    """Acknowledged, or failed, when the test sets it."""

    acknowledged = failed = False

    def done(self) -> bool:
        if self.failed:
            raise BrokerError("not delivered")
        return self.acknowledged


class FaultyBroker:
    """Injects what a broker may do to a producer and a consumer: late deliveries, refused commits."""

    def __init__(self) -> None:
        self.deliveries: list[ManualDelivery] = []
        self.commits: list[dict[Partition, tuple[int, str]]] = []
        self.calls: list[str] = []
        # the broker refuses, or the group does
        self.refuses = self.rebalances = False
        self.values: list[bytes] = []
        self.headers: list[Any] = []

    def send(self, topic: str, key: bytes, value: bytes, headers: Any = ()) -> ManualDelivery:
        self.headers.append(headers)
        return self.send_many(topic, [key], [value])

    def send_many(self, topic: str, keys: Sequence[bytes], values: Sequence[bytes]) -> ManualDelivery:
        assert len(keys) == len(values)
        self.calls.append("send")
        self.values += values
        self.deliveries.append(ManualDelivery())
        return self.deliveries[-1]

    def begin(self) -> None:
        self.calls.append("begin")

    def abort(self) -> None:
        self.calls.append("abort")
        self.values.clear()

    def member(self) -> GroupMember:
        return GroupMember("member")

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: object = None) -> bool:
        self.calls.append("commit")
        if self.refuses:
            raise BrokerError("refused")
        if self.rebalances:
            self.values.clear()
            return False
        self.commits.append(dict(offsets))
        return True


class Scene:
    def __init__(self, kind: type[AtLeastOnceOutbox] | type[ExactlyOnceOutbox]) -> None:
        self.broker, self.clock = FaultyBroker(), SetClock()
        self.decided: list[int] = []
        self.acknowledged: list[int] = []
        self.outbox: Any = kind(
            self.broker,
            HealthState(60),
            self.clock,
            0.5,
            self.broker,
            *([TRANSACTION_S_MIN] if kind is ExactlyOnceOutbox else []),
        )  # type: ignore[arg-type]
        self.acknowledged_s: list[float | None] = []

    def advance(self, force: bool = False, quiet: bool = False) -> None:
        """As the worker's loop: collects the events, counts them as decided, commits."""
        events = self.outbox.collect(force, quiet)
        for sent, _ in events:
            fresh = sent.offsets.get(PARTITION, np.zeros(0)).tolist()
            self.decided += [offset for offset in fresh if offset not in self.decided]
        committed = self.outbox.commit(self.progress, force)
        for sent, at_s in events:
            if committed or at_s is not None:
                self.acknowledged += sent.offsets.get(PARTITION, np.zeros(0)).tolist()
                self.acknowledged_s.append(at_s)

    def progress(self) -> dict[Partition, tuple[int, str]]:
        return {PARTITION: (len(self.decided), "")}

    def send(self, offset: int, partition: Partition = PARTITION) -> None:
        sent = Sent({partition: np.array([offset])}, np.zeros(1), "screened", None)
        self.outbox.send_many("decisions", [b"k"], [b"%d" % offset], sent)

    def send_letter(self, offset: int, partition: Partition = PARTITION) -> None:
        sent = Sent({partition: np.array([offset])}, np.zeros(0), "", None)
        self.outbox.send("dead-letters", b"k", b"%d" % offset, LETTER, sent)


def test_an_offset_is_not_committed_before_its_decision_is_acknowledged() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    scene.send(1)
    scene.clock.now_s += 1
    scene.advance()
    assert scene.broker.commits == [{PARTITION: (0, "")}]
    scene.broker.deliveries[1].acknowledged = True
    scene.advance(force=True)
    assert scene.decided == [], "a later delivery stood for an earlier one"
    scene.broker.deliveries[0].acknowledged = True
    scene.advance(force=True)
    assert (scene.decided, scene.broker.commits[-1], scene.outbox.pending) == ([0, 1], {PARTITION: (2, "")}, 0)


def test_a_delivery_that_failed_ends_the_session_and_is_never_decided() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    scene.broker.deliveries[0].failed = True
    for _ in range(2):
        with pytest.raises(BrokerError, match="not delivered"):
            scene.advance(force=True)
    assert (scene.decided, scene.broker.commits) == ([], [])


def test_what_was_acknowledged_before_a_failed_delivery_counts() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    scene.send(1)
    scene.broker.deliveries[0].acknowledged = scene.broker.deliveries[1].failed = True
    scene.advance()
    assert (scene.decided, scene.acknowledged) == ([0], [0])
    with pytest.raises(BrokerError, match="not delivered"):
        scene.advance()


def test_acknowledgements_are_looked_at_now_and_then_and_before_a_commit() -> None:
    scene = Scene(AtLeastOnceOutbox)
    assert scene.outbox.looks(force=False, quiet=False)
    assert not scene.outbox.looks(force=False, quiet=True), "just looked"
    assert scene.outbox.looks(force=True, quiet=False)
    scene.clock.now_s += LOOK_EVERY_S
    assert scene.outbox.looks(force=False, quiet=False)
    scene.send(0)
    scene.clock.now_s = scene.outbox.due_s(quiet=False) - LOOK_EVERY_S / 2
    assert scene.outbox.looks(force=False, quiet=False)
    scene.clock.now_s += LOOK_EVERY_S / 2
    assert scene.outbox.looks(force=False, quiet=False), "a commit is due"


def test_a_refused_commit_of_offsets_is_tried_again() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    scene.broker.deliveries[0].acknowledged = scene.broker.refuses = True
    scene.advance(force=True)
    assert scene.broker.commits == []
    scene.broker.refuses = False
    scene.advance(force=True)
    assert scene.broker.commits == [{PARTITION: (1, "")}]


def test_commits_of_offsets_that_are_refused_for_good_end_the_session() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    scene.broker.deliveries[0].acknowledged = scene.broker.refuses = True
    scene.advance(force=True)
    scene.clock.now_s += COMMIT_FAILURE_S_MAX
    scene.advance()
    scene.clock.now_s += 1
    with pytest.raises(BrokerError, match="refused"):
        scene.advance()
    # a commit that succeeds in between restarts the count
    scene = Scene(AtLeastOnceOutbox)
    for offset in range(3):
        scene.send(offset)
        scene.broker.deliveries[offset].acknowledged = scene.broker.refuses = True
        scene.advance(force=True)
        scene.clock.now_s += COMMIT_FAILURE_S_MAX
        scene.broker.refuses = False
        scene.advance()
    assert len(scene.broker.commits) == 3


def test_what_was_sent_for_a_lost_partition_is_not_counted_as_decided_when_it_comes_back() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(7)
    scene.outbox.forget([PARTITION])
    scene.broker.deliveries[0].acknowledged = True
    scene.advance(force=True)
    assert scene.decided == []


def test_a_transaction_has_its_decisions_and_their_offsets_and_is_committed_when_due() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.send(1)
    scene.advance()
    assert (scene.broker.calls, scene.acknowledged) == (["begin", "send", "send"], [])
    scene.clock.now_s += 0.5
    scene.advance()
    assert (scene.broker.commits, scene.acknowledged) == ([{PARTITION: (2, "")}], [0, 1])
    scene.clock.now_s += TRANSACTION_S_MIN
    scene.send(2)
    assert scene.broker.calls[-2:] == ["begin", "send"]


def test_a_transaction_is_committed_at_once_when_nothing_else_waits_but_not_soon_after_the_last_one() -> None:
    scene = Scene(ExactlyOnceOutbox)
    assert scene.outbox.due_s(quiet=True) == math.inf
    scene.send(0)
    assert scene.outbox.due_s(quiet=False) == pytest.approx(scene.clock.now_s + 0.5)
    scene.advance(quiet=False)
    assert scene.broker.commits == [], "records that wait belong into the same transaction"
    assert scene.outbox.due_s(quiet=True) == pytest.approx(scene.clock.now_s)
    scene.advance(quiet=True)
    assert scene.broker.commits == [{PARTITION: (1, "")}]
    assert scene.acknowledged_s == [None], "the commit makes decisions visible"
    scene.clock.now_s += TRANSACTION_S_MIN / 2
    scene.send(1)
    assert scene.outbox.due_s(quiet=True) == pytest.approx(scene.clock.now_s + TRANSACTION_S_MIN / 2)
    scene.advance(quiet=True)
    assert scene.broker.calls == ["begin", "send", "commit"], "the broker is still ending the last transaction"
    scene.clock.now_s += TRANSACTION_S_MIN
    scene.advance(quiet=True)
    assert scene.broker.calls[3:] == ["begin", "send", "commit"]
    assert scene.broker.commits[1:] == [{PARTITION: (2, "")}]


def test_messages_that_are_not_sent_yet_are_dropped_with_their_partition_without_an_abort() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.advance(quiet=True)
    scene.send(1)
    scene.send(5, OTHER)
    scene.outbox.forget([OTHER])
    scene.advance(force=True)
    assert "abort" not in scene.broker.calls
    assert (scene.broker.values, scene.acknowledged) == ([b"0", b"1"], [0, 1])


def test_an_acknowledgement_has_the_time_of_its_delivery() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    assert scene.outbox.due_s(quiet=True) == pytest.approx(scene.clock.now_s + 0.5)
    scene.broker.deliveries[0].acknowledged = True
    scene.advance()
    assert scene.acknowledged_s == [ManualDelivery.done_s]
    assert scene.outbox.due_s(quiet=True) == math.inf


def test_a_transaction_that_the_group_refuses_is_sent_again_in_the_same_order_and_counts_once() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.send_letter(1)
    scene.broker.rebalances = True
    scene.advance(force=True)
    assert (scene.broker.commits, scene.acknowledged, scene.outbox.pending) == ([], [], 2)
    scene.broker.rebalances = False
    scene.advance()
    assert scene.broker.commits == [], "it is not tried again at once"
    assert scene.outbox.due_s(quiet=True) == pytest.approx(scene.clock.now_s + REFUSED_PAUSE_S)
    scene.clock.now_s += 0.5
    scene.send(2)
    scene.advance()
    assert scene.broker.values == [b"0", b"1", b"2"]
    assert scene.broker.headers == [LETTER, LETTER]
    assert scene.broker.commits == [{PARTITION: (3, "")}]
    assert (scene.acknowledged, scene.outbox.pending) == ([0, 1, 2], 0)
    assert scene.broker.calls.count("begin") == 2


def test_a_group_that_refuses_for_long_ends_the_session_with_nothing_counted() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.broker.rebalances = True
    scene.advance(force=True)
    pauses: list[float] = []
    while sum(pauses) <= REFUSED_S_MAX:
        pauses.append(scene.outbox.due_s(quiet=True) - scene.clock.now_s)
        scene.clock.now_s += pauses[-1]
        if sum(pauses) <= REFUSED_S_MAX:
            scene.advance(quiet=True)
    with pytest.raises(TransactionAbortedError, match="refuses the offsets"):
        scene.advance(quiet=True)
    assert len(pauses) < 20, "it asks more and more seldom"
    with pytest.raises(TransactionAbortedError):
        scene.send(1)
    assert (scene.acknowledged, scene.broker.commits) == ([], [])


def test_the_records_that_are_kept_are_limited() -> None:
    scene = Scene(ExactlyOnceOutbox)
    for rows, due_s in ((ROWS_KEPT_MAX - 1, scene.clock.now_s + 0.5), (1, scene.clock.now_s)):
        sent = Sent({PARTITION: np.arange(rows)}, np.zeros(rows), "screened", None)
        scene.outbox.send_many("decisions", [b"k"] * rows, [b"v"] * rows, sent)
        assert scene.outbox.due_s(quiet=False) == pytest.approx(due_s)
    scene.broker.rebalances = True
    with pytest.raises(TransactionAbortedError, match="refuses the offsets"):
        scene.advance()


def test_without_anything_sent_no_transaction_is_begun() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.advance(force=True)
    assert scene.broker.calls == []


def test_a_refused_transaction_ends_the_session_with_nothing_counted() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.broker.refuses = True
    with pytest.raises(BrokerError, match="refused"):
        scene.advance(force=True)
    assert scene.acknowledged == []


def test_losing_a_partition_undoes_its_decisions_and_sends_the_others_again() -> None:
    scene = Scene(ExactlyOnceOutbox)
    for offset in range(2):
        scene.send(offset)
    scene.send(5, OTHER)
    records = Records("t", np.array([1, 0, 1]), np.array([6, 2, 7]))
    offsets = {PARTITION: np.array([2]), OTHER: np.array([6, 7])}
    sent = Sent(offsets, np.arange(3.0), "screened", None, records)
    scene.outbox.send_many("decisions", [b"k"] * 3, [b"6", b"2", b"7"], sent)
    scene.send_letter(8, OTHER)
    scene.outbox.forget([OTHER])
    assert (scene.broker.values, scene.broker.calls[-1]) == ([], "abort")
    scene.send(3)
    assert scene.broker.values == [b"0", b"1", b"2", b"3"]
    events = [event.sent for event in scene.outbox.collect(force=True)]
    assert [list(sent.offsets) for sent in events] == [[PARTITION]] * 4
    kept = events[2]
    assert (kept.start_ms.tolist(), kept.records.offsets.tolist()) == ([1.0], [2])
    scene.advance(force=True)
    assert scene.acknowledged == [0, 1, 2, 3]


def test_losing_a_partition_leaves_a_transaction_without_its_decisions_open() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.outbox.forget([OTHER])
    assert scene.broker.calls == ["begin", "send"]
    scene.advance(force=True)
    assert scene.acknowledged == [0]


def test_after_the_loss_of_all_partitions_nothing_is_sent_again() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.outbox.forget([PARTITION])
    assert scene.broker.calls == ["begin", "send", "abort"]
    assert scene.outbox.due_s(quiet=True) == math.inf
    scene.advance(force=True)
    assert (scene.broker.commits, scene.acknowledged) == ([], [])
    scene.send(1, OTHER)
    assert scene.broker.values == [b"1"]
