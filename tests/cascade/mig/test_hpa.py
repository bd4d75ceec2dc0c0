"""The autoscaler's rules, case by case as Kubernetes documents them."""

from __future__ import annotations

import pytest

from cascade.mig.hpa import Autoscaler, Behavior, Limit

DEFAULT = Behavior(replicas_min=1, replicas_max=100)


@pytest.mark.parametrize(
    ("total", "wanted"), [(10.9, 10), (9.1, 10), (11.2, 12), (8.9, 10)], ids=["in", "in", "up", "down waits"]
)
def test_a_metric_within_a_tenth_of_its_target_changes_nothing(total: float, wanted: int) -> None:
    assert Autoscaler(DEFAULT, 10).sync(0.0, [(total, 1.0)]) == wanted


def test_replicas_double_or_grow_by_four_in_fifteen_seconds_whichever_is_more() -> None:
    autoscaler = Autoscaler(DEFAULT, 1)
    assert [autoscaler.sync(15.0 * turn, [(90.0, 1.0)]) for turn in range(5)] == [5, 10, 20, 40, 80]


def test_a_policy_counts_what_was_added_within_its_period() -> None:
    slow = Behavior(replicas_min=1, replicas_max=100, up=(Limit(pods=2, period_s=60.0),))
    autoscaler = Autoscaler(slow, 3)
    assert [autoscaler.sync(15.0 * turn, [(50.0, 1.0)]) for turn in range(6)] == [5, 5, 5, 5, 7, 7]


def test_the_largest_metric_decides_and_the_maximum_caps_it() -> None:
    capped = Behavior(replicas_min=2, replicas_max=7)
    assert Autoscaler(capped, 5).sync(0.0, [(3.0, 1.0), (60.0, 10.0)]) == 6
    assert Autoscaler(capped, 5).sync(0.0, [(900.0, 1.0)]) == 7
    assert Autoscaler(capped, 2).sync(0.0, [(0.0, 1.0)]) == 2


def test_scaling_down_waits_for_the_whole_window_and_then_takes_its_largest_wish() -> None:
    autoscaler = Autoscaler(DEFAULT, 8)
    assert {autoscaler.sync(15.0 * turn, [(4.0, 1.0)]) for turn in range(20)} == {8}
    # the replicas of the beginning count as a wish, and now 300 s have passed
    assert autoscaler.sync(300.0, [(2.0, 1.0)]) == 4
    assert autoscaler.sync(570.0, [(2.0, 1.0)]) == 4
    assert autoscaler.sync(585.0, [(2.0, 1.0)]) == 2


def test_a_policy_for_scaling_down_takes_one_pod_at_a_time() -> None:
    patient = Behavior(replicas_min=1, replicas_max=9, down=(Limit(pods=1, period_s=60.0),), down_window_s=0.0)
    autoscaler = Autoscaler(patient, 5)
    assert [autoscaler.sync(15.0 * turn, [(1.0, 1.0)]) for turn in range(6)] == [4, 4, 4, 4, 3, 3]
