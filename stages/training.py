"""Training of a bundle: screener, deep model, calibration and policy, from one file of labelled transactions.

The data is cut by time: a warm-up that only fills the feature state, the training rows, then the validation rows. All
that is chosen (calibration, thresholds) is chosen on the validation rows; the report's figures are of them too, so
they are for comparison, not a test.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from cascade.bundle import Manifest, write_bundle
from cascade.columns import Bool, Float64, Int64
from cascade.engine import deep_inputs
from cascade.errors import DataError
from cascade.features import FeatureEngine, parse_spec
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData, read_labelled
from cascade.policy import Costs, Policy
from cascade.schema import Schema, key_codes, parse_schema, read_setting_file
from stages.calibration import calibrate
from stages.metrics import Quality, quality
from stages.offline import fold_rows
from stages.screener.train import ScreenerSettings, out_of_fold_scores, train_screener

# Told at each step: what is being done, and the share of it that is done.
Progress = Callable[[str, float], None]
# Blocks of time for the scores that the deep model is trained on (see `out_of_fold_scores`).
SCREENER_FOLDS = 4
# The exported model may differ from PyTorch by rounding only.
ONNX_DIFFERENCE_MAX = 1e-4


class TrainingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a bundle is trained; times in ms.

    `until_ms`: data from there on is not looked at (None: all is used). `validation_ms`: length of the validation
    data, at the end. `warm_up_ms`: length of the part at the start that only fills the feature state.
    `escalation_budget`: share of traffic that may be escalated.
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
    """A stretch of the data: its first and last event (UTC), transactions and frauds."""

    first: datetime
    last: datetime
    transactions: int
    frauds: int


class Report(msgspec.Struct, frozen=True):
    """What a training run used and found; the qualities are of the validation rows.

    `onnx_difference_max`: largest difference of log-odds between PyTorch and ONNX Runtime. `cost_per_thousand`: cost of
    the decisions per 1,000 transactions by the policy's costs, in the currency of the amounts, for the cascade;
    `_approve_all` where nothing were stopped.
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
    data_path: Path, schema_path: Path, features_path: Path, out: Path, settings: TrainingSettings, progress: Progress
) -> tuple[Manifest, Report]:
    """Train, write the bundle to `out`, and return its manifest and report.

    Raises SettingError or DataError for what the files hold.
    """
    # PyTorch is in the extra `train` only: imported here, so that the module can be loaded without it
    from stages.deep.signature import DeepSignature
    from stages.deep.train import (
        OPSET,
        DeepSettings,
        export_onnx,
        max_difference,
        sample_genuine,
        score_torch,
        train_deep,
    )

    schema_text, features_text = read_setting_file(schema_path), read_setting_file(features_path)
    schema = parse_schema(schema_text, str(schema_path))
    engine = FeatureEngine(parse_spec(features_text, str(features_path)), schema, str(features_path))
    data = read_labelled(data_path, schema)
    in_training, in_validation = split(data, schema, settings, str(data_path))
    deep_settings = DeepSettings()
    drawn, weight = sample_genuine(data.fraud[in_training], deep_settings.genuine_share, settings.seed)
    with_sequence = in_validation.copy()
    with_sequence[np.flatnonzero(in_training)[drawn]] = True

    folded = fold_rows(engine, data, in_training | in_validation, with_sequence, lambda s: progress("features", s))
    training = in_training[folded.rows]
    sequence_training = in_training[np.flatnonzero(with_sequence)]
    train_features, train_fraud = folded.features[training], data.fraud[folded.rows[training]]

    booster = train_screener(
        train_features, train_fraud, engine.names, settings.screener, settings.seed, lambda s: progress("screener", s)
    )
    held_out = out_of_fold_scores(
        train_features,
        train_fraud,
        engine.names,
        settings.screener,
        settings.seed,
        SCREENER_FOLDS,
        lambda s: progress("screener, out of fold", s),
    )
    screener_text = booster.model_to_string().encode()
    screener_raw: Float64 = booster.predict(folded.features[~training], raw_score=True)

    model = train_deep(
        deep_inputs(train_features[drawn], folded.sequence[sequence_training], held_out[drawn]),
        train_fraud[drawn], weight, deep_settings, settings.seed, lambda s: progress("deep model", s),
    )  # fmt: skip
    inputs = deep_inputs(folded.features[~training], folded.sequence[~sequence_training], screener_raw)
    onnx = export_onnx(model, inputs)
    difference = max_difference(model, onnx, inputs)
    if difference > ONNX_DIFFERENCE_MAX:
        raise DataError(f"the exported model differs from PyTorch by {difference:.2g}; report this with your versions")
    deep_raw = score_torch(model, inputs)

    validation = data.take(np.flatnonzero(in_validation))
    policy = calibrate(
        screener_raw,
        deep_raw,
        validation.fraud == 1,
        validation.batch[schema.roles.amount],
        settings.escalation_budget,
        settings.costs,
    )
    signature = DeepSignature(
        sequence_length=inputs.sequence.shape[1], sequence_width=inputs.sequence.shape[2],
        features=inputs.features.shape[1], opset=OPSET,
    )  # fmt: skip
    report = _report(
        schema,
        settings,
        data.take(np.flatnonzero(in_training)),
        validation,
        engine.width,
        screener_raw,
        deep_raw,
        policy,
        difference,
    )
    manifest = write_bundle(out, settings.name, {
        "schema.toml": schema_text,
        "features.toml": features_text,
        "screener.txt": screener_text,
        "deep.onnx": onnx,
        "deep.json": _readable(signature),
        "policy.json": _readable(policy),
        "report.json": _readable(report),
    })  # fmt: skip
    return manifest, report


def split(data: LabelledData, schema: Schema, settings: TrainingSettings, origin: str) -> tuple[Bool, Bool]:
    """Masks of the training and of the validation rows; raises DataError where one would be without frauds."""
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
                " --validation, or give more data"
            )
    return in_training, in_validation


def _report(
    schema: Schema,
    settings: TrainingSettings,
    training: LabelledData,
    validation: LabelledData,
    width: int,
    screener_raw: Float64,
    deep_raw: Float64,
    policy: Policy,
    difference: float,
) -> Report:
    import lightgbm
    import onnxruntime
    import torch

    fraud = validation.fraud == 1
    amount = validation.batch[schema.roles.amount]
    day: Int64 = validation.batch[schema.roles.event_time] // DAY_MS
    card = key_codes(validation.batch[schema.roles.card])
    screener, deep = policy.screener.probability(screener_raw), policy.deep.probability(deep_raw)
    escalated = policy.escalate(screener_raw)
    cascade = np.where(escalated, deep, screener)
    approve_all = np.zeros(len(fraud), np.int64)
    costs = policy.costs
    return Report(
        schema=schema.name,
        seed=settings.seed,
        train=_span(training, schema),
        validation=_span(validation, schema),
        features=width,
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
