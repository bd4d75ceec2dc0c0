"""What terminal features lose when cards are partitioned: `python -m bench.terminals --data handbook.parquet`.

Folds a stream in three ways: by a single engine that sees every card; by several engines, each with the cards of its
partition; and by several engines that exchange summaries of terminals, as `streaming.worker.terminals` does. The same
bundle scores the judged days each time, by default the Handbook's test week. There is no Kafka and no clock: the
engines exchange summaries at fixed distances of event time, so that every run gives the same figures."""

from __future__ import annotations

import runpy
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console

from bench.cluster import write_json
from bench.handbook import SCHEMAS, SETTINGS, TEST_WEEK
from bench.tables import figure_table, print_table
from cascade.bundle import Bundle, load_bundle
from cascade.columns import Array, Bool, ColumnBatch, Float32, Int64
from cascade.config import DeepSettings, TerminalSettings
from cascade.durations import parse_ms
from cascade.engine import Engine, deep_inputs
from cascade.errors import CascadeError
from cascade.features import FeatureEngine
from cascade.features.spec import DAY_MS
from cascade.features.summaries import decode, encode
from cascade.frames import LabelledData, read_labelled
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from cascade.protocols import DeepStage
from cascade.schema import key_codes
from stages.assembly import make_deep_stage, make_engine
from stages.metrics import Quality, quality
from stages.offline import CHUNK_ROWS, Folded, OfflineScores, fold_rows, labels_of
from stages.training import train_bundles
from streaming.data_commands import FromOption, ToOption, between
from streaming.pipeline.decisions import message_keys

Progress = Callable[[float], None]
EPOCH = datetime(1970, 1, 1)
DEEP_TIMEOUT_S = 600.0
# Engines that exchange nothing are independent, so the length of a round changes no result.
APART_ROUND_MS = DAY_MS


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """Summary records that were sent; `octets`: bytes of their keys and values. `lasting`: records after compaction."""

    records: int
    octets: int
    lasting: int
    transactions: int
    rounds: int


