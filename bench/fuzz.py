"""`cascade fuzz`: passes millions of hostile messages through the worker's steps from octets to rows or dead letters.

Each batch has a random generator of its own, seeded by the seed and the number of the batch. So these two reproduce a
violation, whatever the number of processes.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import struct
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from random import Random
from typing import Annotated, Any

import msgspec
import numpy as np
import psutil
import typer
from rich.console import Console

from bench.hostile import Maker, Message, codec_with_registry, costliest
from bench.reference_parsers import PARSERS
from bench.tables import figure_table, print_table, publish
from bench.turns import seconds_of
from cascade.columns import ByteColumn, ColumnBatch, Int64
from cascade.config import CodecName, WorkerSettings
from cascade.frames import frame_to_batch
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from cascade.schema import Field, Schema, load_schema, out_of_limits
from cascade.simulator import SimulatorSettings, simulate
from streaming.codecs import Codec, Reject, RejectReason
from streaming.codecs.faults import DETAIL_CHARACTERS_MAX
from streaming.kafka import FetchedBatch
from streaming.pipeline.dead_letters import DETAIL_BYTES_MAX, OVERHEAD_BYTES_MAX, DeadLetter, dead_letter
from streaming.pipeline.decode import Decoder
from streaming.pipeline.offsets import NOTHING_DECIDED
from streaming.pipeline.table import Table

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SETTINGS = WorkerSettings()
BATCH_ROWS = SETTINGS.batch_rows_max
# Each of these batches has the costliest messages, as many as a fetch of a partition returns at most: a megabyte.
COSTLY_BATCH_EVERY = 201
COSTLY_BATCH_ROWS = 16
# CPU time of a micro-batch, which does not depend on the machine's other work. Valid messages take a few ms.
BATCH_CPU_MS_MAX = 1_000.0
# A process that does not end its batch within this time is killed.
STALL_S_MAX = 60.0
# Bounds the search for the message that stalls a process; includes the start of a new process.
SEARCH_S_MAX = 120.0
START_METHOD = "spawn"
# A run of few batches needs no processes of its own: their start takes longer than the batches.
BATCHES_IN_PROCESS = 32
# Growth of a process's memory after WARM_BATCHES. Batches are freed, so this is the slack of the allocator.
RSS_GROWTH_MB_MAX = 64.0
WARM_BATCHES = 40
# Each of these rows is compared with a reference parser.
COMPARED_EVERY = 61
# Details name fields and limits, so there are few wordings apart from numbers. Values in details would make many.
WORDINGS_MAX = 300
# The ids of valid messages have 16 digits. Positions and sizes in details have fewer digits than this.
VALUE_DIGITS = 8
VALID_ROWS = 64
ID_OFFSET = 4_000_123_400_000_000
HEX_BYTES_MAX = 200
TOPIC = "transactions"
_LONG_NUMBER = re.compile(rf"\d{{{VALUE_DIGITS},}}")
# limits that details may name
_INT64_LIMITS = re.compile(r"9223372036854775807|-9223372036854775808")
_DIGITS = re.compile(r"\d+")
DETAILS_MAX = 100_000


class Violation(msgspec.Struct, frozen=True):
    """A broken promise. `batch`: its number. `message_hex`: the first 200 octets of the message, if one caused it."""

    seed: int
    batch: int
    what: str
    message_hex: str | None


class FuzzReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `cascade fuzz`.

    `rejected`: number of messages by reason. `compared`: rows that were compared with a reference parser. `seconds`:
    duration. `slowest_batch_ms`: CPU time. `rss_growth_mb`: the largest growth of a process after its first batches.
    `limits`: the bounds that hold.
    """

    seed: int
    processes: int
    messages: int
    accepted: int
    rejected: dict[str, int]
    compared: int
    seconds: float
    messages_per_second: float
    slowest_batch_ms: float
    rss_growth_mb: float
    limits: dict[str, float]
    violations: list[Violation]
    machine: Machine


class BrokenPromiseError(Exception):
    """A check failed. `index`: the message's position in its batch, None if the batch as a whole failed."""

    def __init__(self, what: str, index: int | None = None) -> None:
        super().__init__(what)
        self.what, self.index = what, index


@dataclass(frozen=True)
class Target:
    """A codec with a schema. `valid`: the rows that are mutated. `appended_ms`: append time of every record."""

    name: CodecName
    schema: Schema
    valid: ColumnBatch
    codec: Codec
    appended_ms: int

    @property
    def fields(self) -> dict[str, Field]:
        """The fields of a message."""
        return self.schema.fields


