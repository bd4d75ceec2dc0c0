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
from streaming.decisions import Decision, LatencyMs
from streaming.duplicates import FirstColumns, FirstDecisions
from streaming.in_flight import Rows
from streaming.offsets import Decided
from streaming.partitions import OwnedPartition
from streaming.repeats import HIDDEN_S_MAX, Repeats

PARTITION = ("transactions", 0)
START_MS = int(EPOCH_S * 1e3)


class Rig:
    """A worker that owns one partition, of which offset 0 was decided before, and now comes again as offset 1."""

    def __init__(self) -> None:
        self.world = World(1)
        self.broker = SimBroker(self.world, BrokerSettings({"transactions": 1, "decisions": 1}, "transactions"))
        self.life = Life(self.world, "worker")
        self.clock = SimClock(self.life)
        self.answers: list[tuple[list[int], FirstColumns]] = []
        self.opened = 0
        config, first_decisions = Config(), FirstDecisions(Config().duplicates)
        owned = {PARTITION: OwnedPartition(PARTITION, Decided(1), 0, self.clock.monotonic())}
        self.repeats = Repeats(config, first_decisions, POLICY, owned, self.open_consumer, self.publish, self.clock)
        batch = ColumnBatch({name: np.ones(2, field.dtype) for name, field in SCHEMA.fields.items()}, 2)
        times = np.full(2, START_MS)
        entries = first_decisions.look_up(batch, SCHEMA.roles, np.zeros(2, np.int64), np.arange(2), times)
        rows = Rows([PARTITION], np.zeros(2, np.int64), np.arange(2), batch, *(np.zeros(2),) * 3, 0.0, 0.0)
        self.repeats.add(rows.take(np.array([1])), entries[1:], times[1:])

    def open_consumer(self) -> SimConsumer:
        self.opened += 1
        return SimConsumer(self.broker, self.life, False)

    def publish(self, rows: Rows, first: FirstColumns) -> None:
        if len(rows):
            self.answers.append((rows.offsets.tolist(), first))

    def decide_first(self) -> None:
        decision = Decision(
            1, "decline", 0.95, "deep", 0.6, "b", False, None, "transactions-0-0", False, None, START_MS, START_MS,
            LatencyMs(0, 0, 0, 0, 0),
        )  # fmt: skip
        self.broker.append("decisions", b"1", msgspec.json.encode(decision))

    def turns(self, seconds: float) -> None:
        end_s = self.world.now_s + seconds
        while self.world.now_s < end_s:
            self.repeats.advance()
            self.world.wait(self.world.now_s + 0.05)


def test_a_first_decision_is_found_in_the_topic() -> None:
    rig = Rig()
    rig.decide_first()
    rig.turns(0.1)
    assert [(offsets, first.scores.tolist()) for offsets, first in rig.answers] == [([1], [0.95])]
    assert (rig.repeats.open, rig.opened) == (0, 1)


def test_a_first_decision_behind_an_open_transaction_is_waited_for() -> None:
    rig = Rig()
    log = rig.broker.logs["decisions", 0]
    log.append(START_MS, b"2", b"another's", (), 7, True)
    rig.decide_first()
    rig.turns(10.0)
    assert rig.answers == []
    assert rig.repeats.waiting_of([PARTITION]) == 1
    log.mark(7, False, START_MS)
    rig.turns(1.0)
    assert [(offsets, first.scores.tolist()) for offsets, first in rig.answers] == [([1], [0.95])]


def test_a_first_decision_that_the_topic_does_not_hold_any_more_goes_to_review() -> None:
    rig = Rig()
    rig.turns(HIDDEN_S_MAX - 1.0)
    assert rig.answers == []
    rig.turns(2.0)
    ((offsets, first),) = rig.answers
    assert offsets == [1]
    assert first.scores.tolist() == pytest.approx([POLICY.review_from])
