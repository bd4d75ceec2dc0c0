"""`cascade fuzz`: hostile messages by the million through the real way in, from octets to rows and dead letters.

Batches are numbered and each has a chance of its own from the seed and its number, so a finding is made again from
these two, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json as json_module
import math
import multiprocessing
import re
import struct
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
from rich import box
from rich.console import Console
from rich.table import Table

from bench.hostile import Maker, Message, dearest, lone_codec
from cascade.columns import ColumnBatch, Int64
from cascade.config import CodecName, WorkerSettings
from cascade.frames import frame_to_batch
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from cascade.schema import Field, Schema, load_schema, out_of_limits
from cascade.simulator import SimulatorSettings, simulate
from streaming.clients import FetchedBatch
from streaming.codecs import Codec, Reject, RejectReason
from streaming.codecs.faults import DETAIL_CHARACTERS_MAX
from streaming.dead_letters import DETAIL_BYTES_MAX, OVERHEAD_BYTES_MAX, DeadLetter, dead_letter
from streaming.intake import Intake, take_in

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SETTINGS = WorkerSettings()
ROWS_A_BATCH = SETTINGS.batch_rows_max
# Every so many batches one is what a partition's fetch brings at most, a megabyte, of the dearest messages there are.
DEAR_BATCH_EVERY = 201
DEAR_ROWS = 16
# CPU time of a micro-batch; not wall time, which tells of the machine's other work. An honest one takes some ms.
BATCH_CPU_MS_MAX = 1_000.0
# A batch that does not come back at all: the process is ended.
STALL_S_MAX = 60.0
# To go through that batch again message by message, a new process's start included.
SEARCH_S_MAX = 120.0
START_METHOD = "spawn"
# Over what a process had after its first batches. What is read is let go batch by batch: this is the allocator's slack.
RSS_GROWTH_MB_MAX = 64.0
WARM_BATCHES = 40
# Every so many rows are held against another parser.
COMPARED_EVERY = 61
# A detail tells of fields and limits, so but for positions and sizes there are few; values would make them many.
WORDINGS_MAX = 300
# Ids of the valid messages have 16 digits: no number this long in a detail is a position or a size.
VALUE_DIGITS = 8
VALID_ROWS = 64
ID_OFFSET = 4_000_123_400_000_000
HEX_BYTES_MAX = 200
TOPIC = "transactions"
_LONG_NUMBER = re.compile(rf"\d{{{VALUE_DIGITS},}}")
# what a detail says of a whole number out of range
_INT64_LIMITS = re.compile(r"9223372036854775807|-9223372036854775808")
_DIGITS = re.compile(r"\d+")
DETAILS_MAX = 100_000


class Violation(msgspec.Struct, frozen=True):
    """A promise broken: `batch` and the seed make it again. `message_hex`: the first 200 octets, where it is one's."""

    seed: int
    batch: int
    what: str
    message_hex: str | None


class FuzzReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run showed; `slowest_batch_ms`: CPU time; `rss_growth_mb`: the most of any process over its warm state."""

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
    """A check failed, for the message at `index` of its batch, or for the batch where that is None."""

    def __init__(self, what: str, index: int | None = None) -> None:
        super().__init__(what)
        self.what, self.index = what, index


@dataclass(frozen=True)
class Target:
    """One way in: the codec that is tried, its schema, and valid rows to begin with. `appended_ms`: of every record."""

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
    """What one process has seen so far."""

    messages: int = 0
    accepted: int = 0
    compared: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    slowest_batch_ms: float = 0.0
    rss_growth_mb: float = 0.0
    # details that were looked at; forgotten where they are too many
    details: set[tuple[str, str]] = field(default_factory=set)
    wordings: set[str] = field(default_factory=set)


# --- one batch ------------------------------------------------------------------------------------------------------


def make_targets() -> list[Target]:
    """Each codec, with the simulator's schema and with one whose card and terminal are texts."""
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
    return [
        Target(
            name,
            one,
            ColumnBatch(columns, rows.rows),
            lone_codec(name, one.fields, SETTINGS.message_bytes_max),
            appended_ms,
        )
        for name in names
        for one, columns in ((schema, numbered), (with_texts, named))
    ]


def make_batch(target: Target, seed: int, number: int) -> list[Message]:
    """The messages of batch `number`."""
    chance = Random(f"{seed}/{number}")  # noqa: S311
    maker = Maker(target.name, target.fields, target.valid, SETTINGS.message_bytes_max, chance)
    if number % DEAR_BATCH_EVERY == 0:
        return [dearest(maker) for _ in range(DEAR_ROWS)]
    return maker.messages(ROWS_A_BATCH)