@dataclass
class Tally:
    """The counts of one process.

    `details`: (reason, detail) pairs that were checked; cleared at DETAILS_MAX. `wordings`: details without numbers.
    """

    messages: int = 0
    accepted: int = 0
    compared: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    slowest_batch_ms: float = 0.0
    rss_growth_mb: float = 0.0
    details: set[tuple[str, str]] = field(default_factory=set)
    wordings: set[str] = field(default_factory=set)


# --- one batch ------------------------------------------------------------------------------------------------------


def make_targets() -> list[Target]:
    """Each codec, with the simulator's schema and with a schema whose card and terminal are strings.

    Reads valid messages with each, so that no batch pays for the compilation of a kernel.
    """
    schema = load_schema(Path(str(files("cascade") / "schemas" / "simulator.toml")))
    rows = frame_to_batch(simulate(SimulatorSettings(cards=40, terminals=40, days=2)), schema, "simulated")
    rows = rows.take(np.arange(VALID_ROWS))
    keys = (schema.roles.card, schema.roles.terminal)
    numbered = dict(rows.columns) | {name: rows[name] + ID_OFFSET for name in (*keys, schema.roles.transaction_id)}
    text = Field(type="string", max_length=24)
    with_texts = msgspec.structs.replace(schema, fields=schema.fields | dict.fromkeys(keys, text))
    named = numbered | {name: numbered[name].astype(text.dtype) for name in keys}
    appended_ms = int(rows[schema.roles.event_time].max()) + 1_000
    names: tuple[CodecName, ...] = ("json", "msgpack", "binary", "avro")
    targets = [
        Target(
            name,
            variant,
            ColumnBatch(columns, rows.rows),
            codec_with_registry(name, variant.fields, SETTINGS.message_bytes_max),
            appended_ms,
        )
        for name in names
        for variant, columns in ((schema, numbered), (with_texts, named))
    ]
    for target in targets:
        read(target, [*target.codec.encode(target.valid)])
    return targets


def make_batch(target: Target, seed: int, number: int) -> list[Message]:
    """The messages of batch `number`."""
    chance = Random(f"{seed}/{number}")  # noqa: S311
    maker = Maker(target.name, target.fields, target.valid, SETTINGS.message_bytes_max, chance)
    if number % COSTLY_BATCH_EVERY == 0:
        return [costliest(maker) for _ in range(COSTLY_BATCH_ROWS)]
    return maker.messages(BATCH_ROWS)


def read(target: Target, values: list[Message]) -> tuple[Table, list[Reject], list[DeadLetter]]:
    """Do with a fetch what the worker does, up to the rows that it scores and the dead letters that it sends."""
    count = len(values)
    keys: list[Message] = [b"card"] * count
    appended_ms = np.full(count, target.appended_ms)
    # as the default client does, in columns
    octets = ByteColumn.of(values)
    fetched = FetchedBatch(TOPIC, 0, np.arange(count), appended_ms, keys, octets, [()] * count)
    decoder = Decoder(target.codec, target.schema.roles.event_time, SETTINGS.ahead_ms_max, True, "fuzz")
    table, _, rejected = decoder.decode([fetched], [NOTHING_DECIDED], float(target.appended_ms))
    letters = [
        dead_letter(
            reject,
            topic=TOPIC,
            partition=0,
            offset=reject.index,
            time_ms=target.appended_ms,
            key=b"card",
            value=values[reject.index],
        )
        for part in rejected
        for reject in part.rejects
    ]
    return table, [reject for part in rejected for reject in part.rejects], letters


def try_batch(target: Target, values: list[Message], tally: Tally) -> None:
    """Read the messages and check every promise; raises BrokenPromiseError, and what `read` raises."""
    started_s = time.thread_time()
    table, rejects, letters = read(target, values)
    took_ms = (time.thread_time() - started_s) * 1e3
    _check_partition(len(values), table.rows["offset"], rejects)
    _check_letters(values, rejects, letters, tally)
    _check_rows(target, table.batch, table.rows["offset"])
    tally.compared += _compare(target, values, table)
    tally.messages += len(values)
    tally.accepted += len(table)
    tally.rejected.update([reject.reason.value for reject in rejects])
    tally.slowest_batch_ms = max(tally.slowest_batch_ms, took_ms)
    if took_ms > BATCH_CPU_MS_MAX:
        raise BrokenPromiseError(f"the batch took {took_ms:.0f} ms of CPU, the limit is {BATCH_CPU_MS_MAX:.0f}")


