"""First decisions that were made before a restart, looked for in a topic where open transactions hide some."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bench.faults.broker import BrokerSettings, SimBroker
from bench.faults.clock import EPOCH_S, SimClock
from bench.faults.consumer import SimConsumer
from bench.faults.process import POLICY
from bench.faults.traffic import SCHEMA
from bench.faults.world import Life, World
from cascade.columns import ColumnBatch
from cascade.config import Config
from streaming.pipeline.decisions import Decision, LatencyMs
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.offsets import Decided
from streaming.pipeline.repeats import OPEN_TRANSACTION_S_MAX, Repeats
from streaming.pipeline.table import Table
from streaming.worker.partitions import OwnedPartition

PARTITION = ("transactions", 0)
START_MS = int(EPOCH_S * 1e3)


class Rig:
    """A worker that owns one partition, of which offset 0 was decided before, and now comes again as offset 1."""

    def __init__(self, decided: Decided | None = None) -> None:
        self.world = World(1)
        self.broker = SimBroker(self.world, BrokerSettings({"transactions": 1, "decisions": 1}, "transactions"))
        self.life = Life(self.world, "worker")
        self.clock = SimClock(self.life)
        self.answers: list[tuple[list[int], list[float]]] = []
        self.opened = 0
        self.first_decisions = FirstDecisions(Config().duplicates)
        self.owned = OwnedPartition(PARTITION, decided or Decided(1), 0, self.clock.monotonic())
        self.repeats = Repeats(
            Config(), self.first_decisions, POLICY, {PARTITION: self.owned}, self.open_consumer, self.clock,
        )  # fmt: skip
        self.read(0, 1, transaction=1)

    def read(self, first: int, again: int, transaction: int) -> None:
        """A transaction comes at two offsets: the second asks for the first one's decision."""
        batch = ColumnBatch({name: np.full(2, transaction, field.dtype) for name, field in SCHEMA.fields.items()}, 2)
        table = Table.of(PARTITION[0], batch, ("v1",), offset=[first, again], appended_ms=START_MS)
        assert self.first_decisions.look_up(table, SCHEMA.roles) == 1
        self.repeats.add(table.take(np.array([1])))
        self.owned.next = again + 1

    def open_consumer(self) -> SimConsumer:
        self.opened += 1
        return SimConsumer(self.broker, self.life, False)

    def decide(self, offset: int, score: float) -> None:
        decision = Decision(
            1, "decline", score, "deep", 0.6, "b", False, None, f"transactions-0-{offset}", False, None, START_MS,
            START_MS, LatencyMs(0, 0, 0, 0, 0),
        )  # fmt: skip
        self.broker.append("decisions", b"1", msgspec.json.encode(decision))

    def turns(self, seconds: float) -> None:
        end_s = self.world.now_s + seconds
        while self.world.now_s < end_s:
            self.answers += [
                (table.rows["offset"].tolist(), table.rows["score"].tolist()) for table in self.repeats.collect()
            ]
            self.world.wait(self.world.now_s + 0.05)


def test_a_first_decision_is_found_in_the_topic() -> None:
    rig = Rig()
    rig.decide(0, 0.95)
    rig.turns(0.1)
    assert rig.answers == [([1], [0.95])]
    assert (rig.repeats.open, rig.opened) == (0, 1)


def test_a_first_decision_behind_an_open_transaction_is_waited_for() -> None:
    rig = Rig()
    log = rig.broker.logs["decisions", 0]
    log.append(START_MS, b"2", b"another's", (), 7, True)
    rig.decide(0, 0.95)
    rig.turns(10.0)
    assert rig.answers == []
    assert rig.repeats.waiting_of([PARTITION]) == 1
    log.write_marker(7, False, START_MS)
    rig.turns(1.0)
    assert rig.answers == [([1], [0.95])]


def test_a_first_decision_that_the_topic_does_not_hold_any_more_goes_to_review() -> None:
    rig = Rig()
    rig.turns(OPEN_TRANSACTION_S_MAX - 1.0)
    assert rig.answers == []
    rig.turns(2.0)
    ((offsets, scores),) = rig.answers
    assert offsets == [1]
    assert scores == pytest.approx([POLICY.review_from])


def test_a_first_decision_that_was_made_ahead_is_known_when_its_record_is_read_later() -> None:
    rig = Rig(Decided(1, np.array([5])))
    rig.decide(0, 0.95)
    rig.decide(5, 0.75)
    rig.turns(0.1)
    rig.read(5, 6, transaction=2)
    rig.turns(0.1)
    assert rig.answers == [
        ([1], [0.95]),
        ([6], [0.75]),
    ]
    assert rig.opened == 1
