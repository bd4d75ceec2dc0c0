from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from io import StringIO

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.certificate import shops
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.certificate import CERTIFICATE_FORMAT, Certificate, parse_certificate
from cascade.errors import BundleError, CascadeError, DataError
from cascade.features.spec import DAY_MS
from stages.certificate import Asked, LabelledDecisions
from stages.certificate.certify import Source, make_certificate, rows_to_judge
from stages.certificate.render import show_certificate
from tests.bundle_certificate import first_unseen_day, made_up_certificate

# the first day after the shipped bundle's validation data
BEGIN = first_unseen_day(load_bundle(SHIPPED_BUNDLE))
ASKED = Asked(keep_frauds=0.9, keep_precision=0.5, escalated=0.2, false_alarms=9.0, replicates=10)
SOURCE = Source("later.parquet", "ab" * 32, "replay", int(BEGIN.timestamp() * 1e3) - 40 * DAY_MS, "cascade certify")


def times(*days: float) -> np.ndarray:
    return np.array([BEGIN.timestamp() * 1e3 + day * DAY_MS for day in days]).astype(np.int64)


def line(error: pytest.ExceptionInfo[CascadeError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("later.parquet: ")
    return text


def test_by_default_the_rows_after_the_bundles_own_data_are_judged(bundle: Bundle) -> None:
    judged = rows_to_judge(bundle, times(-90, -0.5, 0, 3, 9), None, None, "later.parquet")
    assert judged.tolist() == [False, False, True, True, True]
    days = BEGIN + timedelta(days=2), BEGIN + timedelta(days=5)
    assert rows_to_judge(bundle, times(-90, 0, 3, 9), *days, "later.parquet").tolist() == [False, False, True, False]


def test_rows_that_training_or_validation_saw_are_refused(bundle: Bundle) -> None:
    with pytest.raises(DataError) as caught:
        rows_to_judge(bundle, times(-90, -40, -0.5, 3), BEGIN - timedelta(days=60), None, "later.parquet")
    text = line(caught)
    assert f"2 of the rows are from before {BEGIN:%Y-%m-%d}" in text
    assert f"--from {BEGIN:%Y-%m-%d}" in text


def test_a_file_that_ends_before_is_refused(bundle: Bundle) -> None:
    with pytest.raises(DataError) as caught:
        rows_to_judge(bundle, times(-90, -0.5), None, None, "later.parquet")
    assert "no rows between" in line(caught)


def test_a_report_without_spans_is_refused(bundle: Bundle) -> None:
    other = replace(bundle, content={**bundle.content, "report.json": b"{}"})
    with pytest.raises(BundleError, match=r"report\.json: has no spans"):
        rows_to_judge(other, times(1), None, None, "later.parquet")


def decisions() -> LabelledDecisions:
    """Shops in 42 days that the bundle has not seen."""
    world = shops(np.random.default_rng(1))
    return LabelledDecisions(
        **{name: getattr(world, name) for name in world.__slots__ if name != "time_ms"},
        time_ms=world.time_ms + int(times(0)[0]),
    )


def certificate(bundle: Bundle, asked: Asked = ASKED, of: LabelledDecisions | None = None) -> Certificate:
    judged = decisions() if of is None else of
    return make_certificate(bundle, judged, asked, SOURCE, 90 * DAY_MS, now=BEGIN + timedelta(days=50))


def test_the_certificate_has_the_data_the_claims_and_its_end(bundle: Bundle) -> None:
    made, judged = certificate(bundle), decisions()
    evidence = made.evidence
    assert made.bundle_version == bundle.version
    assert [claim.name for claim in made.claims] == ["frauds", "average precision", "escalated", "false alarms"]
    assert made.holds == all(claim.holds for claim in made.claims)
    assert (evidence.transactions, evidence.frauds, evidence.days) == (len(judged.fraud), judged.fraud.sum(), 42)
    assert evidence.lost == (judged.fraud & judged.by_deep & ~judged.by_cascade).sum()
    assert evidence.caught == evidence.caught_by_deep - evidence.lost + evidence.gained
    assert evidence.history_days == pytest.approx(40, abs=1)
    assert made.expires == evidence.last + timedelta(days=90)
    assert f"{made.recall.at_least:.1%}" in made.ends_earlier


def test_too_few_frauds_are_refused_with_the_number_that_is_needed(bundle: Bundle) -> None:
    with pytest.raises(DataError) as caught:
        certificate(bundle, msgspec.structs.replace(ASKED, keep_frauds=0.999))
    found = int((decisions().fraud & decisions().by_deep).sum())
    assert f"deep-only catches {found:,} frauds" in line(caught)
    assert "at least 2,995 are needed" in line(caught)


def test_too_few_days_are_refused(bundle: Bundle) -> None:
    whole = decisions()
    part = whole.day < whole.day[0] + 5
    few = LabelledDecisions(**{name: getattr(whole, name)[part] for name in whole.__slots__})
    with pytest.raises(DataError) as caught:
        certificate(bundle, msgspec.structs.replace(ASKED, keep_frauds=0.5), few)
    assert "5 days to judge, and at least 14" in line(caught)


def test_what_is_written_is_what_is_read(bundle: Bundle) -> None:
    made = certificate(bundle)
    assert parse_certificate(made.to_json(), bundle.version, "certificate.json") == made


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": CERTIFICATE_FORMAT + 1}, "is unknown to this release"),
        ({"confidence": "high"}, "confidence"),
        ({"news": 1}, "news"),
        ({"bundle_version": "other-1"}, "is of bundle other-1"),
    ],
)
def test_what_is_no_certificate_of_the_bundle_is_refused(change: dict[str, object], reason: str) -> None:
    content = json.loads(made_up_certificate("mine-1").to_json()) | change
    with pytest.raises(BundleError, match=reason) as caught:
        parse_certificate(json.dumps(content).encode(), "mine-1", "certificate.json")
    assert "\n" not in str(caught.value)
    assert "cascade certify" in str(caught.value)


def shown(certificate: Certificate, now: datetime = BEGIN) -> str:
    output = StringIO()
    show_certificate(certificate, Console(file=output, width=80, force_terminal=True, color_system=None), now)
    return output.getvalue()


def test_a_manager_reads_asked_found_shown_and_the_verdict_in_80_columns() -> None:
    text = shown(made_up_certificate("made-up-0123456789ab"))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = {row.split("  ")[0].strip(): row for row in text.splitlines() if "≥" in row or "≤" in row}
    assert "≥ 99 %   99.6 %       ≥ 98.1 %   not shown" in rows["frauds kept"]
    # 0.931 % and 105.1 %: rounded to the side that claims less
    assert "≤ 1 %   0.94 %       ≤ 0.99 %   shown" in rows["escalated *"]
    assert "≤ 1.05     1.01         ≤ 1.06   not shown" in rows["false alarms × deep-only *"]
    assert "Not shown: frauds kept, false alarms × deep-only." in text
    assert "12,998" in text


def test_an_expired_certificate_says_so() -> None:
    made = made_up_certificate("mine", expires=BEGIN)
    assert f"expires {BEGIN:%Y-%m-%d}" in shown(made, BEGIN - timedelta(seconds=1))
    assert f"It expired on {BEGIN:%Y-%m-%d}" in shown(made, BEGIN)