def read(target: Target, values: list[Message]) -> tuple[Intake, list[DeadLetter]]:
    """What the worker does with a fetch, up to the rows that are scored and the letters that are sent."""
    count = len(values)
    keys: list[Message] = [b"card"] * count
    appended_ms = np.full(count, target.appended_ms)
    fetched = FetchedBatch(TOPIC, 0, np.arange(count), appended_ms, keys, values, [()] * count)
    intake = take_in([fetched], target.codec, target.schema.roles.event_time, {}, SETTINGS.ahead_ms_max)
    letters = [
        dead_letter(
            reject, topic=TOPIC, partition=0, offset=reject.index, time_ms=target.appended_ms, key=b"card",
            value=values[reject.index],
        )
        for rejected in intake.rejected
        for reject in rejected.rejects
    ]  # fmt: skip
    return intake, letters


def try_batch(target: Target, values: list[Message], tally: Tally) -> None:
    """Read the messages and check every promise; raises BrokenPromiseError, and whatever the reading raises."""
    started_s = time.thread_time()
    intake, letters = read(target, values)
    took_ms = (time.thread_time() - started_s) * 1e3
    rejects = [reject for rejected in intake.rejected for reject in rejected.rejects]
    _check_partition(len(values), intake.offsets, rejects)
    _check_letters(values, rejects, letters, tally)
    _check_rows(target, intake.batch, intake.offsets)
    tally.compared += _compare(target, values, intake)
    tally.messages += len(values)
    tally.accepted += intake.batch.rows
    tally.rejected.update([reject.reason.value for reject in rejects])
    tally.slowest_batch_ms = max(tally.slowest_batch_ms, took_ms)
    if took_ms > BATCH_CPU_MS_MAX:
        raise BrokenPromiseError(f"a batch took {took_ms:.0f} ms of CPU, at most {BATCH_CPU_MS_MAX:.0f} are promised")


def _check_partition(count: int, rows: Int64, rejects: list[Reject]) -> None:
    seen = np.zeros(count, np.int64)
    np.add.at(seen, rows, 1)
    np.add.at(seen, np.array([reject.index for reject in rejects], np.int64), 1)
    wrong = np.flatnonzero(seen != 1)
    if len(wrong):
        raise BrokenPromiseError(f"it is {seen[wrong[0]]} times a row or a reject, not once", int(wrong[0]))


def _check_letters(values: list[Message], rejects: list[Reject], letters: list[DeadLetter], tally: Tally) -> None:
    for reject, letter in zip(rejects, letters, strict=True):
        if letter.value is not values[reject.index]:
            raise BrokenPromiseError("the dead letter holds other octets", reject.index)
        headers = dict(letter.headers)
        sizes = [len(octets or b"") for octets in headers.values()]
        if max(sizes) > DETAIL_BYTES_MAX or sum(sizes) + sum(map(len, headers)) > OVERHEAD_BYTES_MAX:
            raise BrokenPromiseError(f"the headers of its dead letter are too large: {sizes}", reject.index)
        if headers["cascade-reason"] != reject.reason.value.encode() or not headers["cascade-detail"]:
            raise BrokenPromiseError("the headers of its dead letter do not say why", reject.index)
        if (reject.reason, reject.detail) not in tally.details:
            _check_detail(reject, tally)


def _check_detail(reject: Reject, tally: Tally) -> None:
    detail = reject.detail
    if reject.reason not in RejectReason:
        raise BrokenPromiseError(f"its reason {reject.reason} is none of those known", reject.index)
    if not detail or not detail.isprintable() or len(detail) > DETAIL_CHARACTERS_MAX:
        raise BrokenPromiseError(f"its detail is empty, not printable or too long: {detail!r}", reject.index)
    if len(tally.details) == DETAILS_MAX:
        tally.details.clear()
    tally.details.add((reject.reason, detail))
    tally.wordings.add(_DIGITS.sub("#", detail))
    if _LONG_NUMBER.search(_INT64_LIMITS.sub("", detail)) or len(tally.wordings) > WORDINGS_MAX:
        raise BrokenPromiseError(f"its detail seems to hold a value: {detail!r}", reject.index)


