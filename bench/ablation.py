"""`cascade bench ablation`: what the deep model knows beyond the screener, and in which part of its inputs that is.

A model is trained anew for each part that is taken away, from training and validation rows alike. Average precision is
that of the validation rows; differences have 95 % intervals by a bootstrap over days and cards. With several files,
which are independent worlds, the mean difference has Student's interval over the files.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from bench.tables import figure_table, print_table
from cascade.columns import Float32, Float64
from cascade.features import FeatureEngine, parse_spec
from cascade.features.spec import DAY_MS
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import StepProgress
from cascade.protocols import DeepInputs
from cascade.schema import key_codes, parse_schema
from cascade.setting_files import read_setting_file
from stages.intervals import Figure, with_intervals
from stages.report_table import with_reach
from stages.resampling import Ranking, quantile_t
from stages.screener.search import Search
from stages.screener.train import out_of_fold_scores, train_screener
from stages.settings import Size
from stages.training import SCREENER_FOLDS, Prepared, TrainingSettings, draw, prepare

# Columns of a step: whether it is there, and its age.
_PRESENT, _AGE = 0, 1


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """A deep model without a part of its inputs.

    `average_precision`: of the model alone. `beyond_screener`: less the screener's. `lost`: the whole model's less its.
    """

    part: str
    average_precision: Figure
    beyond_screener: Figure
    lost: Figure | None


class FileResult(msgspec.Struct, frozen=True, kw_only=True):
    """The results on a file; `screener`: the best of its search, with its average precision."""

    file: str
    transactions: int
    frauds: int
    screener: str
    screener_average_precision: Figure
    parts: list[PartResult]


class AblationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench ablation`. `beyond_screener`: over the files, where there are several."""

    size: Size
    files: list[FileResult]
    beyond_screener: Figure | None
    seed: int
    machine: Machine


def _shuffled(sequence: Float32) -> Float32:
    """The steps before the current one in a random order, of each row its own; absent ones stay in front."""
    rows, length, _ = sequence.shape
    place = np.random.default_rng(1).random((rows, length))
    place[sequence[:, :, _PRESENT] == 0.0] = -1.0
    place[:, -1] = 2.0
    return np.take_along_axis(sequence, np.argsort(place, axis=1)[:, :, np.newaxis], axis=1)


def _timeless(sequence: Float32) -> Float32:
    """Steps without their age; their order remains."""
    found = sequence.copy()
    found[:, :, _AGE] = 0.0
    return found


def _emptied(sequence: Float32) -> Float32:
    """Only the row's own step, without values: a network needs one."""
    found = np.zeros_like(sequence)
    found[:, -1, _PRESENT] = 1.0
    return found


def _of_sequences(change: Callable[[Float32], Float32], prefix: str, inputs: DeepInputs) -> DeepInputs:
    """Inputs with a change of the sequences whose name begins with `prefix`."""
    changed = {
        name: change(sequence) if name.startswith(prefix) else sequence for name, sequence in inputs.sequences.items()
    }
    return DeepInputs(changed, inputs.features)


# Without which part: how the inputs change.
PARTS: dict[str, Callable[[DeepInputs], DeepInputs]] = {
    "nothing": lambda inputs: inputs,
    "order": partial(_of_sequences, _shuffled, ""),
    "time": partial(_of_sequences, _timeless, ""),
    "terminal": partial(_of_sequences, _emptied, "terminal"),
    "card": partial(_of_sequences, _emptied, "card"),
    "features": lambda inputs: DeepInputs(inputs.sequences, np.zeros_like(inputs.features)),
}


def run_ablation(
    data: Sequence[Path],
    schema_path: Path,
    features_path: Path,
    settings: TrainingSettings,
    size: Size,
    parts: Sequence[str],
    out: Path,
    progress: StepProgress,
) -> AblationReport:
    """Trains a model for each file and part.

    `out`: for checkpoints and the results of whole files, from which an interrupted run goes on.

    Raises SettingError or DataError if a file cannot be used.
    """
    schema_text, features_text = read_setting_file(schema_path), read_setting_file(features_path)
    schema, spec = parse_schema(schema_text, str(schema_path)), parse_spec(features_text, str(features_path))
    out.mkdir(parents=True, exist_ok=True)
    asked = msgspec.json.encode((schema_text, features_text, settings, size, parts))
    results = []
    for path in data:
        digest = hashlib.sha256(asked + (path.read_bytes() if path.is_file() else b"")).hexdigest()
        kept = out / f"{path.stem}-{digest[:16]}.json"
        if not kept.exists():
            engine = FeatureEngine(spec, schema, str(features_path))
            with tempfile.TemporaryDirectory(dir=out) as scratch:
                steps = partial(_named, progress, path.stem)
                prepared = prepare(path, schema, engine, settings, steps)
                found = _of_file(prepared, path, settings, size, parts, Path(scratch), out, steps)
            kept.write_bytes(msgspec.json.encode(found))
        results.append(msgspec.json.decode(kept.read_bytes(), type=FileResult))
    beyond = [result.parts[0].beyond_screener.value for result in results]
    return AblationReport(
        size=size,
        files=results,
        beyond_screener=_over_files(beyond) if len(beyond) > 1 else None,
        seed=settings.seed,
        machine=describe_machine(),
    )


