"""Trains bundles (screener, deep model, escalation rule, calibration and policy) from a file of labelled transactions.

Each size of the deep model makes a bundle of its own; they share the screener. The training splits the data by time: a
warm-up that only fills the feature state, the training rows, then the validation rows. The training rows choose the
screener and the escalation rules. Calibration and thresholds come from the validation rows. The report's figures are of
the same rows, so they serve for comparison and are not those of an independent test.
"""

from __future__ import annotations

import difflib
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightgbm
import msgspec
import numpy as np

from cascade.bundle import Manifest, write_bundle
from cascade.columns import Bool, Float32, Float64, Int64
from cascade.engine import deep_inputs
from cascade.errors import DataError, SettingError
from cascade.features import FeatureEngine, parse_spec
from cascade.frames import LabelledData, read_labelled
from cascade.policy import Policy
from cascade.progress import StepProgress
from cascade.protocols import DeepInputs
from cascade.readable import readable
from cascade.schema import Schema, key_codes, parse_schema
from cascade.setting_files import read_setting_file
from stages.calibration import calibrate, fit_calibration, fit_combination
from stages.deep.cost import us_per_row as us_per_row_of_deep
from stages.escalation.rules import Rule, ScoredRows, learn_rule
from stages.offline import Folded, fold_rows
from stages.report import DeepReport, Report, ScreenerReport, Span, figures
from stages.report_page import add_page
from stages.sampling import sample
from stages.screener.cost import CALLS, us_per_row
from stages.screener.search import Search
from stages.screener.train import ScreenerRows, out_of_fold_scores, train_screener
from stages.settings import Size, TrainingFile
from stages.split import Split, split
from stages.validation import ValidationRows

if TYPE_CHECKING:
    from stages.deep.model import DeepModel

# Blocks of time for the screener's scores from which the deep model and the rule learn (see `out_of_fold_scores`).
SCREENER_FOLDS = 4
# The exported model may differ from PyTorch only by rounding.
ONNX_DIFFERENCE_MAX = 1e-4
# Name of the last feature of the deep model and of the gain model.
SCREENER_SCORE = "screener_score"
NO_GAIN = "beside the screener the deep model has no weight: escalation changes nothing; use more data"


class TrainingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a bundle is trained.

    - `name`: first part of the bundle's version.
    - `until_ms`: end of the data, ms since the epoch; None: all data is used.
    - `file`: content of the training file.
    """

    name: str = "bundle"
    seed: int = 1
    until_ms: int | None = None
    file: TrainingFile = TrainingFile()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data, and the features of the training and validation rows.

    `training` bool [folded rows]: the others are the validation rows.
    """

    schema: Schema
    engine: FeatureEngine
    data: LabelledData
    parts: Split
    folded: Folded
    training: Bool

    @property
    def rows(self) -> ScreenerRows:
        """The training rows."""
        chosen = self.folded.rows[self.training]
        return ScreenerRows(
            self.folded.features[self.training],
            self.data.fraud[chosen],
            self.engine.names,
            self.engine.categorical_names,
        )

    @property
    def validation(self) -> LabelledData:
        """The validation rows."""
        return self.data.take(self.folded.rows[~self.training])