def _check_rows(target: Target, batch: ColumnBatch, offsets: Int64) -> None:
    wrong = out_of_limits(target.fields, batch)
    event_time = target.schema.roles.event_time
    wrong["the lead of its event"] = batch[event_time] > target.appended_ms + SETTINGS.ahead_ms_max
    for name, one in target.fields.items():
        if one.type == "category":
            wrong[name] = (batch[name] < 0) | (batch[name] >= len(one.values))
        elif one.type == "string":
            shown = [_can_be_shown(octets.decode()) for octets in batch[name].tolist()]
            wrong[name] = ~np.array(shown, np.bool_)
    for name, mask in wrong.items():
        if mask.any():
            raise BrokenPromiseError(
                f"accepted, but {name} is outside its limits", int(offsets[np.flatnonzero(mask)[0]])
            )


def _can_be_shown(text: str) -> bool:
    return text.isprintable() or not {"Cc", "Cf", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text))


def _compare(target: Target, values: list[Message], intake: Intake) -> int:
    """Hold some rows against another reading of their messages; returns how many."""
    rows = range(0, intake.batch.rows, COMPARED_EVERY)
    for row in rows:
        index = int(intake.offsets[row])
        try:
            found = PARSERS[target.name](values[index] or b"", target.fields)
        except (ValueError, KeyError, IndexError, struct.error) as error:
            raise BrokenPromiseError(f"accepted, but another parser refuses it: {error!r}", index) from error
        for name, one in target.fields.items():
            got = intake.batch[name][row]
            got = got.decode() if one.type == "string" else one.values[got] if one.type == "category" else got
            if got != found[name]:
                raise BrokenPromiseError(f"another parser reads another {name}", index)
    return len(rows)


def _parse_json(message: bytes, fields: Iterable[str]) -> dict[str, Any]:
    """The fields as Python's own parser reads them; raises ValueError where its own object has a key twice."""

    def whole(digits: str) -> float:
        return int(digits) if len(digits) < 30 else math.inf

    pairs = json_module.loads(message.decode(), object_pairs_hook=tuple, parse_int=whole)
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    found = dict(pairs)
    return {name: found[name] for name in fields}


def _parse_msgpack(message: bytes, fields: Iterable[str]) -> dict[str, Any]:
    """As msgspec reads the fields without their types."""
    entries = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode(message)
    return {name: msgspec.msgpack.decode(entries[name]) for name in fields}


