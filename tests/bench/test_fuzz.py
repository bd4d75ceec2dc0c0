"""Short and long fuzz runs, and a test of each check: an injected fault must be found."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

import bench.fuzz
from bench.fuzz import (
    COSTLY_BATCH_EVERY,
    FuzzReport,
    Tally,
    Target,
    Violation,
    batches_for,
    find_violation,
    make_batch,
    make_targets,
    rows_of,
    target_of,
)
from bench.hostile import CORPUS, KINDS, Maker, Message
from cascade.cli import main
from cascade.columns import ColumnBatch
from streaming.codecs import Decoded, Reject, RejectReason
from tests.timing import SetClock


@pytest.fixture
def cpu_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Replaces the CPU clock, so that no check depends on the machine."""
    clock = SetClock()
    monkeypatch.setattr(time, "thread_time", clock.time)
    return clock


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return make_targets()


def fuzz(path: Path, messages: int) -> FuzzReport:
    assert main(["fuzz", "--messages", str(messages), "--seed", "1", "--json", str(path)]) == 0
    report = msgspec.json.decode(path.read_bytes(), type=FuzzReport)
    assert report.violations == []
    assert report.messages >= messages
    assert report.accepted + sum(report.rejected.values()) == report.messages
    assert set(report.rejected) == {reason.value for reason in RejectReason}, "no message broke some rule"
    assert report.accepted > 0.1 * report.messages
    assert report.compared > report.messages / 400
    return report


@pytest.mark.usefixtures("cpu_clock")
def test_twenty_thousand_hostile_messages_break_no_promise(tmp_path: Path) -> None:
    assert fuzz(tmp_path / "fuzz.json", 20_000).processes == 1


@pytest.mark.long
def test_a_million_hostile_messages_break_no_promise(tmp_path: Path) -> None:
    assert fuzz(tmp_path / "fuzz.json", 1_000_000).processes == 2


def test_a_batch_is_the_same_whenever_it_is_made(targets: list[Target]) -> None:
    for number in (0, 1, 2):
        target = target_of(targets, number)
        assert make_batch(target, 1, number) == make_batch(target, 1, number)
        assert make_batch(target, 1, number) != make_batch(target, 2, number)


def test_the_batches_contain_at_least_the_requested_messages(targets: list[Target]) -> None:
    for count in (1, 17, 200_000, 1_000_000):
        batches = batches_for(count)
        assert sum(map(rows_of, range(batches - 1))) < count <= sum(map(rows_of, range(batches)))
    assert [len(make_batch(target_of(targets, number), 1, number)) for number in (0, 1)] == [rows_of(0), rows_of(1)]


def test_each_codec_and_schema_gets_costly_batches(targets: list[Target]) -> None:
    costly = [target_of(targets, number) for number in range(0, 8 * COSTLY_BATCH_EVERY, COSTLY_BATCH_EVERY)]
    assert set(map(id, costly)) == set(map(id, targets))


@pytest.mark.usefixtures("cpu_clock")
@pytest.mark.parametrize("target_index", range(8))
def test_no_kind_of_mutation_and_no_message_of_the_corpus_breaks_a_promise(
    targets: list[Target], target_index: int
) -> None:
    target, seen = targets[target_index], Tally()
    maker = Maker(target.name, target.fields, target.valid, bench.fuzz.SETTINGS.message_bytes_max, Random(7))
    for kind in KINDS:
        values = [kind(maker) for _ in range(20)]
        assert find_violation(target, values, 1, 1, seen) is None, kind
    assert find_violation(target, list(CORPUS[target.name]), 1, 1, seen) is None
    assert find_violation(target, list(maker.valid), 1, 1, seen) is None


# --- the checks: each fault is injected into a codec, and must be found -----------------------------------------------

Alteration = Callable[[Decoded, Sequence[Message]], Decoded]


class FaultyCodec:
    """A codec whose decoded rows and rejects are altered."""

    def __init__(self, target: Target, alter: Alteration) -> None:
        self.name = target.codec.name
        self._codec = target.codec
        self._alter = alter

    def decode(self, values: Sequence[Message]) -> Decoded:
        return self._alter(self._codec.decode(values), values)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        return self._codec.encode(batch)


# The message for which some faults occur.
MARK = b"\x00the culprit"


def values_of(target: Target) -> list[Message]:
    return [*target.codec.encode(target.valid), MARK, *make_batch(target, 1, 1)]


def column(name: str, value: object) -> Alteration:
    """Sets a whole column to a value."""

    def alter(decoded: Decoded, values: Sequence[Message]) -> Decoded:
        altered = decoded.batch[name].copy()
        altered[:] = value
        return replace(decoded, batch=replace(decoded.batch, columns={**decoded.batch.columns, name: altered}))

    return alter


def on_rejects(change: Callable[[Reject, Message], Reject | None]) -> Alteration:
    """Changes each reject, which it gets with its message; None removes it."""

    def alter(decoded: Decoded, values: Sequence[Message]) -> Decoded:
        changed = [change(each, values[each.index]) for each in decoded.rejects]
        return replace(decoded, rejects=[each for each in changed if each is not None])

    return alter


def detail(text: str) -> Alteration:
    """Sets the detail of the marked message's reject."""
    return on_rejects(lambda reject, value: replace(reject, detail=text) if value == MARK else reject)