def _check_partition(count: int, rows: Int64, rejects: list[Reject]) -> None:
    seen = np.zeros(count, np.int64)
    np.add.at(seen, rows, 1)
    np.add.at(seen, np.array([reject.index for reject in rejects], np.int64), 1)
    wrong = np.flatnonzero(seen != 1)
    if len(wrong):
        raise BrokenPromiseError(f"it became a row or a reject {seen[wrong[0]]} times, not once", int(wrong[0]))


def _check_letters(values: list[Message], rejects: list[Reject], letters: list[DeadLetter], tally: Tally) -> None:
    for reject, letter in zip(rejects, letters, strict=True):
        if letter.value is not values[reject.index]:
            raise BrokenPromiseError("its dead letter has other octets", reject.index)
        headers = dict(letter.headers)
        sizes = [len(octets or b"") for octets in headers.values()]
        if max(sizes) > DETAIL_BYTES_MAX or sum(sizes) + sum(map(len, headers)) > OVERHEAD_BYTES_MAX:
            raise BrokenPromiseError(f"the headers of its dead letter are too large: {sizes}", reject.index)
        if headers["cascade-reason"] != reject.reason.value.encode() or not headers["cascade-detail"]:
            raise BrokenPromiseError("the headers of its dead letter lack the reason or the detail", reject.index)
        if (reject.reason, reject.detail) not in tally.details:
            _check_detail(reject, tally)


def _check_detail(reject: Reject, tally: Tally) -> None:
    detail = reject.detail
    if reject.reason not in RejectReason:
        raise BrokenPromiseError(f"its reason {reject.reason} is unknown", reject.index)
    if not detail or not detail.isprintable() or len(detail) > DETAIL_CHARACTERS_MAX:
        raise BrokenPromiseError(f"its detail is empty, not printable or too long: {detail!r}", reject.index)
    if len(tally.details) == DETAILS_MAX:
        tally.details.clear()
    tally.details.add((reject.reason, detail))
    tally.wordings.add(_DIGITS.sub("#", detail))
    if _LONG_NUMBER.search(_INT64_LIMITS.sub("", detail)) or len(tally.wordings) > WORDINGS_MAX:
        raise BrokenPromiseError(f"its detail seems to contain a value: {detail!r}", reject.index)


def _check_rows(target: Target, batch: ColumnBatch, offsets: Int64) -> None:
    wrong = out_of_limits(target.fields, batch)
    event_time = target.schema.roles.event_time
    wrong["the lead of its event"] = batch[event_time] > target.appended_ms + SETTINGS.ahead_ms_max
    for name, kind in target.fields.items():
        if kind.type == "category":
            wrong[name] = (batch[name] < 0) | (batch[name] >= len(kind.values))
        elif kind.type == "string":
            displayable = [_is_displayable(octets.decode()) for octets in batch[name].tolist()]
            wrong[name] = ~np.array(displayable, np.bool_)
    for name, mask in wrong.items():
        if mask.any():
            raise BrokenPromiseError(
                f"accepted, but {name} is outside its limits", int(offsets[np.flatnonzero(mask)[0]])
            )


def _is_displayable(text: str) -> bool:
    return text.isprintable() or not {"Cc", "Cf", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text))


def _compare(target: Target, values: list[Message], table: Table) -> int:
    """Compare some rows with a reference parser; returns their number."""
    rows = range(0, len(table), COMPARED_EVERY)
    for row in rows:
        index = int(table.rows["offset"][row])
        try:
            found = PARSERS[target.name](values[index] or b"", target.fields)
        except (ValueError, KeyError, IndexError, struct.error) as error:
            raise BrokenPromiseError(f"accepted, but the reference parser refuses it: {error!r}", index) from error
        for name, kind in target.fields.items():
            value = table.batch[name][row]
            if kind.type == "string":
                value = value.decode()
            elif kind.type == "category":
                value = kind.values[value]
            if value != found[name]:
                raise BrokenPromiseError(f"the reference parser reads another {name}", index)
    return len(rows)


def find_violation(target: Target, values: list[Message], seed: int, number: int, tally: Tally) -> Violation | None:
    """Try a batch; returns the broken promise with the message that broke it, or None."""
    try:
        try_batch(target, values, tally)
    except BrokenPromiseError as broken:
        index = broken.index
        if index is None:
            index = int(np.argmax([seconds_of(partial(read, target, [value]), time.thread_time) for value in values]))
        return _violation(seed, number, broken.what, values[index])
    except Exception as error:
        what = f"raised {type(error).__name__}: {error}"
        for value in values:
            try:
                try_batch(target, [value], Tally())
            except Exception:
                return _violation(seed, number, what, value)
        return Violation(seed, number, what, None)
    return None