def _named(progress: StepProgress, file: str, step: str, share: float) -> None:
    progress(f"{file}: {step}", share)


def _of_file(
    prepared: Prepared,
    path: Path,
    settings: TrainingSettings,
    size: Size,
    parts: Sequence[str],
    scratch: Path,
    out: Path,
    progress: StepProgress,
) -> FileResult:
    from stages.deep.train import Examples, code_columns, export_onnx, score_onnx, train_deep

    rows, seed = prepared.rows, settings.seed
    search = Search(settings.file.screener, settings.file.escalation.budget, seed, partial(progress, "screener"))
    search.try_sizes(rows)
    chosen = search.best.settings
    raw = out_of_fold_scores(rows, chosen, seed, SCREENER_FOLDS, partial(progress, "out of fold"))
    screener = train_screener(rows, chosen, seed, lambda _: None)
    drawn = draw(prepared, raw, settings, scratch, progress)
    validation, later = prepared.validation, drawn.validation_inputs(prepared, screener)
    learned = drawn.examples(rows.features, raw)
    scores = {"screener": later.features[:, -1].astype(np.float64)}
    for part in parts:
        examples = Examples(PARTS[part](learned), rows.fraud[drawn.rows], drawn.weight, code_columns(prepared.engine))
        report = partial(progress, f"without {part}")
        model = train_deep(examples, drawn.learned, settings.file.deep.of(size), seed, report, out / "checkpoints")
        inputs = PARTS[part](later)
        scores[part] = score_onnx(export_onnx(model, inputs), inputs)
    fraud = validation.fraud == 1
    rankings = [Ranking.of(score, fraud) for score in scores.values()]
    count = len(parts)

    def figures(weight: Float64) -> Float64:
        found = np.array([ranking.average_precision(weight) for ranking in rankings])
        return np.concatenate([found, found[1:] - found[0], found[1] - found[1:]])

    roles = prepared.schema.roles
    day, card = validation.batch[roles.event_time] // DAY_MS, key_codes(validation.batch[roles.card])
    own, *rest = with_intervals(figures, day, card, seed)
    return FileResult(
        file=path.name,
        transactions=len(fraud),
        frauds=int(fraud.sum()),
        screener=f"{chosen.trees} × {chosen.leaves}",
        screener_average_precision=own,
        parts=[
            PartResult(
                part=part,
                average_precision=rest[number],
                beyond_screener=rest[count + number],
                lost=rest[2 * count + number] if number else None,
            )
            for number, part in enumerate(parts)
        ],
    )


def _over_files(values: Sequence[float]) -> Figure:
    """The mean with Student's 95 % interval."""
    mean, freedom = float(np.mean(values)), len(values) - 1
    reach = quantile_t(0.975, freedom) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Figure(mean, mean - reach, mean + reach)


def show_ablation(report: AblationReport, console: Console) -> None:
    """Prints a table for each file."""
    for result in report.files:
        title = f"{result.file}: {result.transactions:,} validation rows, {result.frauds:,} frauds"
        table = figure_table("without", "average precision", "beyond the screener", "lost", title=title)
        for part in result.parts:
            lost = "" if part.lost is None else with_reach(part.lost, 3)
            table.add_row(part.part, with_reach(part.average_precision, 3), with_reach(part.beyond_screener, 3), lost)
        own = with_reach(result.screener_average_precision, 3)
        print_table(console, table, f"screener, {result.screener}, the best of its search: {own}")
    if report.beyond_screener is not None:
        mean = f"{with_reach(report.beyond_screener, 3)} beyond the screener, mean of {len(report.files)} files"
        console.print(f"{report.size}: {mean}", highlight=False)
