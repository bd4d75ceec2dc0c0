from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cascade.errors import BrokerError, TransactionAbortedError
from streaming.health_state import HealthState
from streaming.kafka import GroupMember, Partition
from streaming.pipeline.send import Sent
from streaming.worker.outbox import (
    COMMIT_FAILURE_S_MAX,
    JOIN_WAIT_S_MAX,
    AtLeastOnceOutbox,
    ExactlyOnceOutbox,
)
from tests.timing import SetClock

PARTITION: Partition = ("t", 0)
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
        self.refuses = False
        self.joins = False

    def send(self, *_: Any) -> ManualDelivery:
        self.calls.append("send")
        self.deliveries.append(ManualDelivery())
        return self.deliveries[-1]

    send_many = send

    def begin(self) -> None:
        self.calls.append("begin")

    def flush(self, timeout_s: float) -> None: ...

    def abort(self) -> None:
        self.calls.append("abort")

    def member(self) -> GroupMember:
        return GroupMember("member")

    def settled(self) -> bool:
        return not self.joins

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: object = None) -> None:
        self.calls.append("commit")
        if self.refuses:
            raise BrokerError("refused")
        self.commits.append(dict(offsets))


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
            self.decided += sent.offsets.get(PARTITION, np.zeros(0)).tolist()
        self.outbox.commit(self.progress, force)
        for sent, at_s in events:
            self.acknowledged += sent.offsets.get(PARTITION, np.zeros(0)).tolist()
            self.acknowledged_s.append(at_s)

    def progress(self) -> dict[Partition, tuple[int, str]]:
        return {PARTITION: (len(self.decided), "")}

    def send(self, offset: int) -> None:
        self.outbox.send_many(
            "decisions", [b"k"], [b"v"], Sent({PARTITION: np.array([offset])}, np.zeros(1), "screened", None)
        )


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
    scene.send(2)
    assert scene.broker.calls[-2:] == ["begin", "send"]


def test_a_transaction_ends_early_when_nothing_else_waits_but_not_at_once() -> None:
    scene = Scene(ExactlyOnceOutbox)
    assert scene.outbox.due_s(quiet=True) == math.inf
    scene.send(0)
    assert scene.outbox.due_s(quiet=True) == pytest.approx(scene.clock.now_s + TRANSACTION_S_MIN)
    assert scene.outbox.due_s(quiet=False) == pytest.approx(scene.clock.now_s + 0.5)
    scene.advance(quiet=True)
    assert scene.broker.commits == []
    scene.clock.now_s += TRANSACTION_S_MIN
    scene.advance(quiet=False)
    assert scene.broker.commits == [], "records that wait belong into the same transaction"
    scene.advance(quiet=True)
    assert scene.broker.commits == [{PARTITION: (1, "")}]
    assert scene.acknowledged_s == [None], "the commit makes decisions visible"


def test_an_acknowledgement_has_the_time_of_its_delivery() -> None:
    scene = Scene(AtLeastOnceOutbox)
    scene.send(0)
    assert scene.outbox.due_s(quiet=True) == pytest.approx(scene.clock.now_s + 0.5)
    scene.broker.deliveries[0].acknowledged = True
    scene.advance()
    assert scene.acknowledged_s == [ManualDelivery.done_s]
    assert scene.outbox.due_s(quiet=True) == math.inf


def test_a_commit_waits_for_a_join_but_not_for_ever() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    scene.broker.joins = True
    scene.clock.now_s += 1.0
    scene.advance()
    assert scene.broker.commits == []
    scene.clock.now_s += JOIN_WAIT_S_MAX
    scene.advance()
    assert scene.broker.commits == [{PARTITION: (1, "")}]


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


def test_losing_a_partition_undoes_the_open_transaction_and_ends_the_session() -> None:
    scene = Scene(ExactlyOnceOutbox)
    scene.send(0)
    with pytest.raises(TransactionAbortedError, match="partitions 0"):
        scene.outbox.forget([PARTITION])
    assert scene.broker.calls[-1] == "abort"
    assert "commit" not in scene.broker.calls