def _parse_binary(message: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """As docs/messages.md says, octet by octet; raises ValueError for another head or length."""
    layout: list[list[Any]] = []
    for name, one in fields.items():
        of_type: dict[str, list[Any]] = {
            "string": [one.max_length], "category": [one.values], "timestamp": [one.unit],
        }  # fmt: skip
        more = of_type.get(one.type, [])
        layout.append([name, one.type, *more])
    text = json_module.dumps(layout, separators=(",", ":"))
    if message[:8] != b"\xca\x01" + hashlib.sha256(text.encode()).digest()[:6]:
        raise ValueError("another head")
    place, found = 8, {}
    for name, one in fields.items():
        size = one.max_length if one.type == "string" else 1 if one.type == "category" else 8
        octets = message[place : place + size]
        place += size
        found[name] = (
            octets.rstrip(b"\0").decode() if one.type == "string"
            else one.values[octets[0]] if one.type == "category"
            else struct.unpack("<d" if one.type == "float64" else "<q", octets)[0]
        )  # fmt: skip
    if place != len(message):
        raise ValueError("another length")
    return found


def _parse_avro(message: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """As the specification says, octet by octet; raises ValueError or IndexError for what it does not allow."""
    if message[:5] != b"\0\0\0\0\1":
        raise ValueError("another head")
    place = 5
    found: dict[str, Any] = {}

    def number() -> int:
        nonlocal place
        shown, shift = 0, 0
        while True:
            octet = message[place]
            shown, shift, place = shown | (octet & 0x7F) << shift, shift + 7, place + 1
            if octet < 0x80:
                break
        if shown >= 2**64:
            raise ValueError("more than 64 bits")
        return -(shown // 2) - 1 if shown & 1 else shown // 2

    for name, one in fields.items():
        if one.type in ("int64", "timestamp"):
            found[name] = number()
            continue
        size = 8 if one.type == "float64" else number()
        octets = message[place : place + size]
        place += size
        found[name] = struct.unpack("<d", octets)[0] if one.type == "float64" else octets.decode()
    if place != len(message):
        raise ValueError("another length")
    return found


PARSERS: dict[CodecName, Callable[[bytes, Mapping[str, Field]], dict[str, Any]]] = {
    "json": _parse_json, "msgpack": _parse_msgpack, "binary": _parse_binary, "avro": _parse_avro,
}  # fmt: skip


def find_violation(target: Target, values: list[Message], seed: int, number: int, tally: Tally) -> Violation | None:
    """Try a batch; what broke, and by which message."""
    try:
        try_batch(target, values, tally)
    except BrokenPromiseError as broken:
        index = broken.index if broken.index is not None else _dearest_of(target, values)
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


def _dearest_of(target: Target, values: list[Message]) -> int:
    took_s = []
    for value in values:
        started_s = time.thread_time()
        read(target, [value])
        took_s.append(time.thread_time() - started_s)
    return int(np.argmax(took_s))


def _violation(seed: int, number: int, what: str, message: Message) -> Violation:
    return Violation(seed, number, what, (message or b"")[:HEX_BYTES_MAX].hex())


# --- processes ------------------------------------------------------------------------------------------------------


def run(messages: int, seed: int, processes: int, progress: Callable[[float], None]) -> FuzzReport:
    """Try at least so many messages; ends at the first violation."""
    started_s = time.monotonic()
    batches = batches_for(messages)
    context: Any = multiprocessing.get_context(START_METHOD)
    queue = context.Queue()
    at = [context.Value("q", -1) for _ in range(processes)]
    crew = [
        _Crewman(context.Process(target=_work, args=(seed, first, batches, processes, at[first], queue), daemon=True))
        for first in range(processes)
    ]
    for one in crew:
        one.process.start()
    try:
        violations = _watch(crew, at, queue, seed, lambda batch: progress(max(0.0, batch / batches)))
    finally:
        for one in crew:
            one.process.kill()
            one.process.join()
    tallies = [one.tally for one in crew]
    seconds = time.monotonic() - started_s
    count = sum(one.messages for one in tallies)
    return FuzzReport(
        seed=seed, processes=processes, messages=count, accepted=sum(one.accepted for one in tallies),
        rejected=dict(sum((one.rejected for one in tallies), Counter[str]()).most_common()),
        compared=sum(one.compared for one in tallies), seconds=seconds, messages_per_second=count / seconds,
        slowest_batch_ms=max(one.slowest_batch_ms for one in tallies),
        rss_growth_mb=max(one.rss_growth_mb for one in tallies),
        limits={"batch_ms": BATCH_CPU_MS_MAX, "rss_growth_mb": RSS_GROWTH_MB_MAX, "stall_s": STALL_S_MAX},
        violations=violations, machine=describe_machine(),
    )  # fmt: skip


@dataclass
class _Crewman:
    process: BaseProcess
    tally: Tally = field(default_factory=Tally)
    done: bool = False
    batch: int = -1
    moved_s: float = field(default_factory=time.monotonic)


def batches_for(messages: int) -> int:
    """How many batches hold at least so many messages."""
    batches = 0
    while messages > 0:
        messages -= rows_of(batches)
        batches += 1
    return batches


def rows_of(number: int) -> int:
    """The messages of batch `number`."""
    return ROWS_A_BATCH if number % DEAR_BATCH_EVERY else DEAR_ROWS


def target_of(targets: list[Target], number: int) -> Target:
    """The way in that batch `number` tries: all have their turn, with batches of either kind."""
    turn = number if number % DEAR_BATCH_EVERY else number // DEAR_BATCH_EVERY
    return targets[turn % len(targets)]


def _work(seed: int, first: int, batches: int, step: int, at: Any, queue: Any) -> None:
    """One process: every `step`th batch from `first` on, until one breaks a promise."""
    targets, tally, own = make_targets(), Tally(), psutil.Process()
    warm_mb, violation = math.inf, None
    for turn, number in enumerate(range(first, batches, step)):
        at.value = number
        target = target_of(targets, number)
        violation = find_violation(target, make_batch(target, seed, number), seed, number, tally)
        rss_mb = own.memory_info().rss / 1e6
        if turn <= WARM_BATCHES:
            warm_mb = rss_mb
        tally.rss_growth_mb = max(tally.rss_growth_mb, rss_mb - warm_mb)
        if violation is None and tally.rss_growth_mb > RSS_GROWTH_MB_MAX:
            what = f"memory grew by {tally.rss_growth_mb:.0f} MB, at most {RSS_GROWTH_MB_MAX:.0f} are promised"
            violation = Violation(seed, number, what, None)
        if violation is not None:
            break
    queue.put((first, tally, violation))


def _watch(crew: list[_Crewman], at: list[Any], queue: Any, seed: int, tell: Callable[[int], None]) -> list[Violation]:
    """Wait until all are done or one has found something, died, or stands still."""
    while not all(one.done for one in crew):
        dead = [one for one in crew if not one.done and not one.process.is_alive()]
        try:
            while True:
                first, tally, violation = queue.get(timeout=0.2)
                crew[first].tally, crew[first].done = tally, True
                if violation is not None:
                    return [violation]
        except Empty:
            pass
        for one, batch in zip(crew, at, strict=True):
            if one.batch != batch.value:
                one.batch, one.moved_s = batch.value, time.monotonic()
            if one.done:
                continue
            if one in dead:
                return [_fatal(seed, one.batch, f"the process ended with {one.process.exitcode}")]
            if time.monotonic() - one.moved_s > STALL_S_MAX:
                return [_fatal(seed, one.batch, f"no end of a batch in {STALL_S_MAX:.0f} s")]
        tell(min(one.batch for one in crew))
    return []


def _fatal(seed: int, number: int, what: str) -> Violation:
    """Find the message that ends or holds up a process, in another one."""
    if number < 0:
        return Violation(seed, number, what, None)
    context: Any = multiprocessing.get_context(START_METHOD)
    at = context.Value("q", -1)
    process = context.Process(target=_one_by_one, args=(seed, number, at), daemon=True)
    process.start()
    process.join(SEARCH_S_MAX)
    process.kill()
    process.join()
    if process.exitcode == 0 or at.value < 0:
        return Violation(seed, number, f"{what}; not again, message by message", None)
    target = target_of(make_targets(), number)
    return _violation(seed, number, what, make_batch(target, seed, number)[at.value])


def _one_by_one(seed: int, number: int, at: Any) -> None:
    target = target_of(make_targets(), number)
    for index, value in enumerate(make_batch(target, seed, number)):
        at.value = index
        read(target, [value])


# --- the command ----------------------------------------------------------------------------------------------------


@app.command()
def fuzz(
    messages: Annotated[int, typer.Option(min=1, help="How many at least.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures here too.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes side by side.")] = 2,
    batch: Annotated[int | None, typer.Option(min=0, help="Try this batch alone, as a violation names it.")] = None,
) -> None:
    """Push mutated messages through decoding and dead letters, and check what is promised of each.

    Ends with status 1 at the first message that breaks a promise.
    """
    console = Console()
    if batch is not None:
        target = target_of(make_targets(), batch)
        violation = find_violation(target, make_batch(target, seed, batch), seed, batch, Tally())
        console.print(f"batch {batch} of seed {seed}: " + ("no violation" if violation is None else violation.what))
        raise typer.Exit(violation is not None)
    with Steps() as progress:
        report = run(messages, seed, processes, lambda share: progress("fuzz", share))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _show(report, console)
    if report.violations:
        raise typer.Exit(1)


def _show(report: FuzzReport, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("outcome", "messages", "share %"):
        table.add_column(column, justify="left" if column == "outcome" else "right")
    for name, count in {"accepted": report.accepted, **report.rejected}.items():
        table.add_row(name, f"{count:,}", f"{100 * count / max(report.messages, 1):.2f}")
    console.print(table)
    console.print(
        f"{report.messages:,} messages in {report.seconds:.1f} s, {report.messages_per_second:,.0f} a second in"
        f" {report.processes} processes; slowest batch {report.slowest_batch_ms:.0f} ms of CPU (at most"
        f" {BATCH_CPU_MS_MAX:,.0f}); memory grew by {report.rss_growth_mb:.1f} MB at most (of {RSS_GROWTH_MB_MAX:.0f});"
        f" {report.compared:,} rows as another parser reads them; seed {report.seed};"
        f" violations: {len(report.violations)}",
        highlight=False,
    )
    console.print(f"{report.machine.processor}, {report.machine.cores} cores", style="dim", highlight=False)
    for one in report.violations:
        console.print(
            f"VIOLATION: {one.what}\n  message {one.message_hex}", style="bold red", highlight=False, soft_wrap=True
        )
        console.print(f"  again: cascade fuzz --seed {one.seed} --batch {one.batch}", highlight=False)