class FeatureError(msgspec.Struct, frozen=True, kw_only=True):
    """Differences of a terminal feature from the single engine's over the rows of the judged days.

    They are absolute, in the feature's own unit. `reference_mean`: the single engine's mean. `differing_share`: share
    of the rows with a difference.
    """

    name: str
    reference_mean: float
    difference_mean: float
    difference_max: float
    differing_share: float


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """A way to fold the stream.

    `volume`: None where nothing is exchanged. `errors`: empty for the reference. `escalated_share` and `errors` are of
    all rows of the judged days, the qualities of its judged rows.
    """

    name: str
    workers: int
    staleness_s: float | None
    screener: Quality
    cascade: Quality
    escalated_share: float
    errors: tuple[FeatureError, ...]
    volume: Volume | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a run.

    `judged` and `frauds`: rows of the judged days that count, by the rule that `protocol` names. `one_worker_equal`: a
    single worker that shares summaries computes the reference's features and sequences to the bit.
    """

    bundle: str
    seed: int
    bucket_s: int
    transactions: int
    judged: int
    frauds: int
    protocol: str
    ways: tuple[Way, ...]
    one_worker_equal: bool
    machine: Machine
    elapsed_s: float


def measure(
    data: Annotated[Path, typer.Option(help="Labelled transactions, the Handbook's as one file by default.")],
    first_day: FromOption = TEST_WEEK[0],
    end_day: ToOption = TEST_WEEK[1],
    workers: Annotated[int, typer.Option(min=2, max=64, help="Engines, each with one partition of the cards.")] = 4,
    staleness: Annotated[
        list[str] | None, typer.Option(help="Event time between two rounds of summaries, 1h by default; repeatable.")
    ] = None,
    bucket_s: Annotated[
        int, typer.Option(min=1, max=86_400, help="Event time that a summary covers, seconds.")
    ] = TerminalSettings().bucket_s,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that scores; by default one is trained on the Handbook's data.")
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option(help="The protocol's script; by default the one beside the data's folder.")
    ] = None,
    json: Annotated[Path, typer.Option(help="File for the figures, JSON.")] = Path("build/terminals.json"),
) -> None:
    """Fold the stream in each way, score the judged days, and compare."""
    started_s = time.monotonic()
    rounds_ms = [_staleness_ms(text) for text in staleness or ["1h"]]
    script = protocol or data.resolve().parent.parent / "tools" / "handbook_protocol.py"
    with tempfile.TemporaryDirectory() as directory, Steps() as progress:
        if bundle is None:
            bundle = Path(directory) / "bundle"
            train_bundles(data, SCHEMAS / "handbook.toml", SCHEMAS / "features.toml", bundle, SETTINGS, progress)
        loaded = load_bundle(bundle)
        event_time = loaded.schema.roles.event_time
        labelled = read_labelled(data, loaded.schema)
        past = labelled.take(between(labelled, event_time, None, end_day))
        wanted = between(past, event_time, first_day, end_day)
        judged = protocol_rows(script, past, loaded) if script.exists() else wanted
        with closing(make_deep_stage(loaded, DeepSettings(backend="onnxruntime"))) as deep:
            ways, one_worker_equal = compare(
                loaded, deep, past, wanted, judged, workers, rounds_ms, bucket_s * 1_000, progress
            )
        report = Report(
            bundle=loaded.version,
            seed=SETTINGS.seed,
            bucket_s=bucket_s,
            transactions=past.batch.rows,
            judged=int(judged.sum()),
            frauds=int(past.fraud[judged].sum()),
            protocol="the Handbook's protocol" if script.exists() else "all rows of these days, no protocol was found",
            ways=ways,
            one_worker_equal=one_worker_equal,
            machine=describe_machine(),
            elapsed_s=time.monotonic() - started_s,
        )
    write_json(json, report)
    show(report, Console(), json)
    if not one_worker_equal:
        raise CascadeError("a single worker with sharing computes other features than a single worker without it")


def _staleness_ms(text: str) -> int:
    try:
        staleness_ms = parse_ms(text)
    except ValueError as error:
        raise typer.BadParameter(f"--staleness {text}: {error}") from error
    if not 1 <= staleness_ms <= DAY_MS:
        raise typer.BadParameter(f"--staleness {text}: out of range; use 1ms to 1d")
    return staleness_ms


def protocol_rows(script: Path, data: LabelledData, bundle: Bundle) -> Bool:
    """Mask of the rows that the Handbook's script judges in its first test week.

    Raises CascadeError where `script` is another script.
    """
    roles = bundle.schema.roles
    names = runpy.run_path(str(script))
    try:
        test_rows, first = names["test_rows"], names["FIRST_TRAIN_DAY"]
    except KeyError as error:
        raise CascadeError(f"{script}: {error} is not defined; give the Handbook's script with --protocol") from error
    day = data.batch[roles.event_time] // DAY_MS
    mask: Bool = test_rows(day, key_codes(data.batch[roles.card]), data.fraud, (first - EPOCH.date()).days)
    return mask


# --- folding ----------------------------------------------------------------------------------------------------------


def card_partitions(cards: Array, partitions: int) -> Int64:
    """Partition id of each row's card, int64 [rows]: CRC-32 of the message's key, as librdkafka spreads keys."""
    distinct, card_index = np.unique(cards, return_inverse=True)
    ids = np.array([zlib.crc32(key) % partitions for key in message_keys(distinct)], np.int64)
    partition_ids: Int64 = ids[card_index]
    return partition_ids


def summary_records(
    engine: FeatureEngine, batch: ColumnBatch, partition_ids: Int64, bucket_ms: int
) -> tuple[list[bytes], list[bytes]]:
    """Keys and values of the records that an engine sends after a batch: totals of every key and bucket that changed.

    batch: the folded rows.
    partition_ids: of the rows, int64 [rows].
    bucket_ms: event time that a summary covers.
    """
    starts = batch[engine.schema.roles.event_time] // bucket_ms * bucket_ms
    keys: list[bytes] = []
    values: list[bytes] = []
    for field, key in enumerate(engine.shared_keys):
        changed = np.unique(np.column_stack([key_codes(batch[key]), partition_ids, starts]), axis=0)
        codes, ids, of_starts = np.ascontiguousarray(changed.T)
        of_key = encode(field, engine.summarise(key, codes, ids, of_starts, bucket_ms))
        keys += of_key[0]
        values += of_key[1]
    return keys, values


def fold_records(engines: Sequence[FeatureEngine], keys: list[bytes], values: list[bytes]) -> None:
    """Every engine reads all records, its own too, as from a topic; raises CascadeError for an unreadable record."""
    by_key, rejected = decode(keys, values, engines[0].shared_values)
    if rejected:
        raise CascadeError(f"{rejected} of {len(keys)} summary records cannot be read")
    for engine in engines:
        for key, summaries in zip(engine.shared_keys, by_key, strict=True):
            engine.fold_summaries(key, summaries)


def fold_partitioned(
    bundle: Bundle,
    data: LabelledData,
    partition_ids: Int64,
    wanted: Bool,
    round_ms: int,
    bucket_ms: int | None,
    progress: Progress,
) -> tuple[Folded, Volume]:
    """Folds `data` by an engine for each partition; every engine gets all labels.

    bundle: features and schema.
    data: transactions in the order of time.
    partition_ids: of the rows, int64 [rows], 0 to n − 1.
    wanted: rows whose features and sequences are returned, bool [rows].
    round_ms: event time of a round; at its end every engine sends summaries, and reads those of all engines.
    bucket_ms: event time that a summary covers; None: the engines exchange nothing.
    progress: gets the share of the rows that is folded.
    """
    schema, workers = bundle.schema, int(partition_ids.max()) + 1
    times = data.batch[schema.roles.event_time]
    engines = [_worker(bundle, partition_id, workers) for partition_id in range(workers)]
    rows = np.flatnonzero(wanted)
    position = np.full(data.batch.rows, -1, np.int64)
    position[rows] = np.arange(len(rows))
    features = np.zeros((len(rows), engines[0].width), np.float32)
    shapes = engines[0].sequence_shapes
    sequences = {name: np.zeros((len(rows), *shape), np.float32) for name, shape in shapes.items()}
    record_count = octets = label_count = 0
    frauds = np.flatnonzero(data.fraud)
    due = times[frauds] + schema.label.delay_ms
    edges = np.append(np.unique(times // round_ms, return_index=True)[1], data.batch.rows)
    for start, end in pairwise(edges.tolist()):
        due_count = int(np.searchsorted(due, times[end - 1], side="right"))
        if due_count > label_count:
            labels = labels_of(data.take(frauds[label_count:due_count]), schema.label.field)
            for engine in engines:
                engine.update_labels(labels)
            label_count = due_count
        keys: list[bytes] = []
        values: list[bytes] = []
        for partition_id, engine in enumerate(engines):
            own = start + np.flatnonzero(partition_ids[start:end] == partition_id)
            if not len(own):
                continue
            batch = data.batch.take(own)
            computed = engine.update(batch, partition_ids[own])
            chosen = wanted[own]
            features[position[own[chosen]]] = computed.features[chosen]
            for name, sequence in computed.sequences(chosen).items():
                sequences[name][position[own[chosen]]] = sequence
            if bucket_ms is not None:
                sent = summary_records(engine, batch, partition_ids[own], bucket_ms)
                keys += sent[0]
                values += sent[1]
        if keys:
            fold_records(engines, keys, values)
        record_count += len(keys)
        octets += sum(map(len, keys)) + sum(map(len, values))
        progress(end / data.batch.rows)
    lasting = 0 if bucket_ms is None else _lasting(engines[0], data.batch, partition_ids, bucket_ms)
    volume = Volume(
        records=record_count, octets=octets, transactions=data.batch.rows, rounds=len(edges) - 1, lasting=lasting
    )
    return Folded(rows, features, sequences), volume


def _worker(bundle: Bundle, partition_id: int, workers: int) -> FeatureEngine:
    """An engine that owns a partition and uses the summaries of the others."""
    engine = FeatureEngine(bundle.spec, bundle.schema)
    for other in set(range(workers)) - {partition_id}:
        engine.hide(other)
    return engine


def _lasting(engine: FeatureEngine, batch: ColumnBatch, partition_ids: Int64, bucket_ms: int) -> int:
    """The number of different record keys, which is what compaction leaves of a topic."""
    buckets = batch[engine.schema.roles.event_time] // bucket_ms
    stacks = (np.column_stack([key_codes(batch[key]), partition_ids, buckets]) for key in engine.shared_keys)
    return sum(len(np.unique(stack, axis=0)) for stack in stacks)


# --- judging ----------------------------------------------------------------------------------------------------------


def compare(
    bundle: Bundle,
    deep: DeepStage,
    data: LabelledData,
    wanted: Bool,
    judged: Bool,
    workers: int,
    rounds_ms: Sequence[int],
    bucket_ms: int,
    progress: Callable[[str, float], None],
) -> tuple[tuple[Way, ...], bool]:
    """Folds and judges each way; also returns whether a single worker with sharing equals the single engine to the bit.

    The ways are a single engine, `workers` engines without exchange, and `workers` engines for each of `rounds_ms`.

    bundle: features, screener and policy; deep: its deep model.
    data: transactions in the order of time.
    wanted: rows that are scored, bool [rows]; judged: those of them that count for quality, bool [rows].
    workers: engines, each with a partition of the cards.
    rounds_ms: event times between two exchanges; the single worker uses the first.
    bucket_ms: event time that a summary covers.
    progress: gets a way's name and the share that is folded.
    """
    single = FeatureEngine(bundle.spec, bundle.schema)
    engine = make_engine(bundle)
    partition_ids = card_partitions(data.batch[bundle.schema.roles.card], workers)
    shared = [feature.name for key in single.shared_keys for feature in single.plan.keyed[key]]
    columns = [single.names.index(name) for name in shared]
    reference = fold_rows(single, data, wanted, wanted, lambda share: progress("one engine", share))

    def judge(name: str, folded: Folded, engines: int, staleness_s: float | None, volume: Volume | None) -> Way:
        raw = score(folded, engine, deep)
        counts = judged[folded.rows]
        rows = data.take(folded.rows[counts])
        probability, escalated = raw.cascade(bundle.policy)
        errors: tuple[FeatureError, ...] = ()
        if folded is not reference:
            errors = feature_errors(shared, folded.features[:, columns], reference.features[:, columns])
        return Way(
            name=name,
            workers=engines,
            staleness_s=staleness_s,
            volume=volume,
            errors=errors,
            escalated_share=float(escalated.mean()),
            screener=_quality(bundle, rows, bundle.policy.screener.probability(raw.screener_raw)[counts]),
            cascade=_quality(bundle, rows, probability[counts]),
        )

    def fold(name: str, ids: Int64, round_ms: int, bucket_ms: int | None) -> tuple[Folded, Volume]:
        return fold_partitioned(bundle, data, ids, wanted, round_ms, bucket_ms, lambda share: progress(name, share))

    ways = [judge("one engine", reference, 1, None, None)]
    name = f"{workers} engines, nothing shared"
    ways.append(judge(name, fold(name, partition_ids, APART_ROUND_MS, None)[0], workers, None, None))
    for round_ms in rounds_ms:
        name = f"{workers} engines, shared every {round_ms / 1_000:g} s"
        folded, volume = fold(name, partition_ids, round_ms, bucket_ms)
        ways.append(judge(name, folded, workers, round_ms / 1_000, volume))
    alone, _ = fold("1 engine that shares", np.zeros_like(partition_ids), rounds_ms[0], bucket_ms)
    equal = np.array_equal(alone.features, reference.features) and all(
        np.array_equal(sequence, reference.sequences[name]) for name, sequence in alone.sequences.items()
    )
    return tuple(ways), equal


def score(folded: Folded, engine: Engine, deep: DeepStage) -> OfflineScores:
    """Scores of both models and of the escalation rule."""
    parts = []
    for start in range(0, len(folded.rows), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        features, sequences = folded.features[rows], {name: part[rows] for name, part in folded.sequences.items()}
        raw, _, escalation = engine.scores(features)
        answer = deep.submit(deep_inputs(features, sequences, raw), timeout_s=DEEP_TIMEOUT_S).result()
        parts.append(np.stack([raw, answer, escalation, np.ones(len(raw))]))
    return OfflineScores(folded.rows, *np.concatenate(parts, axis=1))


def feature_errors(names: Sequence[str], found: Float32, reference: Float32) -> tuple[FeatureError, ...]:
    """Errors of each named column of `found` against `reference`, both float32 [rows, columns]."""
    exact = reference.astype(np.float64)
    differences = np.abs(found - exact)
    return tuple(
        FeatureError(
            name=name,
            reference_mean=float(exact[:, column].mean()),
            difference_mean=float(differences[:, column].mean()),
            difference_max=float(differences[:, column].max()),
            differing_share=float((differences[:, column] > 0).mean()),
        )
        for column, name in enumerate(names)
    )


def _quality(bundle: Bundle, rows: LabelledData, probability: Array) -> Quality:
    roles = bundle.schema.roles
    day, card = rows.batch[roles.event_time] // DAY_MS, key_codes(rows.batch[roles.card])
    return quality(probability, rows.fraud == 1, day, card, bundle.policy.escalation.budget)


# --- showing ----------------------------------------------------------------------------------------------------------


def show(report: Report, console: Console, json: Path) -> None:
    """Prints the report: quality and volume of each way, and the errors of its terminal features."""
    table = figure_table("way", "AUC", "AP", "CP@100", "escalated %")
    for way in report.ways:
        table.add_row(f"[bold]{way.name}", "", "", "", f"{100 * way.escalated_share:.2f}")
        table.add_row(" screener", *_figures(way.screener))
        table.add_row(" cascade", *_figures(way.cascade), end_section=True)
    for way in report.ways[1:]:
        print_table(console, table)
        table = figure_table("feature", "mean", "mean error", "max error", "wrong rows %", title=way.name)
        for error in way.errors:
            figures = (error.reference_mean, error.difference_mean, error.difference_max)
            table.add_row(error.name, *(f"{figure:.3g}" for figure in figures), f"{100 * error.differing_share:.1f}")
    print_table(
        console,
        table,
        *(_volume_text(way.name, way.volume) for way in report.ways if way.volume is not None),
        f"one worker that shares, against one engine: {'to the bit' if report.one_worker_equal else 'NOT EQUAL'}",
        f"{report.judged:,} transactions judged, {report.frauds:,} frauds, {report.protocol}; bundle {report.bundle}",
        f"buckets of {report.bucket_s:,} s; partition: CRC-32 of the card's id as text",
        f"{report.machine.text}; seed {report.seed}",
        f"{report.elapsed_s:.0f} s in all; figures in {json}",
    )


def _volume_text(way: str, volume: Volume) -> str:
    return (
        f"{way}: {volume.records:,} records for {volume.transactions:,} transactions"
        f" ({volume.records / volume.transactions:.3f} each, {volume.octets / volume.records:.0f} bytes a record);"
        f" compaction leaves {volume.lasting:,}; {volume.rounds:,} rounds"
    )


def _figures(quality: Quality) -> tuple[str, ...]:
    figures = (quality.auc, quality.average_precision, quality.card_precision_top100)
    return tuple("-" if figure is None else f"{figure:.4f}" for figure in figures)


if __name__ == "__main__":
    typer.run(measure)
