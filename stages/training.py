"""Trains a bundle (screener, deep model, calibration and policy) from a file of labelled transactions.

It splits the data by time: a warm-up that only fills the feature state, the training rows, then the validation rows.
Calibration and thresholds come from the validation rows. The report's figures are of the same rows, so they serve for
comparison and are not those of an independent test.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from cascade.bundle import Manifest, write_bundle
from cascade.columns import Bool, Float32, Int64
from cascade.engine import deep_inputs
from cascade.errors import DataError
from cascade.features import FeatureEngine, parse_spec
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData, read_labelled
from cascade.policy import Costs, Policy
from cascade.progress import StepProgress
from cascade.schema import Schema, key_codes, parse_schema
from cascade.setting_files import read_setting_file
from stages.calibration import calibrate
from stages.metrics import Quality, quality
from stages.offline import OfflineScores, fold_rows
from stages.screener.train import ScreenerSettings, out_of_fold_scores, train_screener

# Blocks of time for the screener's scores from which the deep model learns (see `out_of_fold_scores`).
SCREENER_FOLDS = 4
# The exported model may differ from PyTorch only by rounding.
ONNX_DIFFERENCE_MAX = 1e-4


class TrainingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a bundle is trained.

    - `name`: first part of the bundle's version.
    - `until_ms`: end of the data, ms since the epoch; None: all data is used.
    - `validation_ms`: length of the validation data, the last part.
    - `warm_up_ms`: length of the first part, which only fills the feature state.
    - `escalation_budget`: share of transactions that may be escalated.
    """

    name: str = "bundle"
    seed: int = 1
    until_ms: int | None = None
    validation_ms: int = 7 * DAY_MS
    warm_up_ms: int = 37 * DAY_MS
    escalation_budget: float = 0.01
    costs: Costs = Costs()
    screener: ScreenerSettings = ScreenerSettings()


class Span(msgspec.Struct, frozen=True):
    """A part of the data: times of its first and last event (UTC), and its numbers of transactions and frauds."""

    first: datetime
    last: datetime
    transactions: int
    frauds: int


class Report(msgspec.Struct, frozen=True):
    """Inputs and results of a training run. The qualities and costs are of the validation rows.

    - `features`: number of features.
    - `escalation_share`: share of the rows that are escalated.
    - `cost_per_thousand`: cost of the cascade's decisions per 1,000 transactions, in the currency of the amounts.
    - `cost_per_thousand_approve_all`: the same if all transactions were approved.
    - `onnx_difference_max`: largest difference of log-odds between PyTorch and ONNX Runtime.
    - `versions`: versions of the libraries.
    """

    schema: str
    seed: int
    train: Span
    validation: Span
    features: int
    escalation_share: float
    cascade: Quality
    screener_only: Quality
    deep_only: Quality
    cost_per_thousand: float
    cost_per_thousand_approve_all: float
    onnx_difference_max: float
    versions: dict[str, str]


def train_bundle(
    data_path: Path,
    schema_path: Path,
    features_path: Path,
    out: Path,
    settings: TrainingSettings,
    progress: StepProgress,
) -> tuple[Manifest, Report]:
    """Train, write the bundle to `out`, and return its manifest and report.

    - `data_path`: labelled transactions, Parquet or CSV.
    - `schema_path`, `features_path`: TOML files, which become part of the bundle.

    Raises SettingError or DataError if a file cannot be used.
    """
    # PyTorch belongs to the extra `train`; importing it here allows loading this module without it
    from stages.deep.train import (
        DeepSettings,
        export_onnx,
        max_difference,
        sample_genuine,
        score_torch,
        signature_of,
        train_deep,
    )

    schema_text, features_text = read_setting_file(schema_path), read_setting_file(features_path)
    schema = parse_schema(schema_text, str(schema_path))
    engine = FeatureEngine(parse_spec(features_text, str(features_path)), schema, str(features_path))
    data = read_labelled(data_path, schema)
    in_training, in_validation = split(data, schema, settings, str(data_path))
    deep_settings = DeepSettings()
    drawn, weight = sample_genuine(data.fraud[in_training], deep_settings.genuine_share, settings.seed)
    with_sequences = in_validation.copy()
    with_sequences[np.flatnonzero(in_training)[drawn]] = True

    folded = fold_rows(engine, data, in_training | in_validation, with_sequences, partial(progress, "features"))
    training = in_training[folded.rows]
    sequence_training = in_training[np.flatnonzero(with_sequences)]

    def sequences_of(rows: Bool) -> dict[str, Float32]:
        return {name: sequence[rows] for name, sequence in folded.sequences.items()}

    train_features, train_fraud = folded.features[training], data.fraud[folded.rows[training]]

    booster = train_screener(
        train_features, train_fraud, engine.names, settings.screener, settings.seed, partial(progress, "screener")
    )
    out_of_fold = out_of_fold_scores(
        train_features,
        train_fraud,
        engine.names,
        settings.screener,
        settings.seed,
        SCREENER_FOLDS,
        partial(progress, "screener, out of fold"),
    )
    screener_raw = booster.predict(folded.features[~training], raw_score=True)

    examples = deep_inputs(train_features[drawn], sequences_of(sequence_training), out_of_fold[drawn])
    model = train_deep(
        examples, train_fraud[drawn], weight, deep_settings, settings.seed, partial(progress, "deep model")
    )
    inputs = deep_inputs(folded.features[~training], sequences_of(~sequence_training), screener_raw)
    onnx = export_onnx(model, inputs)
    difference = max_difference(model, onnx, inputs)
    if difference > ONNX_DIFFERENCE_MAX:
        raise DataError(f"the exported model differs from PyTorch by {difference:.2g}; report this with your versions")
    scores = OfflineScores(folded.rows[~training], screener_raw, score_torch(model, inputs))

    validation = data.take(scores.rows)
    amount = validation.batch[schema.roles.amount]
    policy = calibrate(
        screener_raw, scores.deep_raw, validation.fraud == 1, amount, settings.escalation_budget, settings.costs
    )
    report = _report(schema, settings, data.take(in_training), validation, scores, policy, engine.width, difference)
    content = {
        "schema.toml": schema_text,
        "features.toml": features_text,
        "screener.txt": booster.model_to_string().encode(),
        "deep.onnx": onnx,
        "deep.json": _readable(signature_of(inputs)),
        "policy.json": _readable(policy),
        "report.json": _readable(report),
    }
    return write_bundle(out, settings.name, content), report