def _violation(seed: int, number: int, what: str, message: Message) -> Violation:
    return Violation(seed, number, what, (message or b"")[:HEX_BYTES_MAX].hex())


# --- processes ------------------------------------------------------------------------------------------------------


def run(messages: int, seed: int, processes: int, progress: Callable[[float], None]) -> FuzzReport:
    """Try at least `messages` messages, or fewer if there is a violation. `progress` is called with the done share."""
    started_s = time.monotonic()
    batches = batches_for(messages)
    if batches <= BATCHES_IN_PROCESS:
        processes = 1
        tally, violation = _try_batches(seed, range(batches), lambda number: progress(number / batches))
        tallies, violations = [tally], [violation] if violation is not None else []
    else:
        tallies, violations = _run_processes(seed, batches, processes, progress)
    seconds = time.monotonic() - started_s
    count = sum(tally.messages for tally in tallies)
    return FuzzReport(
        seed=seed,
        processes=processes,
        messages=count,
        accepted=sum(tally.accepted for tally in tallies),
        rejected=dict(sum((tally.rejected for tally in tallies), Counter[str]()).most_common()),
        compared=sum(tally.compared for tally in tallies),
        seconds=seconds,
        messages_per_second=count / seconds,
        slowest_batch_ms=max(tally.slowest_batch_ms for tally in tallies),
        rss_growth_mb=max(tally.rss_growth_mb for tally in tallies),
        limits={"batch_ms": BATCH_CPU_MS_MAX, "rss_growth_mb": RSS_GROWTH_MB_MAX, "stall_s": STALL_S_MAX},
        violations=violations,
        machine=describe_machine(),
    )


def _run_processes(
    seed: int, batches: int, processes: int, progress: Callable[[float], None]
) -> tuple[list[Tally], list[Violation]]:
    context: Any = multiprocessing.get_context(START_METHOD)
    queue = context.Queue()
    children = []
    for first in range(processes):
        position = context.Value("q", -1)
        arguments = (seed, first, range(first, batches, processes), position, queue)
        children.append(_Child(context.Process(target=_work, args=arguments, daemon=True), position))
    for child in children:
        child.process.start()
    try:
        violations = _watch(children, queue, seed, lambda batch: progress(max(0.0, batch / batches)))
    finally:
        for child in children:
            child.process.kill()
            child.process.join()
    return [child.tally for child in children], violations


@dataclass
class _Child:
    """A process. `position`: shared value, the number of its batch. `batch`: its last seen value, since `moved_s`."""

    process: BaseProcess
    position: Any
    tally: Tally = field(default_factory=Tally)
    done: bool = False
    batch: int = -1
    moved_s: float = field(default_factory=time.monotonic)


def batches_for(messages: int) -> int:
    """The number of batches that contain at least `messages` messages."""
    batches = 0
    while messages > 0:
        messages -= rows_of(batches)
        batches += 1
    return batches


def rows_of(number: int) -> int:
    """The number of messages of batch `number`."""
    return BATCH_ROWS if number % COSTLY_BATCH_EVERY else COSTLY_BATCH_ROWS


def target_of(targets: list[Target], number: int) -> Target:
    """The target of batch `number`: the targets take turns, also in the costly batches."""
    turn = number if number % COSTLY_BATCH_EVERY else number // COSTLY_BATCH_EVERY
    return targets[turn % len(targets)]


def _work(seed: int, first: int, numbers: range, position: Any, queue: Any) -> None:
    """The work of process `first`. `position`: shared value, the number of the batch."""

    def on_batch(number: int) -> None:
        position.value = number

    queue.put((first, *_try_batches(seed, numbers, on_batch)))


def _try_batches(seed: int, numbers: range, on_batch: Callable[[int], None]) -> tuple[Tally, Violation | None]:
    """Try the batches with these numbers, until one breaks a promise; calls `on_batch` before each."""
    targets, tally, own = make_targets(), Tally(), psutil.Process()
    warm_mb, violation = math.inf, None
    for turn, number in enumerate(numbers):
        on_batch(number)
        target = target_of(targets, number)
        violation = find_violation(target, make_batch(target, seed, number), seed, number, tally)
        rss_mb = own.memory_info().rss / 1e6
        if turn <= WARM_BATCHES:
            warm_mb = rss_mb
        tally.rss_growth_mb = max(tally.rss_growth_mb, rss_mb - warm_mb)
        if violation is None and tally.rss_growth_mb > RSS_GROWTH_MB_MAX:
            what = f"memory grew by {tally.rss_growth_mb:.0f} MB, the limit is {RSS_GROWTH_MB_MAX:.0f}"
            violation = Violation(seed, number, what, None)
        if violation is not None:
            break
    return tally, violation


