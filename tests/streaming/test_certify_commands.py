"""`cascade certify` on a copy of the shipped bundle, and on simulated data that goes on after the bundle's own."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cascade import cli
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.errors import DataError
from cascade.frames import LabelledData, read_labelled
from cascade.policy import ACTIONS
from cascade.protocols import DeepStage
from cascade.simulator import SimulatorSettings, simulate
from stages.assembly import make_engine
from stages.certificate import LabelledDecisions, replayed
from stages.offline import OfflineScores, score_offline
from streaming.evaluation import labelled_decisions
from streaming.pipeline.decisions import plain_ids
from tests.bundle_certificate import first_unseen_day

BEGIN = first_unseen_day(load_bundle(SHIPPED_BUNDLE))
EASY = ("--keep", "0.5", "--escalated", "0.5", "--false-alarms", "20")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "later.parquet"
    start = (BEGIN - timedelta(days=30)).date()
    settings = SimulatorSettings(cards=150, terminals=150, days=60, start=start, fraud_share=0.04, seed=8)
    simulate(settings).write_parquet(path)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle"))


def day(number: int) -> str:
    """So many days after the bundle's own data."""
    return f"{BEGIN + timedelta(days=number):%Y-%m-%d}"


def certify(bundle: Path, data: Path, *options: str) -> int:
    return cli.main(["certify", "--bundle", str(bundle), "--data", str(data), *options])


def test_the_certificate_is_written_printed_and_shown_again(
    copy: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certify(copy, data, *EASY, "--from", day(1), "--until", day(29)) == 0
    printed = capsys.readouterr().out
    bundle = load_bundle(copy)
    certificate = bundle.certificate()
    assert certificate is not None
    assert bundle.version == load_bundle(SHIPPED_BUNDLE).version
    assert certificate.evidence.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert (certificate.evidence.file, certificate.evidence.decisions) == ("later.parquet", "replay")
    assert f"{certificate.evidence.first:%Y-%m-%d} {certificate.evidence.last:%Y-%m-%d}" == f"{day(1)} {day(28)}"
    assert certificate.command == (
        f"cascade certify --bundle bundle --data later.parquet --from {day(1)} --until {day(29)} --confidence 0.95"
        " --keep 0.5 --escalated 0.5 --false-alarms 20.0 --valid 90d"
    )
    assert "frauds kept" in printed
    assert cli.main(["bundle", "certificate", str(copy)]) == 0
    assert "frauds kept" in capsys.readouterr().out


def test_a_claim_that_is_not_shown_ends_with_status_1_and_is_written(
    copy: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certify(copy, data, "--keep", "0.5", "--escalated", "0.000001", "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    certificate = load_bundle(copy).certificate()
    assert certificate is not None
    assert not certificate.holds
    assert json.loads(certificate.to_json()) == printed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--from", day(-10)), f"--from {day(0)} or later"),
        (("--until", day(-10)), "no rows between"),
        (("--keep", "0.999"), "at least 2,995 are needed"),
        (("--until", day(8), "--keep", "0.5"), "needed"),
    ],
)
def test_data_that_cannot_certify_is_refused_in_a_line_and_the_bundle_stays(
    copy: Path, data: Path, options: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "manifest.json").read_bytes()
    assert certify(copy, data, *options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cascade certify: ")
    assert reason in last
    assert (copy / "manifest.json").read_bytes() == before


def test_a_bundle_without_a_certificate_has_none_to_print(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bundle", "certificate", str(copy)]) == 1
    assert "has no certificate; run `cascade certify`" in capsys.readouterr().err


@dataclass(frozen=True)
class Scored:
    """The last rows of the data, and the decisions topic of a service that decided them."""

    data: LabelledData
    within: np.ndarray
    scores: OfflineScores
    topic: pl.DataFrame


@pytest.fixture(scope="module")
def scored(data: Path, bundle: Bundle, deep: DeepStage) -> Scored:
    labelled = read_labelled(data, bundle.schema)
    within = np.arange(labelled.batch.rows) >= labelled.batch.rows - 3_000
    scores = score_offline(make_engine(bundle), deep, labelled, within, lambda _: None)
    probability, escalated = scores.cascade(bundle.policy)
    actions = bundle.policy.actions(probability)
    topic = pl.DataFrame(
        {
            "transaction_id": plain_ids(labelled.batch[bundle.schema.roles.transaction_id][scores.rows]),
            "score": probability,
            "stage": np.where(escalated, "deep", "screener"),
            "decision": [ACTIONS[action] for action in actions],
            "degraded": np.zeros(len(actions), bool),
            "bundle": bundle.version,
        }
    )
    return Scored(labelled, within, scores, topic)


def read(scored: Scored, topic: pl.DataFrame, bundle: Bundle, deep: DeepStage) -> LabelledDecisions:
    return labelled_decisions(topic, scored.data, scored.within, bundle, deep, lambda *_: None)


def test_decisions_of_the_topic_are_those_of_the_replay(scored: Scored, bundle: Bundle, deep: DeepStage) -> None:
    found = read(scored, scored.topic.sample(fraction=1.0, shuffle=True, seed=1), bundle, deep)
    expected = replayed(bundle, scored.data, scored.scores)
    for name in expected.__slots__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert expected.by_cascade.any()
    assert expected.escalated.any()


def test_what_the_service_decided_counts_and_a_degraded_decision_was_escalated(
    scored: Scored, bundle: Bundle, deep: DeepStage
) -> None:
    changed = scored.topic.with_columns(decision=pl.lit("approve"), degraded=pl.lit(True), stage=pl.lit("screener"))
    found = read(scored, changed, bundle, deep)
    assert not found.by_cascade.any()
    assert found.escalated.all()
    assert found.by_deep.any()


def test_decisions_of_another_bundle_certify_nothing(scored: Scored, bundle: Bundle, deep: DeepStage) -> None:
    mixed = scored.topic.with_columns(
        bundle=pl.when(pl.int_range(pl.len()) == 5).then(pl.lit("older-1")).otherwise(pl.col("bundle"))
    )
    with pytest.raises(DataError, match="decisions of bundle older-1; only those of"):
        read(scored, mixed, bundle, deep)