def raising(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    if MARK in values:
        raise OverflowError("too large")
    return decoded


def doubling(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    return replace(decoded, rejects=[Reject(0, RejectReason.TYPE, "and yet a row"), *decoded.rejects])


def wordy(reject: Reject, value: Message) -> Reject:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return replace(reject, detail=f"{reject.detail} {letters[reject.index % 26]}{letters[reject.index // 26 % 26]}")


# By name: the alteration, a part of the violation's text, and whether the violation names the marked message.
FAULTS: dict[str, tuple[Alteration, str, bool]] = {
    "raises an error": (raising, "raised OverflowError", True),
    "loses a message": (
        on_rejects(lambda reject, value: None if value == MARK else reject),
        "a row or a reject 0 times",
        True,
    ),
    "doubles a message": (doubling, "a row or a reject 2 times", False),
    "detail with a value": (detail("card_id: 4000123400000017 is not allowed"), "contain a value", True),
    "empty detail": (detail(""), "lack the reason or the detail", True),
    "long detail": (detail("x" * 201), "too long", True),
    "detail with a control character": (detail("a\x1b[2J"), "not printable", True),
    "another detail for each message": (on_rejects(wordy), "contain a value", False),
    "negative amount": (column("amount", -1.0), "amount is outside", False),
    "infinite amount": (column("amount", np.inf), "amount is outside", False),
    "unknown category": (column("entry_mode", 3), "entry_mode is outside", False),
    "another amount": (column("amount", 1.0), "reads another amount", False),
    "another card": (column("card_id", 5), "reads another card_id", False),
}


def violation_of(target: Target, alter: Alteration) -> Violation:
    """The violation that is found if the target's codec has this fault."""
    faulty = replace(target, codec=FaultyCodec(target, alter))
    violation = find_violation(faulty, values_of(target), 3, 1, Tally())
    assert violation is not None
    return violation


@pytest.mark.usefixtures("cpu_clock")
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("target_index", [0, 2, 4, 6])
def test_a_codec_that_breaks_a_promise_is_found(targets: list[Target], target_index: int, name: str) -> None:
    alter, what, by_the_mark = FAULTS[name]
    target = targets[target_index]
    assert find_violation(target, values_of(target), 3, 1, Tally()) is None, "the codec itself breaks no promise"
    violation = violation_of(target, alter)
    assert what in violation.what
    assert (violation.seed, violation.batch) == (3, 1)
    assert not by_the_mark or violation.message_hex == MARK.hex()


def test_a_slow_message_is_found(targets: list[Target], cpu_clock: SetClock) -> None:
    def slow(decoded: Decoded, values: Sequence[Message]) -> Decoded:
        cpu_clock.now_s += 1.1 if MARK in values else 0.0
        return decoded

    violation = violation_of(targets[0], slow)
    assert "the batch took 1100 ms of CPU" in violation.what
    assert violation.message_hex == MARK.hex()


@pytest.mark.usefixtures("cpu_clock")
def test_a_text_with_a_direction_mark_is_found(targets: list[Target]) -> None:
    assert "card_id is outside" in violation_of(targets[1], column("card_id", "K\u202e1".encode())).what


# --- processes that end or stall --------------------------------------------------------------------------------------


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, targets: list[Target]) -> None:
    """Forks processes, which so have the test's faults. They need no threads, which a fork does not copy."""
    monkeypatch.setattr(bench.fuzz, "START_METHOD", "fork")
    monkeypatch.setattr(bench.fuzz, "make_targets", lambda: targets)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("number", "stall_s_max", "what"),
    [(signal.SIGKILL, 600.0, "the process ended with -9"), (signal.SIGSTOP, 0.1, "a batch did not end")],
)
def test_a_process_that_dies_or_stalls_is_reported_with_its_batch(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, stall_s_max: float, what: str
) -> None:
    monkeypatch.setattr(bench.fuzz, "STALL_S_MAX", stall_s_max)
    context = multiprocessing.get_context("fork")
    position, queue = context.Value("q", 5), context.Queue()
    process = context.Process(target=lambda: os.kill(os.getpid(), number), daemon=True)
    process.start()
    try:
        violations = bench.fuzz._watch([bench.fuzz._Child(process, position)], queue, 1, lambda batch: None)
    finally:
        process.kill()
        process.join()
    assert [violation.batch for violation in violations] == [5]
    assert what in violations[0].what
    assert "no single message reproduces it" in violations[0].what


@pytest.mark.usefixtures("forked")
def test_the_message_that_ends_a_process_is_found(monkeypatch: pytest.MonkeyPatch, targets: list[Target]) -> None:
    values = make_batch(target_of(targets, 5), 1, 5)
    culprit = next(value for value in values[300:] if value and len(value) > 40 and values.count(value) == 1)
    read = bench.fuzz.read

    def deadly(target: Target, some: list[Message]) -> object:
        if culprit in some:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(target, some)

    monkeypatch.setattr(bench.fuzz, "read", deadly)
    monkeypatch.setattr(bench.fuzz, "BATCHES_IN_PROCESS", 0)
    report = bench.fuzz.run(8 * 1024, 1, 1, lambda share: None)
    assert [(violation.batch, violation.message_hex) for violation in report.violations] == [(5, culprit[:200].hex())]
    assert "the process ended with -9" in report.violations[0].what
