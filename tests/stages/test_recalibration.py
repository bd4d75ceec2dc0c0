"""Another policy for a bundle, from the bundle alone: models and features stay, and the report follows the policy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from cascade.bundle import FILES, SHIPPED_BUNDLE, Bundle, load_bundle, write_bundle
from cascade.costs import Cell, Costs
from cascade.errors import BundleError
from cascade.policy import Escalation
from stages.commands import app
from stages.recalibration import Changes, read_report, readable, recalibrated
from stages.report import figures
from stages.validation import ValidationRows
from tests.stages.scored_rows import drawn_rows, policy_of

ROWS = drawn_rows(rows=6_000)


@pytest.fixture(scope="module")
def original(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped models with validation rows of ours, so that figures do not depend on the shipped bundle's."""
    directory = tmp_path_factory.mktemp("original") / "bundle"
    policy = policy_of(ROWS, Escalation(0.05, "gain", 0.0, -1.0))
    report = figures(ROWS, policy, seed=1).into(msgspec.structs.replace(read_report(bundle), seed=1))
    changed = {
        "policy.json": readable(policy),
        "validation.parquet": ROWS.to_parquet(),
        "report.json": readable(report),
    }
    write_bundle(directory, "mine", {**bundle.content, **changed})
    return load_bundle(directory)


def test_without_changes_the_bundle_stays_as_it_is(original: Bundle, tmp_path: Path) -> None:
    manifest, report = recalibrated(original, Changes(), tmp_path / "bundle")
    assert manifest.version == original.version
    assert [manifest.files[file] for file in FILES] == [original.manifest.files[file] for file in FILES]
    assert report == read_report(original)


def test_another_budget_is_another_threshold_and_nothing_else_is_trained(original: Bundle, tmp_path: Path) -> None:
    manifest, report = recalibrated(original, Changes(budget=0.02), tmp_path / "bundle")
    again = load_bundle(tmp_path / "bundle")
    assert again.version == manifest.version != original.version
    assert {file for file in FILES if again.content[file] != original.content[file]} == {"policy.json", "report.json"}
    assert again.policy == policy_of(ROWS, Escalation(0.02, "gain", 0.0, -1.0))
    assert again.policy.escalation.threshold > original.policy.escalation.threshold
    assert read_report(again) == report
    assert 0.018 < report.escalation_share <= 0.02
    assert report.cascade.average_precision.value < read_report(original).cascade.average_precision.value
    assert report.deep_only.average_precision == read_report(original).deep_only.average_precision


def test_the_report_keeps_what_does_not_depend_on_the_policy(original: Bundle, tmp_path: Path) -> None:
    _, report = recalibrated(original, Changes(budget=0.02), tmp_path / "bundle")
    before = read_report(original)
    for name in ("schema", "seed", "train", "validation", "features", "screener", "rule", "versions"):
        assert getattr(report, name) == getattr(before, name)


def test_a_dearer_review_is_done_less_often(original: Bundle, tmp_path: Path) -> None:
    _, report = recalibrated(original, Changes(review_cost=50.0), tmp_path / "bundle")
    policy = load_bundle(tmp_path / "bundle").policy
    assert policy.costs == Costs(review_fraud=Cell(50.0), review_genuine=Cell(50.0))
    assert policy.review_from > original.policy.review_from
    before = read_report(original).cascade
    assert report.cascade.reviews_per_day.value < 0.5 * before.reviews_per_day.value


def test_reviews_a_day_are_a_bound(original: Bundle, tmp_path: Path) -> None:
    bound = 0.5 * read_report(original).cascade.reviews_per_day.value
    _, report = recalibrated(original, Changes(reviews_per_day_max=bound), tmp_path / "bundle")
    assert 0.5 * bound < report.cascade.reviews_per_day.value <= bound


def test_a_change_replaces_a_cell_and_keeps_the_rest() -> None:
    costs = Costs(review_fraud=Cell(4.0, 0.1), decline_genuine=Cell(20.0, 0.05), reviews_per_day_max=9.0)
    assert Changes().of_costs(costs) == costs
    assert Changes(review_cost=7.0).of_costs(costs) == msgspec.structs.replace(
        costs, review_fraud=Cell(7.0, 0.1), review_genuine=Cell(7.0)
    )
    declined = Changes(false_decline_cost=0.0).of_costs(costs)
    assert declined == msgspec.structs.replace(costs, decline_genuine=Cell(0.0, 0.05))
    assert Changes(reviews_per_day_max=0.0).of_costs(costs).reviews_per_day_max == 0.0


@pytest.mark.parametrize("file", ["report.json", "validation.parquet"])
def test_a_bundle_whose_report_or_rows_cannot_be_read_is_refused_with_the_file(
    original: Bundle, tmp_path: Path, file: str
) -> None:
    broken = dataclasses.replace(original, content={**original.content, file: b"{}"})
    with pytest.raises(BundleError, match=rf"{file}: .*; train the bundle again$") as caught:
        recalibrated(broken, Changes(), tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_the_shipped_bundle_can_be_recalibrated(bundle: Bundle, tmp_path: Path) -> None:
    rows = ValidationRows.from_parquet(bundle.content["validation.parquet"], "validation.parquet")
    assert len(rows) == read_report(bundle).validation.transactions
    assert int(rows.fraud.sum()) == read_report(bundle).validation.frauds
    result = CliRunner().invoke(
        app,
        ["recalibrate", "--bundle", str(SHIPPED_BUNDLE), "--out", str(tmp_path / "b"), "--budget", "0.02", "--json"],
    )
    assert result.exit_code == 0, result.output
    assert 0.015 < json.loads(result.stdout)["escalation_share"] <= 0.02
    assert load_bundle(tmp_path / "b").policy.escalation.budget == 0.02
