"""The watch over lag; the consumers here are fakes that inject what a dead fetcher or a lost broker looks like."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cascade.errors import BrokerError
from streaming.health_state import HealthState
from streaming.kafka import Partition
from streaming.service.lag import LagCollector, LagWatch
from tests.timing import wait_until

HERE: Partition = ("transactions", 0)
THERE: Partition = ("transactions", 1)


class FakeEnds:
    """Stands for a consumer that is asked for nothing but the ends of the log."""

    def __init__(self) -> None:
        self.ends: dict[Partition, int] = {}
        self.lost = False
        self.closed = 0
        self.asked: list[Partition] = []

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        if self.lost:
            raise BrokerError("injected: the broker is gone")
        self.asked = list(partitions)
        return {partition: self.ends[partition] for partition in self.asked}

    def close(self) -> None:
        self.closed += 1


class Scene:
    def __init__(self) -> None:
        self.now_s, self.broker = 0.0, FakeEnds()
        self.positions: dict[Partition, int] | None = None
        self.health = HealthState(60, lambda: 0.0)
        self.lost: list[str] = []
        self.watch = LagWatch(
            lambda: self.broker,  # type: ignore[arg-type, return-value]
            HERE[0], lambda: self.positions, self.health, 60, self.lost.append, clock=lambda: self.now_s,
        )  # fmt: skip

    def at(self, now_s: float, positions: dict[Partition, int] | None, ends: dict[Partition, int]) -> list[str]:
        self.now_s, self.positions, self.broker.ends = now_s, positions, ends
        self.watch.look()
        return self.health.not_alive()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_lag_without_progress_fails_liveness_within_the_bound(scene: Scene) -> None:
    for now_s in range(0, 61, 5):
        assert scene.at(now_s, {HERE: 7}, {HERE: 107}) == []
    assert scene.at(65, {HERE: 7}, {HERE: 250}) == [
        "partition transactions-0: no progress for 65 s with 243 records waiting"
    ]


def test_a_worker_that_is_slow_but_moves_is_alive(scene: Scene) -> None:
    for now_s in range(0, 600, 50):
        assert scene.at(now_s, {HERE: now_s}, {HERE: 10**9}) == []


def test_an_idle_partition_is_alive_however_long(scene: Scene) -> None:
    assert scene.at(0, {HERE: 7}, {HERE: 7}) == []
    assert scene.at(10_000, {HERE: 7}, {HERE: 7}) == []
    # the first record after the silence has the whole bound
    assert scene.at(10_005, {HERE: 7}, {HERE: 8}) == []
    assert scene.at(10_050, {HERE: 7}, {HERE: 8}) == []


def test_one_dead_partition_among_living_ones_is_named(scene: Scene) -> None:
    for now_s in range(0, 70, 5):
        found = scene.at(now_s, {HERE: 7, THERE: now_s}, {HERE: 9, THERE: 500})
    assert [line.split(":")[0] for line in found] == ["partition transactions-0"]


def test_progress_heals(scene: Scene) -> None:
    scene.at(0, {HERE: 7}, {HERE: 9})
    assert scene.at(61, {HERE: 7}, {HERE: 9}) != []
    assert scene.at(65, {HERE: 8}, {HERE: 9}) == []
    assert scene.health.components()["partition transactions-0"].text == "lag 1"


def test_a_lost_broker_is_not_the_loops_fault(scene: Scene) -> None:
    scene.at(0, {HERE: 7}, {HERE: 9})
    scene.broker.lost = True
    assert scene.at(61, {HERE: 7}, {HERE: 9}) == []
    assert scene.broker.closed == 1
    scene.broker.lost = False
    assert scene.at(65, {HERE: 7}, {HERE: 9}) == []
    assert scene.at(126, {HERE: 7}, {HERE: 9}) != []


def test_an_unreachable_broker_shows_in_health_at_once_and_in_the_loop_after_half_a_minute(scene: Scene) -> None:
    idle = {HERE: 7}
    scene.at(0, idle, idle)
    scene.broker.lost = True
    for now_s in range(5, 40, 5):
        scene.at(now_s, idle, idle)
        assert scene.lost == []
        assert scene.health.not_ready() == ["broker: injected: the broker is gone"]
    scene.at(40, idle, idle)
    assert scene.lost == ["injected: the broker is gone"]
    # the loop connects again, and has all the time again
    scene.at(45, None, {})
    scene.at(50, idle, idle)
    scene.at(75, idle, idle)
    scene.broker.lost = False
    scene.at(90, idle, idle)
    assert (len(scene.lost), scene.health.not_ready()) == (1, [])


def test_a_spare_notices_a_lost_broker_too(scene: Scene) -> None:
    scene.at(0, {}, {HERE: 7})
    assert scene.broker.asked == [HERE]
    scene.broker.lost = True
    for now_s in range(5, 45, 5):
        scene.at(now_s, {}, {})
        assert scene.health.not_ready() == ["broker: injected: the broker is gone"]
    assert scene.lost == ["injected: the broker is gone"]


def test_nothing_is_asked_while_no_worker_runs(scene: Scene) -> None:
    scene.broker.lost = True
    scene.at(0, None, {})
    assert scene.health.components() == {}


def test_revoked_partitions_are_forgotten_and_start_again(scene: Scene) -> None:
    scene.at(0, {HERE: 7}, {HERE: 9})
    assert scene.at(61, {HERE: 7}, {HERE: 9}) != []
    assert scene.at(62, {}, {HERE: 9}) == []
    assert "partition transactions-0" not in scene.health.components()
    assert scene.at(63, {HERE: 7}, {HERE: 9}) == []


def test_it_watches_by_itself_until_closed(scene: Scene) -> None:
    scene.positions, scene.broker.ends = {HERE: 1}, {HERE: 4}
    watch = LagWatch(
        lambda: scene.broker,  # type: ignore[arg-type, return-value]
        HERE[0], lambda: scene.positions, scene.health, 60, scene.lost.append, interval_s=0.01,
    )  # fmt: skip
    watch.start()
    wait_until(lambda: "partition transactions-0" in scene.health.components())
    watch.close()
    assert scene.health.components()["partition transactions-0"].text == "lag 3"
    assert scene.broker.closed == 1


def test_the_assigned_partitions_and_their_lag_are_metrics(scene: Scene) -> None:
    def lags() -> dict[str, float]:
        assigned, family = LagCollector(lambda: scene.positions, scene.watch.lags).collect()
        assert [sample.value for sample in assigned.samples] == [len(scene.positions or {})]
        return {sample.labels["partition"]: sample.value for sample in family.samples}

    assert lags() == {}
    scene.at(0, {HERE: 7, THERE: 9}, {HERE: 107, THERE: 9})
    assert lags() == {"0": 100.0, "1": 0.0}
    scene.at(5, {THERE: 9}, {THERE: 12})
    assert lags() == {"1": 3.0}
    scene.at(10, {}, {HERE: 107})
    assert lags() == {}
