"""The escalated share holds over every window, for any scores, and the best of them are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.columns import Bool, Float64
from cascade.escalation_budget import (
    CAPACITY_MIN,
    SAMPLE_ROWS_MIN,
    SHARE_MAX,
    STEPS,
    WINDOW_ROWS,
    EscalationBudget,
    shares_by_level,
)
from cascade.policy import RAW_MAX, Calibration, Combination, Escalation, Policy

ROWS = 60_000
BUDGETS = (0.0005, 0.0025, 0.01, 0.05, 0.3, 0.9)


def chosen(control: EscalationBudget, scores: Float64, sizes: int | None = None) -> Bool:
    """Chooses in micro-batches of up to `sizes` rows, at random; None: all rows at once."""
    if sizes is None:
        return control.choose(scores)
    chance, start, masks = np.random.default_rng(sizes), 0, []
    while start < len(scores):
        rows = scores[start : start + int(chance.integers(1, sizes + 1))]
        masks.append(control.choose(rows))
        start += len(rows)
    return np.concatenate(masks)


def worst(escalate: Bool, budget: float) -> float:
    """The greatest difference of any window's count from the budget: brute force over windows of many lengths."""
    counts = np.concatenate([[0], np.cumsum(escalate)])
    found = 0.0
    for rows in (1, 7, 100, 1_000, 9_999, WINDOW_ROWS, 25_000):
        window = counts[rows:] - counts[:-rows]
        found = max(found, float(np.abs(window - budget * rows).max()))
    return found


def stream(name: str) -> Float64:
    chance, row = np.random.default_rng(3), np.arange(ROWS)
    noise = chance.standard_normal(ROWS)
    return {
        "stationary": noise,
        "constant": np.full(ROWS, 1.5),
        "two values": np.where(noise > 2.5, 1.0, 0.0),
        "increasing": row.astype(np.float64),
        "decreasing": -row.astype(np.float64),
        "day's curve": noise + 3.0 * np.sin(row / 30_000 * 2 * np.pi),
        "bursts": noise + 8.0 * (row % 15_000 < 700),
        "drift twice": noise + 5.0 * (row > 20_000) - 9.0 * (row > 40_000),
        "another scale": np.where(row < 30_000, noise, 1e6 * noise - 1e9),
        "sawtooth": (row % 97).astype(np.float64),
        "all far below the threshold": noise - 1e9,
        "all far above the threshold": noise + 1e9,
        "infinite": np.where(noise > 0, np.inf, -RAW_MAX),
    }[name]


STREAMS = (
    "stationary", "constant", "two values", "increasing", "decreasing", "day's curve", "bursts", "drift twice",
    "another scale", "sawtooth", "all far below the threshold", "all far above the threshold", "infinite",
)  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", STREAMS)
def test_no_window_leaves_the_budget_by_more_than_the_bucket(name: str, budget: float) -> None:
    control = EscalationBudget(budget, threshold=2.33)
    escalate = chosen(control, stream(name), 5_000)
    assert worst(escalate, budget) <= control.capacity + 1e-6


@pytest.mark.parametrize("name", STREAMS)
def test_a_budget_of_one_per_cent_escalates_90_to_110_of_any_ten_thousand(name: str) -> None:
    escalate = chosen(EscalationBudget(0.01, 2.33), stream(name))
    counts = np.concatenate([[0], np.cumsum(escalate)])
    window = counts[WINDOW_ROWS:] - counts[:-WINDOW_ROWS]
    assert window.min() >= 90
    assert window.max() <= 110


@pytest.mark.parametrize("sizes", [1, 2, 64, 1_024, 5_000])
@pytest.mark.parametrize("name", ["stationary", "bursts", "drift twice", "two values"])
def test_the_cut_into_micro_batches_changes_nothing(name: str, sizes: int) -> None:
    scores = stream(name)[:20_000]
    whole = chosen(EscalationBudget(0.01, 2.33), scores)
    np.testing.assert_array_equal(chosen(EscalationBudget(0.01, 2.33), scores, sizes), whole)


