"""The recall watch against a plain reading of its rule, in bounded memory, in a worker, and when recall falls."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from structlog.testing import capture_logs

from bench.faults.process import SimProcess
from bench.faults.run import simulate
from cascade.bundle import Bundle
from cascade.columns import Array, ColumnBatch
from cascade.evidence import alarm_nats, evidence_nats
from cascade.features.spec import DAY_MS
from cascade.ledger import Ledger
from cascade.protocols import Clock, SystemClock
from cascade.schema import Label, Roles, Schema
from stages.certificate import first_frauds
from streaming.health_state import HealthState
from streaming.pipeline import watch
from streaming.pipeline.table import Table
from streaming.pipeline.watch import COMPONENT, LATE_MS, RecallWatch
from streaming.worker.opening import Ports
from tests.bundle_certificate import made_up_certificate

SCHEMA = Schema("test", 1, Roles("id", "time", "amount", "card", "terminal"), {}, Label("fraud", "7d"))
START_MS = 600 * 30 * DAY_MS


class Scene:
    """A watch, and what it shows."""

    def __init__(self, at_least: float = 0.5, clock: Clock | None = None, expires: datetime | None = None) -> None:
        self.ledger, self.health = Ledger(), HealthState(60.0)
        certificate = made_up_certificate("made-up-1", at_least=at_least)
        if expires is not None:
            certificate = made_up_certificate("made-up-1", at_least=at_least, expires=expires)
        self.watch = RecallWatch(certificate, SCHEMA, self.ledger, self.health, clock or SystemClock(), seed=11)
        self.offset = 0

    @property
    def text(self) -> str:
        return self.health.components()[COMPONENT].text

    def decide(self, ids: Array, cards: Array, time_ms: Array, actions: Array) -> None:
        """The worker decides these transactions, in micro-batches of at most 100; the first row of each waits."""
        for start in range(0, len(ids), 100):
            part = slice(start, start + 100)
            batch = ColumnBatch({"id": ids[part], "card": cards[part]}, len(ids[part]))
            offsets = np.arange(self.offset, self.offset + batch.rows)
            table = Table.of(
                "t", batch, ("v1",), offset=offsets, partition_id=offsets % 3, event_time_ms=time_ms[part],
                action=actions[part],
            )  # fmt: skip
            self.offset += batch.rows
            self.watch.note(table, np.arange(1, batch.rows))
            self.watch.note(table.take(np.array([0])), np.array([0]))

    def label(self, ids: Array, cards: Array, time_ms: Array, frauds: Array) -> None:
        columns = {"id": ids, "card": cards, "time": time_ms, "fraud": frauds}
        self.watch.judge(ColumnBatch({**columns, "terminal": cards}, len(ids)))

    @property
    def counts(self) -> tuple[int, int]:
        counters = self.ledger.counters()
        assert (counters.first_frauds_caught, counters.first_frauds_missed) == (self.watch.caught, self.watch.missed)
        return self.watch.caught, self.watch.missed


def traffic(rows: int, seed: int, days: float = 70.0, recall: float = 0.6) -> tuple[Array, Array, Array, Array, Array]:
    """ids, cards, times, actions, frauds."""
    rng = np.random.default_rng(seed)
    time_ms = START_MS + np.sort(rng.integers(0, int(days * DAY_MS), rows))
    frauds = (rng.random(rows) < 0.1).astype(np.int64)
    actions = (rng.random(rows) < np.where(frauds == 1, recall, 0.02)).astype(np.int64) * rng.integers(1, 3, rows)
    return rng.permutation(10 * rows)[:rows] - rows, rng.integers(-300, 300, rows), time_ms, actions, frauds


def as_texts(numbers: Array, width: int) -> Array:
    return np.array([b"n%d" % number for number in numbers.tolist()], f"S{width}")


@pytest.mark.parametrize("texts", [False, True])
def test_it_counts_each_cards_first_fraud_of_a_period_by_what_was_decided(texts: bool) -> None:
    ids, cards, time_ms, actions, frauds = traffic(6_000, seed=1)
    scene = Scene()
    # the two topics may have schemas with another max_length
    of_topic, of_labels = (as_texts(ids, 16), as_texts(ids, 40)) if texts else (ids, ids)
    scene.decide(of_topic, as_texts(cards, 24) if texts else cards, time_ms, actions)
    scene.label(of_labels, as_texts(cards, 64) if texts else cards, time_ms, frauds)
    first = first_frauds(frauds == 1, cards, time_ms // DAY_MS)
    caught = int((actions[first] > 0).sum())
    found_caught, found_missed = scene.counts
    # of 6,000 decisions in half a million slots, some thirty replace another one
    assert 0.98 * caught <= found_caught <= caught
    assert 0.98 * (len(first) - caught) <= found_missed <= len(first) - caught
    assert min(scene.counts) > 100
    assert scene.watch.sampled_share == 1.0


def test_a_label_that_comes_again_or_names_what_was_not_decided_here_counts_nothing() -> None:
    ids, cards, time_ms, actions, frauds = traffic(2_000, seed=2)
    scene, mine = Scene(), np.arange(2_000) % 2 == 0
    scene.decide(ids[mine], cards[mine], time_ms[mine], actions[mine])
    scene.label(ids, cards, time_ms, np.zeros(2_000, np.int64))
    assert scene.counts == (0, 0)
    scene.label(ids, cards, time_ms, frauds)
    first = first_frauds(frauds == 1, cards, time_ms // DAY_MS)
    first = first[mine[first]]
    assert 0.98 * len(first) <= sum(scene.counts) <= len(first)
    before = scene.counts
    scene.label(ids, cards, time_ms, frauds)
    assert scene.counts == before


def test_a_label_that_is_read_before_the_decision_counts_when_the_transaction_is_decided() -> None:
    ids, cards, time_ms, actions, frauds = traffic(4_000, seed=9)
    scene = Scene()
    scene.label(ids, cards, time_ms, frauds)
    assert scene.counts == (0, 0)
    scene.decide(ids, cards, time_ms, actions)
    first = first_frauds(frauds == 1, cards, time_ms // DAY_MS)
    caught = int((actions[first] > 0).sum())
    assert 0.97 * caught <= scene.counts[0] <= caught
    assert 0.97 * len(first) <= sum(scene.counts) <= len(first)
    before = scene.counts
    scene.decide(ids, cards, time_ms, actions)
    scene.label(ids, cards, time_ms, frauds)
    # a card that another one replaced in the table has a first fraud again
    assert sum(before) <= sum(scene.counts) <= sum(before) + 4
    assert scene.text.startswith("holds: ")


def test_a_transaction_that_is_decided_again_counts_as_it_was_decided_last() -> None:
    scene, one = Scene(), np.array([5])
    scene.decide(one, one, one + START_MS, np.array([0]))
    scene.decide(one, one, one + START_MS, np.array([2]))
    scene.label(one, one, one + START_MS, np.array([1]))
    assert scene.counts == (1, 0)


def test_the_memory_is_bounded_and_what_is_left_is_a_fair_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SLOTS", 1 << 12)
    monkeypatch.setattr(watch, "CARDS", 1 << 14)
    found = np.zeros(2, np.int64)
    for seed in range(6):
        ids, _, time_ms, actions, frauds = traffic(60_000, seed, days=10.0, recall=0.6)
        scene = Scene()
        # each fraud has a card of its own, so that all of them are first ones
        scene.decide(ids, ids, time_ms, actions)
        scene.label(ids, ids, time_ms, frauds)
        assert scene.watch.sampled_share <= 1 / 16
        found += scene.counts
    assert found.sum() > 300
    assert found[0] / found.sum() == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / found.sum()))


def test_decisions_whose_labels_should_have_come_make_room_for_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SLOTS", 1 << 12)
    scene = Scene()
    # 1,000 a horizon: never more than a quarter of the slots
    horizon_days = (SCHEMA.label.delay_ms + LATE_MS) / DAY_MS
    ids, _, time_ms, actions, frauds = traffic(20_000, seed=3, days=20 * horizon_days)
    scene.decide(ids, ids, time_ms, actions)
    assert scene.watch.sampled_share == 1.0
    late = time_ms < time_ms[-1] - 3 * horizon_days * DAY_MS
    scene.label(ids[late], ids[late], time_ms[late], frauds[late])
    assert sum(scene.counts) == 0
    due = time_ms > time_ms[-1] - 0.5 * horizon_days * DAY_MS
    scene.label(ids[due], ids[due], time_ms[due], frauds[due])
    assert sum(scene.counts) > 0.7 * frauds[due].sum()


def test_a_recall_that_falls_below_the_certified_one_raises_one_alarm_and_stops_nothing() -> None:
    scene = Scene(at_least=0.55)
    with capture_logs() as logs:
        ids, _, time_ms, actions, frauds = traffic(20_000, seed=4, recall=0.6)
        scene.decide(ids, ids, time_ms, actions)
        scene.label(ids, ids, time_ms, frauds)
        assert not scene.watch.alarmed
        assert scene.text.startswith("holds: ")
        for seed in (5, 6):
            ids, _, time_ms, actions, frauds = traffic(20_000, seed=seed, recall=0.3)
            ids += seed * 10**9
            scene.decide(ids, ids, time_ms, actions)
            scene.label(ids, ids, time_ms, frauds)
    assert scene.watch.alarmed
    assert scene.text.startswith("no longer holds: ")
    assert "55.0% certified" in scene.text
    assert scene.health.not_ready() == []
    (alarm,) = [entry for entry in logs if "no longer holds" in entry["event"]]
    assert alarm["log_level"] == "warning"
    assert evidence_nats(alarm["caught"], alarm["first_frauds"] - alarm["caught"], 0.55) >= alarm_nats(0.01)


class AtTime(SystemClock):
    """A clock that stands."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment

    def time(self) -> float:
        return self._moment.timestamp()


