"""The validation rows of a bundle: the file gives back what it got, and holds no identity of a card."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import msgspec
import numpy as np
import polars as pl
import pytest

from cascade.errors import BundleError
from cascade.escalation_budget import EscalationBudget
from cascade.features.spec import DAY_MS
from cascade.policy import RAW_MAX, Escalation
from stages.validation import ValidationRows
from tests.stages.scored_rows import drawn_rows, policy_of


def some_rows(card: list[int], time_ms: list[int] | None = None) -> ValidationRows:
    rows = len(card)
    values = np.arange(rows) / 3.0
    return ValidationRows.of(
        np.array(time_ms if time_ms is not None else [0] * rows),
        np.array(card),
        np.arange(rows) % 2 == 0,
        *(values + shift for shift in range(4)),
    )


def test_what_is_written_is_what_is_read() -> None:
    rows = drawn_rows(rows=3_000)
    content = rows.to_parquet()
    again = ValidationRows.from_parquet(content, "validation.parquet")
    for field in fields(ValidationRows):
        found, written = getattr(again, field.name), getattr(rows, field.name)
        np.testing.assert_array_equal(found, written, err_msg=field.name)
        assert found.dtype == written.dtype, field.name
    assert again.to_parquet() == content
    assert len(again) == 3_000


def test_the_policy_of_the_file_is_the_policy_of_the_rows() -> None:
    # scores are rounded before calibration, not only when they are stored
    rows = drawn_rows()
    assert policy_of(ValidationRows.from_parquet(rows.to_parquet(), "file")) == policy_of(rows)


def test_cards_are_numbered_in_order_of_appearance() -> None:
    rows = some_rows([7_001, -3, 7_001, 12, -3, 99])
    assert rows.card.tolist() == [0, 1, 0, 2, 1, 3]
    columns = pl.read_parquet(io.BytesIO(rows.to_parquet()))
    assert not {7_001, -3, 12, 99} & set(columns["card"].to_list())
    assert set(columns.columns) == {"day", "card", "fraud", "amount", "screener_raw", "deep_raw", "gain"}


def test_days_are_those_of_utc_and_counted_from_the_first_to_the_last() -> None:
    rows = some_rows([1, 1, 1, 1], [5 * DAY_MS - 1, 5 * DAY_MS, 5 * DAY_MS, 9 * DAY_MS + 7])
    assert rows.day.tolist() == [4, 5, 5, 9]
    assert rows.days == 6


def test_scores_and_amounts_are_rounded_to_float32() -> None:
    rows = ValidationRows.of(
        np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, bool), *(np.array([0.1]) for _ in range(4))
    )
    for name in ("amount", "screener_raw", "deep_raw", "gain"):
        value = getattr(rows, name)
        assert value.dtype == np.float64
        assert value.tolist() == [float(np.float32(0.1))]


@pytest.mark.parametrize("rule", ["gain", "uncertainty"])
def test_the_cascade_takes_both_scores_of_rows_that_the_budget_lets_through_and_of_no_other(rule: str) -> None:
    rows = drawn_rows(rows=30_000)
    policy = policy_of(rows, Escalation(0.01, rule, 0.0, -1.0))  # type: ignore[arg-type]
    score = rows.gain if rule == "gain" else -np.abs(rows.screener_raw + 1.0)
    np.testing.assert_array_equal(rows.escalation_score(policy.escalation), score)
    chosen = rows.escalated(policy)
    np.testing.assert_array_equal(chosen, EscalationBudget(0.01, policy.escalation.threshold).choose(score))
    assert 290 <= chosen.sum() <= 300
    probability = rows.cascade(policy)
    combined = policy.combined.probability(rows.screener_raw, rows.deep_raw)
    np.testing.assert_array_equal(probability[chosen], combined[chosen])
    np.testing.assert_array_equal(probability[~chosen], policy.screener.probability(rows.screener_raw)[~chosen])


def test_a_burst_is_not_all_escalated_however_high_its_scores() -> None:
    # the highest hundredth of all rows comes at once
    rows = drawn_rows(rows=30_000)
    gain = np.where(np.arange(30_000) // 300 == 50, 1_000.0, 0.0) + rows.gain
    burst = replace(rows, gain=gain)
    policy = policy_of(burst, Escalation(0.01, "gain", 0.0))
    above = gain > policy.escalation.threshold
    assert above[15_000:15_300].all()
    assert above.sum() == 300
    chosen = burst.escalated(policy)
    assert 1 <= chosen[15_000:15_300].sum() <= 14
    counts = np.concatenate([[0], np.cumsum(chosen)])
    windows = counts[10_000:] - counts[:-10_000]
    assert 90 <= windows.min() <= windows.max() <= 110


def test_a_threshold_at_either_end_escalates_everything_or_nothing() -> None:
    rows = some_rows([1, 2, 3])
    policy = policy_of(drawn_rows(rows=2_000), Escalation(0.1, "gain", 0.0))
    for threshold, escalated in ((-RAW_MAX, 3), (RAW_MAX, 0)):
        at = msgspec.structs.replace(policy.escalation, threshold=threshold)
        assert rows.escalated(msgspec.structs.replace(policy, escalation=at)).sum() == escalated


WHOLE = drawn_rows(rows=500).to_parquet()


def without(column: str) -> bytes:
    target = io.BytesIO()
    pl.read_parquet(io.BytesIO(WHOLE)).drop(column).write_parquet(target)
    return target.getvalue()


def changed(**columns: pl.Expr) -> bytes:
    target = io.BytesIO()
    pl.read_parquet(io.BytesIO(WHOLE)).with_columns(**columns).write_parquet(target)
    return target.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no parquet",
        WHOLE[:-100],
        WHOLE[: len(WHOLE) // 2],
        b"PAR1" + WHOLE[200:],
        without("deep_raw"),
        without("card"),
        changed(fraud=pl.lit("yes")),
        changed(gain=pl.lit(None, pl.Float32)),
        changed(day=pl.col("day").cast(pl.Float32)),
    ],
    ids=["empty", "text", "cut", "half", "damaged", "a column less", "no cards", "text", "nulls", "fractions"],
)
def test_a_broken_file_is_one_line_with_its_name(content: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        ValidationRows.from_parquet(content, "bundle/validation.parquet")
    line = str(caught.value)
    assert line.startswith("bundle/validation.parquet: cannot be read (")
    assert line.endswith("; train the bundle again")
    assert "\n" not in line
