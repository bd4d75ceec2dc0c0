"""Training end to end on a small simulated file; one bundle is trained for most of these tests."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from cascade.bundle import Bundle, Manifest, load_bundle
from cascade.config import DeepSettings
from cascade.errors import DataError, SettingError
from cascade.features.layout import DAY_MS
from cascade.frames import LabelledData, read_labelled
from cascade.policy import Costs
from cascade.schema import load_schema
from cascade.simulator import SimulatorSettings, simulate
from stages import training
from stages.assembly import deep_signature, make_deep_stage, make_engine, make_screener
from stages.calibration import calibrate
from stages.offline import OfflineScores, score_offline
from stages.training import Report, TrainingSettings, split, train_bundle

pytestmark = pytest.mark.training

SCHEMAS = Path(str(files("cascade") / "schemas"))
SCHEMA, FEATURES = SCHEMAS / "simulator.toml", SCHEMAS / "features.toml"
# as in the trained bundle, up to what another order of additions does
DIFFERENCE_MAX = 1e-5
SETTINGS = TrainingSettings(
    name="tiny", seed=3, validation_ms=8 * DAY_MS, warm_up_ms=10 * DAY_MS, escalation_budget=0.02, costs=Costs()
)


@dataclasses.dataclass(frozen=True)
class Trained:
    directory: Path
    manifest: Manifest
    report: Report
    steps: dict[str, list[float]]

    @property
    def bundle(self) -> Bundle:
        return load_bundle(self.directory)


def write(frame: pl.DataFrame, path: Path) -> Path:
    frame.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return simulate(SimulatorSettings(cards=250, terminals=200, days=34, seed=5, fraud_share=0.04))


@pytest.fixture(scope="module")
def data_path(frame: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(frame, tmp_path_factory.mktemp("data") / "data.parquet")


def train(data: Path, out: Path, settings: TrainingSettings = SETTINGS) -> Trained:
    steps: dict[str, list[float]] = {}
    manifest, report = train_bundle(
        data, SCHEMA, FEATURES, out, settings, lambda step, share: steps.setdefault(step, []).append(share)
    )
    return Trained(out, manifest, report, steps)


@pytest.fixture(scope="module")
def trained(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(data_path, tmp_path_factory.mktemp("trained") / "bundle")


@pytest.fixture(scope="module")
def data(data_path: Path) -> LabelledData:
    return read_labelled(data_path, load_schema(SCHEMA))


@pytest.fixture(scope="module")
def validation(data: LabelledData) -> np.ndarray:
    return split(data, load_schema(SCHEMA), SETTINGS, "data")[1]


def offline_scores(bundle: Bundle, data: LabelledData, wanted: np.ndarray) -> OfflineScores:
    screener = make_screener(bundle, make_engine(bundle).features.width)
    deep = make_deep_stage(bundle, DeepSettings(backend="onnxruntime"))
    try:
        return score_offline(bundle, screener, deep, data, wanted, lambda _: None)
    finally:
        deep.close()


@pytest.fixture(scope="module")
def served(trained: Trained, data: LabelledData, validation: np.ndarray) -> OfflineScores:
    """The validation rows, scored by what the bundle holds, as the service would."""
    return offline_scores(trained.bundle, data, validation)


def test_a_trained_bundle_loads_and_serves(trained: Trained, served: OfflineScores) -> None:
    bundle = trained.bundle
    assert bundle.version == trained.manifest.version
    assert bundle.content["schema.toml"] == SCHEMA.read_bytes()
    assert bundle.content["features.toml"] == FEATURES.read_bytes()
    signature, engine = deep_signature(bundle), make_engine(bundle)
    assert signature.features == engine.features.width + 1 == trained.report.features + 1
    assert signature.sequences == engine.features.sequence_shapes
    assert np.isfinite(served.screener_raw).all()
    assert np.isfinite(served.deep_raw).all()


def test_the_report_in_the_bundle_is_whole(trained: Trained, data: LabelledData, validation: np.ndarray) -> None:
    written = json.loads(trained.bundle.content["report.json"])
    assert written["validation"]["transactions"] == int(validation.sum()) == trained.report.validation.transactions
    assert written["validation"]["frauds"] == int(data.fraud[validation].sum())
    assert trained.report.train.last < trained.report.validation.first
    for model in ("cascade", "screener_only", "deep_only"):
        assert 0.5 < written[model]["auc"] <= 1.0, f"{model} learned nothing"
        assert 0.0 < written[model]["average_precision"] <= 1.0
        assert 0.0 <= written[model]["card_precision_top100"] <= 1.0
    assert written["cost_per_thousand"] < written["cost_per_thousand_approve_all"]
    assert set(written["versions"]) == {"lightgbm", "onnxruntime", "torch", "numpy"}
    assert (written["seed"], written["schema"]) == (SETTINGS.seed, "simulator")


def test_no_more_than_the_budget_is_escalated(trained: Trained, served: OfflineScores) -> None:
    share = float(trained.bundle.policy.escalate(served.screener_raw).mean())
    assert share == pytest.approx(trained.report.escalation_share)
    assert 0.5 * SETTINGS.escalation_budget < share <= SETTINGS.escalation_budget


def test_the_exported_model_is_the_trained_one(trained: Trained) -> None:
    assert 0 <= trained.report.onnx_difference_max <= 1e-4


def test_the_policy_rests_on_the_validation_rows_as_they_are_served(
    trained: Trained, served: OfflineScores, data: LabelledData, validation: np.ndarray
) -> None:
    # all of it made anew from the validation rows and the files of the bundle, without the training part
    again = calibrate(
        served.screener_raw,
        served.deep_raw,
        data.fraud[validation] == 1,
        data.batch["amount"][validation],
        SETTINGS.escalation_budget,
        SETTINGS.costs,
    )
    policy = trained.bundle.policy
    assert again.escalation_threshold == pytest.approx(policy.escalation_threshold, abs=DIFFERENCE_MAX)
    assert again.escalation_ceiling == pytest.approx(policy.escalation_ceiling, abs=DIFFERENCE_MAX)
    for mine, theirs in ((again.screener, policy.screener), (again.deep, policy.deep)):
        assert mine.slope == pytest.approx(theirs.slope, abs=1e-3)
        assert mine.intercept == pytest.approx(theirs.intercept, abs=1e-3)
    assert again.review_from == pytest.approx(policy.review_from, abs=1e-3)
    assert again.decline_from == pytest.approx(policy.decline_from, abs=1e-3)


def test_progress_names_each_step_and_ends_each(trained: Trained) -> None:
    assert list(trained.steps) == ["features", "screener", "screener, out of fold", "deep model"]
    for shares in trained.steps.values():
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_bundle_and_another_another(
    data_path: Path, trained: Trained, tmp_path: Path
) -> None:
    assert train(data_path, tmp_path / "again").manifest.version == trained.manifest.version
    other = train(data_path, tmp_path / "other", msgspec.structs.replace(SETTINGS, seed=4))
    for file in ("screener.txt", "deep.onnx"):
        assert other.manifest.files[file] != trained.manifest.files[file]


def test_what_comes_after_the_end_is_not_looked_at(frame: pl.DataFrame, trained: Trained, tmp_path: Path) -> None:
    until_ms = int(frame["event_time"].dt.epoch("ms").max()) + 1
    # a later week in which every transaction is a fraud
    later = frame.tail(500).with_columns(
        transaction_id=pl.col("transaction_id") + 10**9,
        event_time=pl.col("event_time") + pl.duration(days=9),
        fraud=pl.lit(1, frame["fraud"].dtype),
    )
    longer = write(pl.concat([frame, later]), tmp_path / "longer.parquet")
    settings = msgspec.structs.replace(SETTINGS, until_ms=until_ms)
    assert train(longer, tmp_path / "bundle", settings).manifest.version == trained.manifest.version


VALIDATION = pl.col("event_time") >= pl.col("event_time").max() - pl.duration(days=8)
LAST_FRAUD = pl.col("event_time") == pl.col("event_time").filter(pl.col("fraud") == 1).max()


@pytest.mark.parametrize(
    ("genuine", "message"),
    [
        (~VALIDATION, "no frauds among .* training transactions"),
        (VALIDATION, "no frauds among .* validation transactions"),
        (VALIDATION & ~LAST_FRAUD, "at least 20 of"),
    ],
    ids=["training", "validation", "a single fraud"],
)
def test_a_part_with_too_few_frauds_is_refused_and_named(
    frame: pl.DataFrame, tmp_path: Path, genuine: pl.Expr, message: str
) -> None:
    changed = frame.with_columns(pl.col("fraud") * (~genuine).cast(frame["fraud"].dtype))
    with pytest.raises(DataError, match=message):
        train(write(changed, tmp_path / "data.parquet"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_too_little_data_is_refused_with_a_remedy(frame: pl.DataFrame, tmp_path: Path, rows: int) -> None:
    path = write(frame.head(rows), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="shorten --warm-up"):
        train(path, tmp_path / "bundle")


def test_a_feature_file_that_does_not_fit_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    features = tmp_path / "features.toml"
    features.write_text(FEATURES.read_text().replace('field = "amount"', 'field = "colour"'))
    with pytest.raises(SettingError, match=r"features\.toml"):
        train_bundle(tmp_path / "absent.parquet", SCHEMA, features, tmp_path / "b", SETTINGS, lambda *_: None)


def test_an_export_that_differs_from_the_model_is_never_written(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no export that is broken on purpose is at hand: the bound is moved instead
    monkeypatch.setattr(training, "ONNX_DIFFERENCE_MAX", -1.0)
    with pytest.raises(DataError, match="differs from PyTorch"):
        train(data_path, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_parts_are_cut_by_time_and_do_not_touch(data: LabelledData, validation: np.ndarray) -> None:
    in_training, in_validation = split(data, load_schema(SCHEMA), SETTINGS, "data")
    times = data.batch["event_time"]
    assert not (in_training & in_validation).any()
    assert times[in_training].max() < times[in_validation].min()
    assert times[in_training].min() >= times[0] + SETTINGS.warm_up_ms
    assert times[in_validation].min() >= times[-1] + 1 - SETTINGS.validation_ms
    assert in_validation[-1]
    np.testing.assert_array_equal(in_validation, validation)
