"""What terminals lose when cards are partitioned: `python -m bench.terminals --data handbook.parquet`.

Folds the Handbook's stream three ways: by one engine that sees everything, by several that each see their partition's
cards alone, and by several that tell each other summaries of terminals as `streaming.terminals` does. The test week is
scored by the same bundle each time. No Kafka and no clock: summaries are told at set distances of event time, so a
run gives the same figures again.
"""

from __future__ import annotations

import runpy
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import write_json
from bench.handbook import SCHEMAS, SETTINGS, TEST_WEEK
from cascade.bundle import Bundle, load_bundle
from cascade.columns import Array, Bool, ColumnBatch, Float32, Int64
from cascade.config import DeepSettings, TerminalSettings
from cascade.durations import parse_ms
from cascade.engine import deep_inputs
from cascade.errors import CascadeError
from cascade.features import FeatureEngine
from cascade.features.spec import DAY_MS
from cascade.features.summaries import decode, encode
from cascade.frames import LabelledData, read_labelled
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from cascade.protocols import DeepStage, Screener
from cascade.schema import key_codes
from stages.assembly import make_deep_stage, make_screener
from stages.metrics import Quality, quality
from stages.offline import CHUNK_ROWS, Folded, OfflineScores, fold_rows, labels_of
from stages.training import train_bundle
from streaming.commands import between
from streaming.decisions import message_keys

Progress = Callable[[float], None]
EPOCH = datetime(1970, 1, 1)
DEEP_TIMEOUT_S = 600.0
# Engines that tell nothing are independent: how far each goes at a time changes no result.
APART_ROUND_MS = DAY_MS


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """Summary records that were told; `octets`: of their keys and values. `lasting`: what compaction leaves of them."""

    records: int
    octets: int
    lasting: int
    transactions: int
    rounds: int


class FeatureError(msgspec.Struct, frozen=True, kw_only=True):
    """A terminal feature over the week's rows against that of the one engine, whose mean is `reference_mean`.

    Differences are absolute, in the feature's own unit; `differing_share`: of the rows.
    """

    name: str
    reference_mean: float
    difference_mean: float
    difference_max: float
    differing_share: float


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to fold the stream; `volume` is None where nothing is told, `errors` is empty for the reference.

    `escalated_share`, `errors`: of all rows of the week; the qualities: of those that are judged.
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
    """What the run showed; `judged` and `frauds`: rows of the week that count, `protocol` says by whose rule.

    `one_worker_equal`: a single worker that shares gives the reference's features and sequences to the bit.
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
    data: Annotated[Path, typer.Option(help="The Handbook's transactions as one Parquet file.")],
    workers: Annotated[int, typer.Option(min=2, max=64, help="Engines, each with one partition of the cards.")] = 4,
    staleness: Annotated[
        list[str] | None, typer.Option(help="Event time between two rounds of summaries, 1h where absent; repeatable.")
    ] = None,
    bucket_s: Annotated[
        int, typer.Option(min=1, max=86_400, help="A summary's stretch of event time.")
    ] = TerminalSettings().bucket_s,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that `cascade handbook` trained; trained here where absent.")
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option(help="The protocol's script; beside the data's folder where absent.")
    ] = None,
    json: Annotated[Path, typer.Option(help="The figures as JSON.")] = Path("build/terminals.json"),
) -> None:
    """Fold the stream one way after the other, score the test week, and print what each way gives."""
    started_s = time.monotonic()
    rounds_ms = [_staleness_ms(text) for text in staleness or ["1h"]]
    script = protocol or data.resolve().parent.parent / "tools" / "handbook_protocol.py"
    with tempfile.TemporaryDirectory() as directory, Steps() as progress:
        if bundle is None:
            bundle = Path(directory) / "bundle"
            train_bundle(data, SCHEMAS / "handbook.toml", SCHEMAS / "features.toml", bundle, SETTINGS, progress)
        loaded = load_bundle(bundle)
        event_time = loaded.schema.roles.event_time
        labelled = read_labelled(data, loaded.schema)
        past = labelled.take(between(labelled, event_time, None, TEST_WEEK[1]))
        in_week = between(past, event_time, *TEST_WEEK)
        judged = protocol_rows(script, past, loaded) if script.exists() else in_week
        deep = make_deep_stage(loaded, DeepSettings(backend="onnxruntime"))
        try:
            ways, one_worker_equal = compare(
                loaded, deep, past, in_week, judged, workers, rounds_ms, bucket_s * 1_000, progress
            )
        finally:
            deep.close()
        report = Report(
            bundle=loaded.version, seed=SETTINGS.seed, bucket_s=bucket_s, transactions=past.batch.rows,
            judged=int(judged.sum()), frauds=int(past.fraud[judged].sum()),
            protocol="the Handbook's protocol" if script.exists() else "all rows of the week, no protocol was found",
            ways=ways, one_worker_equal=one_worker_equal, machine=describe_machine(),
            elapsed_s=time.monotonic() - started_s,
        )  # fmt: skip
    write_json(json, report)
    show(report, Console(), json)
    if not one_worker_equal:
        raise CascadeError("a single worker that shares does not give the features of one that does not")


def _staleness_ms(text: str) -> int:
    try:
        found = parse_ms(text)
    except ValueError as error:
        raise typer.BadParameter(f"--staleness {text}: {error}") from error
    if not 1 <= found <= DAY_MS:
        raise typer.BadParameter(f"--staleness {text}: out of range; use 1ms to 1d")
    return found


def protocol_rows(script: Path, data: LabelledData, bundle: Bundle) -> Bool:
    """Mask of the rows that the Handbook's script judges in its first test week; raises CascadeError."""
    roles = bundle.schema.roles
    names = runpy.run_path(str(script))
    try:
        test_rows, first = names["test_rows"], names["FIRST_TRAIN_DAY"]
    except KeyError as error:
        raise CascadeError(f"{script}: defines no {error}; give the Handbook's script with --protocol") from error
    day = data.batch[roles.event_time] // DAY_MS
    found: Bool = test_rows(day, key_codes(data.batch[roles.card]), data.fraud, (first - EPOCH.date()).days)
    return found