def split(data: LabelledData, schema: Schema, settings: TrainingSettings, origin: str) -> tuple[Bool, Bool]:
    """Masks of the training and the validation rows. Raises DataError if either has no frauds."""
    times = data.batch[schema.roles.event_time]
    until = settings.until_ms if settings.until_ms is not None else int(times[-1]) + 1 if len(times) else 0
    start = int(times[0]) + settings.warm_up_ms if len(times) else 0
    middle = until - settings.validation_ms
    in_training: Bool = (times >= start) & (times < middle)
    in_validation: Bool = (times >= max(start, middle)) & (times < until)
    for name, rows in (("training", in_training), ("validation", in_validation)):
        if data.fraud[rows].sum() == 0:
            raise DataError(
                f"{origin}: no frauds among {int(rows.sum())} {name} transactions; the data spans"
                f" {(times[-1] - times[0]) / DAY_MS if len(times) else 0:.1f} days: shorten --warm-up or"
                " --validation, or use more data"
            )
    return in_training, in_validation


def _report(
    schema: Schema,
    settings: TrainingSettings,
    training: LabelledData,
    validation: LabelledData,
    scores: OfflineScores,
    policy: Policy,
    features: int,
    difference: float,
) -> Report:
    import lightgbm
    import onnxruntime
    import torch

    fraud, amount = validation.fraud == 1, validation.batch[schema.roles.amount]
    day: Int64 = validation.batch[schema.roles.event_time] // DAY_MS
    card = key_codes(validation.batch[schema.roles.card])
    cascade, escalated = scores.cascade(policy)
    screener, deep = policy.screener.probability(scores.screener_raw), policy.deep.probability(scores.deep_raw)
    approve_all = np.zeros(len(fraud), np.int64)
    costs = policy.costs
    return Report(
        schema=schema.name,
        seed=settings.seed,
        train=_span(training, schema),
        validation=_span(validation, schema),
        features=features,
        escalation_share=float(escalated.mean()),
        cascade=quality(cascade, fraud, day, card, policy.escalation_budget),
        screener_only=quality(screener, fraud, day, card, policy.escalation_budget),
        deep_only=quality(deep, fraud, day, card, policy.escalation_budget),
        cost_per_thousand=1e3 * float(costs.of_decisions(policy.actions(cascade), fraud, amount).mean()),
        cost_per_thousand_approve_all=1e3 * float(costs.of_decisions(approve_all, fraud, amount).mean()),
        onnx_difference_max=difference,
        versions={
            "lightgbm": lightgbm.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__.split("+")[0],
            "numpy": np.__version__,
        },
    )


def _span(data: LabelledData, schema: Schema) -> Span:
    times = data.batch[schema.roles.event_time]
    first, last = (datetime.fromtimestamp(int(time) / 1e3, UTC) for time in (times[0], times[-1]))
    return Span(first, last, data.batch.rows, int(data.fraud.sum()))


def _readable(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