def test_an_expired_certificate_is_said_once() -> None:
    end = datetime(2025, 6, 1, tzinfo=UTC)
    with capture_logs() as logs:
        for clock, said in ((AtTime(end - timedelta(seconds=1)), 0), (AtTime(end), 1)):
            scene = Scene(clock=clock, expires=end)
            for number in range(3):
                one = np.array([number])
                scene.decide(one, one, one + START_MS, np.array([1]))
                scene.label(one, one, one + START_MS, np.array([1]))
            assert scene.text.startswith("expired: " if said else "holds: ")
            assert len([entry for entry in logs if "expired" in entry["event"]]) == said


class Modelled(RecallWatch):
    """Also keeps a plain model of the rule: every decision by id, and the cards that have had their first fraud."""

    def __init__(self, ports: Ports) -> None:
        certificate = made_up_certificate(ports.bundle_version)
        super().__init__(certificate, ports.schema, ports.ledger, ports.health, ports.clock, seed=3)
        self.decided: dict[object, int] = {}
        self.seen: set[tuple[object, int]] = set()
        self.awaited: set[object] = set()
        self.model = [0, 0]

    def note(self, table: Table, chosen: Array) -> None:
        super().note(table, chosen)
        ids = table.batch[self._roles.transaction_id][chosen].tolist()
        for identity, caught in zip(ids, (table.rows["action"][chosen] > 0).tolist(), strict=True):
            if identity in self.awaited:
                self.awaited.remove(identity)
                self.model[caught] += 1
            else:
                self.decided[identity] = caught

    def judge(self, labels: ColumnBatch) -> None:
        super().judge(labels)
        roles = self._roles
        columns = (roles.transaction_id, roles.card, roles.event_time, self._label)
        for identity, card, time_ms, fraud in zip(*(labels[name].tolist() for name in columns), strict=True):
            unit = (card, time_ms // 30)
            if fraud == 1 and unit not in self.seen:
                self.seen.add(unit)
                if identity in self.decided:
                    self.model[self.decided.pop(identity)] += 1
                else:
                    self.awaited.add(identity)


def test_a_worker_in_the_fault_simulator_counts_as_the_rule_says_and_breaks_no_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watches: list[Modelled] = []
    make_ports = SimProcess._make_ports

    def with_watch(process: SimProcess) -> Ports:
        ports = make_ports(process)
        watches.append(Modelled(ports))
        return replace(ports, watch=watches[-1])

    monkeypatch.setattr(SimProcess, "_make_ports", with_watch)
    # periods of 30 ms, since a run has seconds
    monkeypatch.setattr(watch, "DAY_MS", 1)
    for seed in range(40):
        assert simulate(seed).problems == []
    assert all([each.missed, each.caught] == each.model for each in watches)
    assert sum(each.missed for each in watches) > 10
    assert sum(each.caught for each in watches) > 10


def test_the_shipped_schema_has_what_the_watch_reads(bundle: Bundle) -> None:
    fields = bundle.schema.label_fields()
    roles = bundle.schema.roles
    assert {roles.transaction_id, roles.card, roles.event_time, bundle.schema.label.field} <= set(fields)