# --- folding ----------------------------------------------------------------------------------------------------------


def card_partitions(cards: Array, partitions: int) -> Int64:
    """Partition of each row's card, int64 [rows]: CRC-32 of the message's key, as librdkafka spreads keys."""
    different, which = np.unique(cards, return_inverse=True)
    numbers = np.array([zlib.crc32(key) % partitions for key in message_keys(different)], np.int64)
    found: Int64 = numbers[which]
    return found


@dataclass(frozen=True, slots=True)
class Records:
    """Summary records of one round."""

    keys: list[bytes]
    values: list[bytes]

    def octets(self) -> int:
        """Bytes of keys and values."""
        return sum(map(len, self.keys)) + sum(map(len, self.values))


def tell(engine: FeatureEngine, batch: ColumnBatch, sources: Int64, bucket_ms: int) -> Records:
    """Records of the totals, as of now, of all keys and buckets that the rows, already folded, have changed."""
    starts = batch[engine.schema.roles.event_time] // bucket_ms * bucket_ms
    told = Records([], [])
    for field, key in enumerate(engine.shared_keys):
        changed = np.unique(np.column_stack([key_codes(batch[key]), sources, starts]), axis=0)
        codes, of_sources, of_starts = np.ascontiguousarray(changed.T)
        keys, values = encode(field, engine.summarise(key, codes, of_sources, of_starts, bucket_ms))
        told.keys.extend(keys)
        told.values.extend(values)
    return told


def follow(engines: Sequence[FeatureEngine], told: Records) -> None:
    """Every engine reads all records, its own too, as from a topic; raises CascadeError where one cannot be read."""
    found, rejected = decode(told.keys, told.values, engines[0].shared_values)
    if rejected:
        raise CascadeError(f"{rejected} of {len(told.keys)} summary records cannot be read")
    for engine in engines:
        for key, summaries in zip(engine.shared_keys, found, strict=True):
            engine.fold_summaries(key, summaries)