def _watch(children: list[_Child], queue: Any, seed: int, on_batch: Callable[[int], None]) -> list[Violation]:
    """Wait until all processes are done, or until one reports a violation, dies, or stalls.

    on_batch: called with the number of the batch that every process has reached.
    """
    while not all(child.done for child in children):
        dead = [child for child in children if not child.done and not child.process.is_alive()]
        try:
            while True:
                first, tally, violation = queue.get(timeout=0.2)
                children[first].tally, children[first].done = tally, True
                if violation is not None:
                    return [violation]
        except Empty:
            pass
        for child in children:
            if child.batch != child.position.value:
                child.batch, child.moved_s = child.position.value, time.monotonic()
            if child.done:
                continue
            if child in dead:
                return [_fatal(seed, child.batch, f"the process ended with {child.process.exitcode}")]
            if time.monotonic() - child.moved_s > STALL_S_MAX:
                return [_fatal(seed, child.batch, f"a batch did not end within {STALL_S_MAX:.0f} s")]
        on_batch(min(child.batch for child in children))
    return []


def _fatal(seed: int, number: int, what: str) -> Violation:
    """Find the message that ends or stalls a process, in another process."""
    if number < 0:
        return Violation(seed, number, what, None)
    context: Any = multiprocessing.get_context(START_METHOD)
    position = context.Value("q", -1)
    process = context.Process(target=_read_each, args=(seed, number, position), daemon=True)
    process.start()
    process.join(SEARCH_S_MAX)
    process.kill()
    process.join()
    if process.exitcode == 0 or position.value < 0:
        return Violation(seed, number, f"{what}; no single message reproduces it", None)
    target = target_of(make_targets(), number)
    return _violation(seed, number, what, make_batch(target, seed, number)[position.value])


def _read_each(seed: int, number: int, position: Any) -> None:
    """Read the messages of a batch one at a time; `position`: shared value, the index of the message."""
    target = target_of(make_targets(), number)
    for index, value in enumerate(make_batch(target, seed, number)):
        position.value = index
        read(target, [value])


# --- the command ----------------------------------------------------------------------------------------------------


@app.command()
def fuzz(
    messages: Annotated[int, typer.Option(min=1, help="Least number of messages.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Number of parallel processes.")] = 2,
    batch: Annotated[int | None, typer.Option(min=0, help="Try only this batch, to reproduce a violation.")] = None,
) -> None:
    """Pass mutated messages through decoding and dead letters, and check the promises about each message.

    The run ends with exit status 1 at the first message that breaks a promise.
    """
    if batch is not None:
        target = target_of(make_targets(), batch)
        violation = find_violation(target, make_batch(target, seed, batch), seed, batch, Tally())
        Console().print(f"batch {batch} of seed {seed}: " + ("no violation" if violation is None else violation.what))
        raise typer.Exit(violation is not None)
    with Steps() as progress:
        report = run(messages, seed, processes, lambda share: progress("fuzz", share))
    publish(report, _show, json)
    if report.violations:
        raise typer.Exit(1)


def _show(report: FuzzReport, console: Console) -> None:
    table = figure_table("outcome", "messages", "share %")
    for name, count in {"accepted": report.accepted, **report.rejected}.items():
        table.add_row(name, f"{count:,}", f"{100 * count / max(report.messages, 1):.2f}")
    print_table(
        console,
        table,
        f"messages: {report.messages:,} in {report.seconds:.1f} s ({report.messages_per_second:,.0f}/s);"
        f" processes: {report.processes}",
        f"slowest batch: {report.slowest_batch_ms:.0f} ms of CPU (limit {BATCH_CPU_MS_MAX:,.0f} ms)",
        f"memory growth: {report.rss_growth_mb:.1f} MB (limit {RSS_GROWTH_MB_MAX:.0f} MB)",
        f"rows compared with a reference parser: {report.compared:,}",
        f"violations: {len(report.violations)}",
        f"{report.machine.processor}, {report.machine.cores} cores; seed {report.seed}",
    )
    for violation in report.violations:
        console.print(
            f"VIOLATION: {violation.what}\n  message {violation.message_hex}\n"
            f"  cascade fuzz --seed {violation.seed} --batch {violation.batch}",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