@dataclass(frozen=True, slots=True)
class Drawn:
    """The training rows of which the deep models see the sequences, and the sequences of the validation rows.

    - `rows` int64 [drawn]: their positions within the training rows; `sequences` float32 [drawn, length, width], by
      name; `later` the same of the validation rows.
    - `learned` int64: positions within `rows` of those from which the deep models learn; `weight` float32 [drawn]: how
      many rows each stands for there.
    - `judged` int64: positions within `rows` of rows of the later half, from which the escalation rule learns; they
      stand for `judged_weight` float64 rows each.
    """

    rows: Int64
    learned: Int64
    weight: Float32
    judged: Int64
    judged_weight: Float64
    sequences: dict[str, Float32]
    later: dict[str, Float32]

    def examples(self, features: Float32, raw: Float64) -> DeepInputs:
        """The deep model's inputs for the rows drawn. features, raw: of the training rows."""
        return deep_inputs(features[self.rows], self.sequences, raw[self.rows])

    @property
    def earlier(self) -> Int64:
        """Those of the rows `learned` that are before the later half."""
        return self.learned[: len(self.learned) // 2]

    def validation_inputs(self, prepared: Prepared, screener: lightgbm.Booster) -> DeepInputs:
        """The deep model's inputs for the validation rows; their last feature is the screener's score."""
        features = prepared.folded.features[~prepared.training]
        return deep_inputs(features, self.later, screener.predict(features, raw_score=True))


@dataclass(frozen=True, slots=True)
class Trained:
    """A bundle that was written: the size of its deep model, its directory, and its content in short."""

    size: Size
    directory: Path
    manifest: Manifest
    report: Report


def train_bundles(
    data_path: Path,
    schema_path: Path,
    features_path: Path,
    out: Path,
    settings: TrainingSettings,
    progress: StepProgress,
) -> list[Trained]:
    """Train, and write a bundle for each size of the deep model: the last one to `out`, others beside it to `out`-SIZE.

    - `data_path`: labelled transactions, Parquet or CSV.
    - `schema_path`, `features_path`: TOML files, which become part of the bundle.

    A training that was interrupted leaves the states of its deep models beside `out`, and the same training goes on
    from them. Raises SettingError or DataError if a file cannot be used.
    """
    schema_text, features_text = read_setting_file(schema_path), read_setting_file(features_path)
    schema = parse_schema(schema_text, str(schema_path))
    engine = FeatureEngine(parse_spec(features_text, str(features_path)), schema, str(features_path))
    _check_monotone(settings.file.screener.monotone, engine.names, features_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = out.parent / f".{out.name}.training"
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        prepared = prepare(data_path, schema, engine, settings, progress)
        files = {"schema.toml": schema_text, "features.toml": features_text}
        written = _train(prepared, files, out, Path(scratch), checkpoints, settings, progress)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return written


def _train(
    prepared: Prepared,
    files: dict[str, bytes],
    out: Path,
    scratch: Path,
    checkpoints: Path,
    settings: TrainingSettings,
    progress: StepProgress,
) -> list[Trained]:
    # PyTorch belongs to the extra `train`; importing it here allows loading this module without it
    from stages.deep.train import Examples, code_columns, score_torch, train_deep

    file, seed = settings.file, settings.seed
    rows, codes = prepared.rows, code_columns(prepared.engine)
    search = Search(file.screener, file.escalation.budget, seed, partial(progress, "screener, search"))
    search.try_sizes(rows)
    out_of_fold = out_of_fold_scores(
        rows, search.best.settings, seed, SCREENER_FOLDS, partial(progress, "screener, out of fold")
    )
    drawn = draw(prepared, out_of_fold, settings, scratch, progress)
    fraud, weight = rows.fraud[drawn.rows], drawn.judged_weight
    # positions within the training rows
    judged = drawn.rows[drawn.judged]
    examples = Examples(drawn.examples(rows.features, out_of_fold), fraud, drawn.weight, codes)
    # scores of rows that were not learned from, as in service: those of a model of the earlier half
    deep_later = {
        size: score_torch(
            train_deep(
                examples, drawn.earlier, file.deep.of(size), seed, partial(progress, f"{size} model, half"),
                checkpoints,
            ),
            examples.inputs,
            drawn.judged,
        )
        for size in file.deep.sizes
    }  # fmt: skip
    if "distilled" in file.screener.objectives:
        teacher = deep_later[file.deep.sizes[-1]]
        taught = _taught(rows, judged, out_of_fold[judged], teacher, weight)
        search.try_distilled(taught)
        if search.best.settings.objective == "distilled":
            rows = taught
            out_of_fold = out_of_fold_scores(
                rows, search.best.settings, seed, SCREENER_FOLDS, partial(progress, "distilled, out of fold")
            )
            examples = Examples(drawn.examples(rows.features, out_of_fold), fraud, drawn.weight, codes)
    screener = train_screener(rows, search.best.settings, seed, partial(progress, "screener"))
    later, written = drawn.validation_inputs(prepared, screener), []
    for size in file.deep.sizes:
        model = train_deep(
            examples, drawn.learned, file.deep.of(size), seed, partial(progress, f"{size} model"), checkpoints
        )
        scored = ScoredRows(
            examples.inputs.features[drawn.judged], out_of_fold[judged], deep_later[size],
            rows.fraud[judged] == 1, weight, (*rows.names, SCREENER_SCORE),
        )  # fmt: skip
        rule = learn_rule(scored, file.escalation.budget, seed)
        beside = "" if size == file.deep.sizes[-1] else f"-{size}"
        name, directory = settings.name + beside, out.with_name(out.name + beside)
        content, report = _content(prepared, later, size, model, screener, rule, search, settings)
        progress(f"{size}, report", 1.0)
        content = files | content
        add_page(content, report, name)
        written.append(Trained(size, directory, write_bundle(directory, name, content), report))
    return written


def _content(
    prepared: Prepared,
    inputs: DeepInputs,
    size: Size,
    model: DeepModel,
    screener: lightgbm.Booster,
    rule: Rule,
    search: Search,
    settings: TrainingSettings,
) -> tuple[dict[str, bytes], Report]:
    """The files of a bundle but schema, features and page, and its report. `inputs`: of the validation rows."""
    from stages.deep.train import export_onnx, max_difference, score_onnx, signature_of

    onnx, signature = export_onnx(model, inputs), signature_of(inputs)
    difference = max_difference(model, onnx, inputs)
    # not by >, which would accept NaN
    if not difference <= ONNX_DIFFERENCE_MAX:
        raise DataError(f"the exported model differs from PyTorch by {difference:.2g}; report this with your versions")
    validation, roles = prepared.validation, prepared.schema.roles
    judged = ValidationRows.of(
        validation.batch[roles.event_time],
        key_codes(validation.batch[roles.card]),
        validation.fraud == 1,
        validation.batch[roles.amount],
        inputs.features[:, -1].astype(np.float64),
        score_onnx(onnx, inputs),
        rule.gain_model.predict(inputs.features),
    )
    policy = calibrate(judged, rule.escalation, settings.file.costs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    deep = DeepReport(size, parameters, us_per_row_of_deep(onnx, signature, inputs), difference)
    report = _report(prepared, validation, judged, policy, settings, search, rule, screener, deep)
    return {
        "screener.txt": screener.model_to_string().encode(),
        "escalation.txt": rule.gain_model.model_to_string().encode(),
        "deep.onnx": onnx,
        "deep.json": readable(signature),
        "policy.json": readable(policy),
        "validation.parquet": judged.to_parquet(),
        "report.json": readable(report),
    }, report


def _check_monotone(monotone: dict[str, str], names: tuple[str, ...], features_path: Path) -> None:
    """Raise SettingError if a name of `[screener.monotone]` is not that of a feature, since it would have no effect."""
    for name, direction in monotone.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use a name of {features_path}"
            raise SettingError("configuration", f"screener.monotone.{name}", direction, "no such feature", remedy)


def prepare(
    data_path: Path, schema: Schema, engine: FeatureEngine, settings: TrainingSettings, progress: StepProgress
) -> Prepared:
    """Reads the data, divides it, and computes the features. Raises DataError if the data cannot be used."""
    data = read_labelled(data_path, schema)
    parts = split(data, schema, settings.file, settings.until_ms, str(data_path))
    wanted, none = parts.training | parts.validation, np.zeros(data.batch.rows, np.bool_)
    folded = fold_rows(engine, data, wanted, none, partial(progress, "features"))
    return Prepared(schema, engine, data, parts, folded, parts.training[folded.rows])


def draw(
    prepared: Prepared, out_of_fold: Float64, settings: TrainingSettings, scratch: Path, progress: StepProgress
) -> Drawn:
    """Draws rows for the deep models by what the screener makes of them, and computes their sequences.

    The stream is folded once more, since the sequences of all rows would not fit into memory; they are files in
    `scratch`. `out_of_fold` float64 [training rows]: the screener's raw scores.
    """
    file, parts = settings.file, prepared.parts
    fraud = prepared.data.fraud[parts.training]
    screened = fit_calibration(out_of_fold, fraud == 1, np.ones(len(fraud))).probability(out_of_fold)
    learned, weight = sample(fraud, screened, file.deep.genuine_share, settings.seed)
    middle = int(learned[len(learned) // 2])
    judged, judged_weight = sample(fraud[middle:], screened[middle:], file.escalation.genuine_share, settings.seed + 1)
    judged += middle
    rows = np.union1d(learned, judged)
    learned_at, weights = np.searchsorted(rows, learned), np.zeros(len(rows), np.float32)
    weights[learned_at] = weight
    wanted = parts.validation.copy()
    wanted[np.flatnonzero(parts.training)[rows]] = True
    prepared.engine.reset()
    folded = fold_rows(prepared.engine, prepared.data, wanted, wanted, partial(progress, "sequences"), scratch)
    return Drawn(
        rows, learned_at, weights, np.searchsorted(rows, judged), judged_weight.astype(np.float64),
        # the training rows are the earlier ones
        {name: sequence[: len(rows)] for name, sequence in folded.sequences.items()},
        {name: sequence[len(rows) :] for name, sequence in folded.sequences.items()},
    )  # fmt: skip


def _taught(
    rows: ScreenerRows, judged: Int64, screener_raw: Float64, deep_raw: Float64, weight: Float64
) -> ScreenerRows:
    """The training rows with the opinion of both models together, where the deep model has judged the row."""
    both = fit_combination(screener_raw, deep_raw, rows.fraud[judged] == 1, weight)
    belief = np.full(len(rows.fraud), np.nan)
    belief[judged] = both.probability(screener_raw, deep_raw)
    return msgspec.structs.replace(rows, belief=belief)


def _report(
    prepared: Prepared,
    validation: LabelledData,
    judged: ValidationRows,
    policy: Policy,
    settings: TrainingSettings,
    search: Search,
    rule: Rule,
    screener: lightgbm.Booster,
    deep: DeepReport,
) -> Report:
    import onnxruntime
    import torch

    limits = settings.file.screener
    features = prepared.folded.features[: CALLS * limits.batch_rows]
    us = us_per_row(screener.model_to_string().encode(), features, limits.batch_rows)
    if rule.escalation.rule == "gain":
        with_score = np.column_stack([features, np.zeros(len(features), np.float32)])
        us += us_per_row(rule.gain_model.model_to_string().encode(), with_score, limits.batch_rows)
    figured = figures(judged, policy, settings.seed)
    return Report(
        schema=prepared.schema.name,
        seed=settings.seed,
        train=_span(prepared.data.take(prepared.parts.training), prepared.schema),
        validation=_span(validation, prepared.schema),
        note="; ".join(filter(None, (prepared.parts.note, "" if policy.combined.deep else NO_GAIN))),
        features=prepared.engine.width,
        screener=ScreenerReport(search.best, tuple(search.tried), us, limits.us_per_row_max, limits.batch_rows),
        rule=rule.escalation.rule,
        rule_average_precision=rule.average_precision,
        deep=deep,
        versions={
            "lightgbm": lightgbm.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__.split("+")[0],
            "numpy": np.__version__,
        },
        **{name: getattr(figured, name) for name in figured.__struct_fields__},
    )


def _span(data: LabelledData, schema: Schema) -> Span:
    times = data.batch[schema.roles.event_time]
    first, last = (datetime.fromtimestamp(int(time) / 1e3, UTC) for time in (times[0], times[-1]))
    return Span(first, last, data.batch.rows, int(data.fraud.sum()))