def fold_apart(
    bundle: Bundle,
    data: LabelledData,
    sources: Int64,
    wanted: Bool,
    round_ms: int,
    bucket_ms: int | None,
    progress: Progress,
) -> tuple[Folded, Volume]:
    """Fold `data` by one engine a source, and keep features and sequences where `wanted`.

    `sources` int64 [rows]: the engine of each row, 0 to n − 1. At the end of each stretch of `round_ms` of event time
    every engine tells what has changed, in summaries of `bucket_ms`, and reads what all have told; with None nothing is
    told. Labels go to every engine.
    """
    schema, workers = bundle.schema, int(sources.max()) + 1
    times = data.batch[schema.roles.event_time]
    engines = [_worker(bundle, number, workers) for number in range(workers)]
    rows = np.flatnonzero(wanted)
    place = np.full(data.batch.rows, -1, np.int64)
    place[rows] = np.arange(len(rows))
    features = np.zeros((len(rows), engines[0].width), np.float32)
    sequence = np.zeros((len(rows), *engines[0].sequence_shape), np.float32)
    records = octets = told_labels = 0
    frauds = np.flatnonzero(data.fraud)
    due = times[frauds] + schema.label.delay_ms
    edges = np.append(np.unique(times // round_ms, return_index=True)[1], data.batch.rows)
    for start, end in pairwise(edges.tolist()):
        known = int(np.searchsorted(due, times[end - 1], side="right"))
        if known > told_labels:
            labels = labels_of(data.take(frauds[told_labels:known]), schema.label.field)
            for engine in engines:
                engine.update_labels(labels)
            told_labels = known
        round_told = Records([], [])
        for number, engine in enumerate(engines):
            mine = start + np.flatnonzero(sources[start:end] == number)
            if not len(mine):
                continue
            batch = data.batch.take(mine)
            computed = engine.update(batch, sources[mine])
            kept = wanted[mine]
            features[place[mine[kept]]] = computed.features[kept]
            sequence[place[mine[kept]]] = computed.sequence[kept]
            if bucket_ms is not None:
                told = tell(engine, batch, sources[mine], bucket_ms)
                round_told.keys.extend(told.keys)
                round_told.values.extend(told.values)
        if round_told.keys:
            follow(engines, round_told)
        records += len(round_told.keys)
        octets += round_told.octets()
        progress(end / data.batch.rows)
    volume = Volume(
        records=records, octets=octets, transactions=data.batch.rows, rounds=len(edges) - 1,
        lasting=0 if bucket_ms is None else _lasting(engines[0], data.batch, sources, bucket_ms),
    )  # fmt: skip
    return Folded(rows, features, sequence), volume


def _worker(bundle: Bundle, number: int, workers: int) -> FeatureEngine:
    """An engine that holds the source `number`; what others told of theirs counts."""
    engine = FeatureEngine(bundle.spec, bundle.schema)
    for other in set(range(workers)) - {number}:
        engine.hide(other)
    return engine


def _lasting(engine: FeatureEngine, batch: ColumnBatch, sources: Int64, bucket_ms: int) -> int:
    """Different keys of records: what a compacted topic holds in the end."""
    buckets = batch[engine.schema.roles.event_time] // bucket_ms
    stacks = (np.column_stack([key_codes(batch[key]), sources, buckets]) for key in engine.shared_keys)
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
    """Fold and judge each way: one engine, `workers` apart, `workers` that share with each of `rounds_ms`.

    `wanted`: rows that are scored, `judged`: the part of them that counts. Also whether one worker that shares, in
    rounds of the first of `rounds_ms`, gives what the one engine gives, to the bit.
    """
    reference_engine = FeatureEngine(bundle.spec, bundle.schema)
    screener = make_screener(bundle, reference_engine.width)
    sources = card_partitions(data.batch[bundle.schema.roles.card], workers)
    columns = [reference_engine.names.index(one.name) for key in reference_engine.shared_keys
               for one in reference_engine.plan.keyed[key]]  # fmt: skip
    names = [reference_engine.names[column] for column in columns]

    reference = fold_rows(reference_engine, data, wanted, wanted, lambda share: progress("one engine", share))

    def judge(name: str, folded: Folded, number: int, staleness_s: float | None, volume: Volume | None) -> Way:
        raw = score(folded, screener, deep)
        counts = judged[folded.rows]
        rows = data.take(folded.rows[counts])
        probability, escalated = raw.cascade(bundle.policy)
        errors = (
            ()
            if folded is reference
            else feature_errors(names, folded.features[:, columns], reference.features[:, columns])
        )
        return Way(
            name=name, workers=number, staleness_s=staleness_s, volume=volume, errors=errors,
            escalated_share=float(escalated.mean()),
            screener=_quality(bundle, rows, bundle.policy.screener.probability(raw.screener_raw)[counts]),
            cascade=_quality(bundle, rows, probability[counts]),
        )  # fmt: skip

    ways = [judge("one engine", reference, 1, None, None)]
    name = f"{workers} engines, nothing shared"
    apart, _ = fold_apart(bundle, data, sources, wanted, APART_ROUND_MS, None, lambda share: progress(name, share))
    ways.append(judge(name, apart, workers, None, None))
    for round_ms in rounds_ms:
        name = f"{workers} engines, shared every {round_ms / 1_000:g} s"
        shared, volume = fold_apart(
            bundle, data, sources, wanted, round_ms, bucket_ms,
            lambda share: progress(name, share),  # noqa: B023
        )  # fmt: skip
        ways.append(judge(name, shared, workers, round_ms / 1_000, volume))
    alone, _ = fold_apart(
        bundle, data, np.zeros_like(sources), wanted, rounds_ms[0], bucket_ms,
        lambda share: progress("1 engine that shares", share),
    )  # fmt: skip
    equal = np.array_equal(alone.features, reference.features) and np.array_equal(alone.sequence, reference.sequence)
    return tuple(ways), equal


def score(folded: Folded, screener: Screener, deep: DeepStage) -> OfflineScores:
    """Log-odds of both models."""
    screener_raw, deep_raw = [], []
    for start in range(0, len(folded.rows), CHUNK_ROWS):
        features, sequence = (part[start : start + CHUNK_ROWS] for part in (folded.features, folded.sequence))
        raw = screener.score(features)
        screener_raw.append(raw)
        deep_raw.append(deep.submit(deep_inputs(features, sequence, raw), timeout_s=DEEP_TIMEOUT_S).result())
    return OfflineScores(folded.rows, np.concatenate(screener_raw), np.concatenate(deep_raw))


def feature_errors(names: Sequence[str], found: Float32, reference: Float32) -> tuple[FeatureError, ...]:
    """Of each column of `found` against `reference`, both float32 [rows, columns]."""
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
    return quality(probability, rows.fraud == 1, day, card, bundle.policy.escalation_budget)


# --- showing ----------------------------------------------------------------------------------------------------------


def show(report: Report, console: Console, json: Path) -> None:
    """Print the report."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    table.add_column("screener, then cascade", min_width=24)
    for name in ("AUC", "AP", "CP@100", "AUC", "AP", "CP@100", "escalated %"):
        table.add_column(name, justify="right", no_wrap=True)
    for way in report.ways:
        figures = (*_figures(way.screener), *_figures(way.cascade))
        table.add_row(way.name, *figures, f"{100 * way.escalated_share:.2f}")
    console.print(table)
    errors = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    errors.add_column("terminal features, difference to one engine", no_wrap=True)
    errors.add_column("mean value", justify="right")
    for way in report.ways[1:]:
        sharing = "apart" if way.staleness_s is None else f"{way.staleness_s:g} s"
        for figure in ("mean", "max", "rows %"):
            errors.add_column(f"{sharing} {figure}", justify="right")
    for column in zip(*(way.errors for way in report.ways[1:]), strict=True):
        cells = (
            cell
            for one in column
            for cell in (f"{one.difference_mean:.3g}", f"{one.difference_max:.3g}", f"{100 * one.differing_share:.1f}")
        )
        errors.add_row(column[0].name, f"{column[0].reference_mean:.3g}", *cells)
    console.print()
    console.print(errors)
    console.print()
    for way in report.ways:
        if way.volume is not None:
            one = way.volume
            console.print(
                f" {way.name}: {one.records:,} records for {one.transactions:,} transactions"
                f" ({one.records / one.transactions:.3f} each, {one.octets / one.records:.0f} bytes a record), of which"
                f" compaction leaves {one.lasting:,}; {one.rounds:,} rounds",
                highlight=False,
            )
    equal = "to the bit" if report.one_worker_equal else "NOT EQUAL"
    console.print(
        f" one worker that shares, against one engine: {equal}\n"
        f" {report.judged:,} transactions judged, {report.frauds:,} frauds, {report.protocol}; bundle {report.bundle};"
        f" buckets of {report.bucket_s:,} s; partition: CRC-32 of the card's id as text\n"
        f" {report.machine.text}; seed {report.seed}\n"
        f" {report.elapsed_s:.0f} s in all; figures in {json}",
        highlight=False,
    )


def _figures(one: Quality) -> tuple[str, ...]:
    found = (one.auc, one.average_precision, one.card_precision_top100)
    return tuple("-" if figure is None else f"{figure:.4f}" for figure in found)


if __name__ == "__main__":
    typer.run(measure)