@settings(max_examples=150, deadline=None)
@given(
    budget=st.sampled_from([0.001, 0.01, 0.07, 0.4, 0.99]),
    threshold=st.sampled_from([-5.0, 0.0, 3.0]),
    parts=st.lists(
        st.tuples(
            st.integers(1, 3_000),
            st.sampled_from(["noise", "constant", "rising", "falling", "spikes"]),
            st.floats(-1e3, 1e3),
            st.floats(0.0, 1e3),
        ),
        min_size=1,
        max_size=8,
    ),
    sizes=st.sampled_from([1, 13, 1_000, 5_000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_stream_stays_within_the_bucket(
    budget: float, threshold: float, parts: list[tuple[int, str, float, float]], sizes: int, seed: int
) -> None:
    chance, scores = np.random.default_rng(seed), []
    for rows, shape, centre, width in parts:
        unit = {
            "noise": chance.standard_normal(rows),
            "constant": np.zeros(rows),
            "rising": np.linspace(-1, 1, rows),
            "falling": np.linspace(1, -1, rows),
            "spikes": (chance.random(rows) < 0.02).astype(np.float64),
        }[shape]
        scores.append(centre + width * unit)
    control = EscalationBudget(budget, threshold)
    escalate = chosen(control, np.concatenate(scores), sizes)
    counts = np.concatenate([[0], np.cumsum(escalate)])
    surplus = counts - budget * np.arange(len(counts))
    # the range of a running sum bounds every window of every length
    assert surplus.max() - surplus.min() <= control.capacity + 1e-6
    assert surplus.max() <= 1e-6, "it begins with an empty bucket"


@pytest.mark.parametrize("factor", [0.5, 0.0625])
def test_a_lower_factor_holds_that_part_of_the_budget_from_the_next_row_on(factor: float) -> None:
    control, scores = EscalationBudget(0.02, 2.0), stream("stationary")
    chosen(control, scores[:30_000])
    control.factor = factor
    lowered = chosen(control, scores[30_000:])
    assert worst(lowered, 0.02 * factor) <= control.capacity + 1e-6
    assert control.capacity == max(1_000 * 0.02 * factor, CAPACITY_MIN)
    control.factor = 1.0
    assert worst(chosen(control, scores), 0.02) <= control.capacity + 1e-6 == 20.0 + 1e-6


def test_tokens_above_a_smaller_bucket_are_gone() -> None:
    control = EscalationBudget(0.02, 1e9)
    assert not chosen(control, np.zeros(120)).any()
    assert 2.0 < control.level < 2.5
    control.factor = 0.0625
    assert control.level == control.capacity == 2.0


def test_a_budget_of_one_escalates_everything_but_what_must_not_be_and_zero_nothing() -> None:
    scores = np.array([-1e300, 0.0, np.inf, -np.inf])
    assert chosen(EscalationBudget(1.0, 5.0), scores).tolist() == [True, True, True, False]
    assert chosen(EscalationBudget(0.0, -5.0), scores).tolist() == [False] * 4
    for budget in (0.0, 1.0):
        control = EscalationBudget(budget, 0.0)
        control.factor = 0.25
        assert chosen(control, scores[:3]).tolist() == [budget == 1.0] * 3, "overload changes neither"


@pytest.mark.parametrize(("threshold", "share"), [(-RAW_MAX, 1.0), (RAW_MAX, 0.0), (0.5, 0.01)])
def test_a_policy_that_escalates_everything_or_nothing_does_so_whatever_its_budget(
    threshold: float, share: float
) -> None:
    same = Calibration(1.0, 0.0)
    policy = Policy(Escalation(0.01, "gain", threshold), same, Combination(0.5, 0.5, 0.0), same, 0.5, 0.9)
    escalate = chosen(EscalationBudget.of_policy(policy), stream("stationary"))
    assert escalate[-WINDOW_ROWS:].mean() == pytest.approx(share, rel=0.1)


def test_rows_that_must_not_be_escalated_are_not_and_the_others_take_their_share() -> None:
    scores = stream("stationary")
    forbidden = scores > 2.0
    escalate = chosen(EscalationBudget(0.01, 1.0), np.where(forbidden, -np.inf, scores))
    assert not escalate[forbidden].any()
    assert worst(escalate, 0.01) <= 10.0 + 1.0


def test_only_forbidden_rows_escalate_nothing_and_leave_no_debt() -> None:
    control = EscalationBudget(0.01, 0.0)
    assert not chosen(control, np.full(30_000, -np.inf)).any()
    assert control.level == control.capacity
    assert chosen(control, stream("stationary")[:WINDOW_ROWS]).sum() <= 110


def test_rows_escalated_before_stay_so_and_are_paid_back() -> None:
    control = EscalationBudget(0.01, 2.33)
    earlier = control.choose(np.full(50, -np.inf), np.ones(50, bool))
    assert earlier.all()
    assert control.level == pytest.approx(-49.5)
    after = chosen(control, stream("stationary")[:WINDOW_ROWS])
    assert not after[:5_000].any()
    assert 40 <= after.sum() <= 51
    for budget in (0.0, 1.0):
        assert EscalationBudget(budget, 0.0).choose(np.array([-np.inf]), np.array([True])).all()


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        chosen(EscalationBudget(0.01, 0.0), np.array([0.0, np.nan]))


@pytest.mark.parametrize("budget", [-0.1, 1.1, np.nan])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        EscalationBudget(budget, 0.0)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5, np.nan])
def test_a_factor_that_is_no_part_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        EscalationBudget(0.1, 0.0).factor = factor


def test_until_the_sample_says_something_the_policys_threshold_chooses() -> None:
    control = EscalationBudget(0.2, threshold=1.0)
    scores = np.where(np.arange(SAMPLE_ROWS_MIN) % 10 == 9, 1.5, 0.9)
    assert np.flatnonzero(chosen(control, scores)).tolist() == list(range(9, SAMPLE_ROWS_MIN, 10))


def test_the_threshold_follows_the_scores_so_that_the_best_are_chosen_before_and_after_a_drift() -> None:
    scores = stream("drift twice")
    escalate = chosen(EscalationBudget(0.01, 2.33), scores)
    for part in (slice(5_000, 20_000), slice(25_000, 40_000), slice(45_000, 60_000)):
        excess = scores[part] - scores[part].mean()
        best = np.sort(excess)[-150:].sum()
        assert excess[escalate[part]].sum() > 0.95 * best


def test_a_group_of_equal_scores_larger_than_the_budget_gets_all_of_it() -> None:
    chance = np.random.default_rng(1)
    scores = (chance.random(ROWS) < 0.02).astype(np.float64)
    escalate = chosen(EscalationBudget(0.01, 0.5), scores)
    assert scores[escalate].mean() > 0.99


def test_a_small_group_above_equal_scores_is_escalated_whole_and_the_others_only_from_a_full_bucket() -> None:
    chance = np.random.default_rng(1)
    scores = (chance.random(ROWS) < 0.005).astype(np.float64)
    escalate = chosen(EscalationBudget(0.01, 0.5), scores)
    assert escalate[scores == 1.0][20:].all()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_fuller_bucket_lowers_the_threshold(budget: float) -> None:
    shares = shares_by_level(budget, max(1_000 * budget, CAPACITY_MIN))
    assert len(shares) == STEPS
    assert (np.diff(shares) >= 0).all()
    assert shares[0] < budget < shares[-1]
    assert shares[-1] <= min(SHARE_MAX * budget, 1.0) * (1 + 1e-12)
    middle = math.sqrt(shares[STEPS // 2 - 1] * shares[STEPS // 2])
    assert middle == pytest.approx(budget, rel=1e-3)
