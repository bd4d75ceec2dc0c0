"""The bounded fuzz run, and proof that each of its checks finds what it is for."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

import msgspec
import numpy as np
import pytest

import bench.fuzz
from bench.fuzz import (
    DEAR_BATCH_EVERY,
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


@pytest.fixture(scope="module", autouse=True)
def a_small_heap() -> Iterator[None]:
    """As in a process of its own: a collection that walks what the other tests left takes a second of CPU."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return make_targets()


@pytest.mark.slow
def test_two_hundred_thousand_hostile_messages_break_no_promise(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.json"
    assert main(["fuzz", "--messages", "200_000", "--seed", "1", "--json", str(path)]) == 0
    report = msgspec.json.decode(path.read_bytes(), type=FuzzReport)
    assert report.violations == []
    assert report.messages >= 200_000
    assert report.accepted + sum(report.rejected.values()) == report.messages
    assert set(report.rejected) == {reason.value for reason in RejectReason}, "some rule was never met"
    assert report.accepted > 0.1 * report.messages
    assert report.compared > 500


def test_a_batch_is_the_same_whenever_it_is_made(targets: list[Target]) -> None:
    for number in (0, 1, 2):
        target = target_of(targets, number)
        assert make_batch(target, 1, number) == make_batch(target, 1, number)
        assert make_batch(target, 1, number) != make_batch(target, 2, number)


def test_batches_hold_at_least_what_was_asked_for(targets: list[Target]) -> None:
    for count in (1, 17, 200_000, 1_000_000):
        batches = batches_for(count)
        assert sum(map(rows_of, range(batches - 1))) < count <= sum(map(rows_of, range(batches)))
    assert [len(make_batch(target_of(targets, number), 1, number)) for number in (0, 1)] == [rows_of(0), rows_of(1)]


def test_each_codec_and_schema_has_its_turn_with_dear_batches_too(targets: list[Target]) -> None:
    dear = [target_of(targets, number) for number in range(0, 8 * DEAR_BATCH_EVERY, DEAR_BATCH_EVERY)]
    assert {id(one) for one in dear} == {id(one) for one in targets}


@pytest.mark.parametrize("place", range(8))
def test_every_kind_of_mutation_and_the_whole_corpus_are_within_the_promises(targets: list[Target], place: int) -> None:
    target, seen = targets[place], Tally()
    maker = Maker(target.name, target.fields, target.valid, bench.fuzz.SETTINGS.message_bytes_max, Random(7))
    for kind in KINDS:
        values = [kind(maker) for _ in range(20)]
        assert find_violation(target, values, 1, 1, seen) is None, kind
    assert find_violation(target, list(CORPUS[target.name]), 1, 1, seen) is None
    assert find_violation(target, list(maker.valid), 1, 1, seen) is None


# --- what the checks are for: each fault is injected into a codec, and must be found ----------------------------------


class FaultyCodec:
    """A fault, for tests of the checks: what `spoil` makes of a good codec's reading."""

    def __init__(self, target: Target, spoil: Callable[[Decoded, Sequence[Message]], Decoded]) -> None:
        self.name = target.codec.name
        self._good = target.codec
        self._spoil = spoil

    def decode(self, values: Sequence[Message]) -> Decoded:
        return self._spoil(self._good.decode(values), values)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        return self._good.encode(batch)


MARK = b"\x00the culprit"


def values_of(target: Target) -> list[Message]:
    return [*target.codec.encode(target.valid), MARK, *make_batch(target, 1, 1)]


def spoilt_column(name: str, value: object) -> Callable[[Decoded, Sequence[Message]], Decoded]:
    def spoil(decoded: Decoded, values: Sequence[Message]) -> Decoded:
        column = decoded.batch[name].copy()
        column[:] = value
        return replace(decoded, batch=replace(decoded.batch, columns={**decoded.batch.columns, name: column}))

    return spoil


def told(text: str) -> Callable[[Decoded, Sequence[Message]], Decoded]:
    """A detail of another wording for the marked message."""

    def spoil(decoded: Decoded, values: Sequence[Message]) -> Decoded:
        rejects = [replace(one, detail=text) if values[one.index] == MARK else one for one in decoded.rejects]
        return replace(decoded, rejects=rejects)

    return spoil


def raising(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    if MARK in values:
        raise OverflowError("too large")
    return decoded


def slow(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    until_s = time.thread_time() + (1.1 if MARK in values else 0.0)
    while time.thread_time() < until_s:
        pass
    return decoded


def losing(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    return replace(decoded, rejects=[one for one in decoded.rejects if values[one.index] != MARK])


def doubling(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    return replace(decoded, rejects=[Reject(0, RejectReason.TYPE, "and yet a row"), *decoded.rejects])


def wordy(decoded: Decoded, values: Sequence[Message]) -> Decoded:
    letters = "abcdefghijklmnopqrstuvwxyz"
    details = [f"{one.detail} {letters[one.index % 26]}{letters[one.index // 26 % 26]}" for one in decoded.rejects]
    rejects = [replace(one, detail=detail) for one, detail in zip(decoded.rejects, details, strict=True)]
    return replace(decoded, rejects=rejects)


FAULTS: dict[str, tuple[Callable[[Decoded, Sequence[Message]], Decoded], str, bool]] = {
    "raises": (raising, "raised OverflowError", True),
    "is slow": (slow, "ms of CPU", True),
    "loses a message": (losing, "0 times a row or a reject", True),
    "doubles a message": (doubling, "2 times a row or a reject", False),
    "tells a value": (told("card_id: 4000123400000017 is not allowed"), "hold a value", True),
    "tells nothing": (told(""), "do not say why", True),
    "tells too much": (told("x" * 201), "too long", True),
    "tells what breaks a terminal": (told("a\x1b[2J"), "not printable", True),
    "tells of each message another thing": (wordy, "hold a value", False),
    "takes a negative amount": (spoilt_column("amount", -1.0), "amount is outside", False),
    "takes an endless amount": (spoilt_column("amount", np.inf), "amount is outside", False),
    "takes an unknown category": (spoilt_column("entry_mode", 3), "entry_mode is outside", False),
    "reads another amount": (spoilt_column("amount", 1.0), "reads another amount", False),
    "reads another card": (spoilt_column("card_id", 5), "reads another card_id", False),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("place", [0, 2, 4, 6])
def test_a_codec_that_breaks_a_promise_is_found(targets: list[Target], place: int, name: str) -> None:
    spoil, what, by_the_mark = FAULTS[name]
    target = targets[place]
    values = values_of(target)
    assert find_violation(target, values, 3, 1, Tally()) is None, "the good codec passes"
    violation = find_violation(replace(target, codec=FaultyCodec(target, spoil)), values, 3, 1, Tally())
    assert violation is not None
    assert what in violation.what
    assert (violation.seed, violation.batch) == (3, 1)
    assert not by_the_mark or violation.message_hex == MARK.hex()


def test_a_text_that_deceives_the_eye_is_found(targets: list[Target]) -> None:
    target = targets[1]
    faulty = FaultyCodec(target, spoilt_column("card_id", "K\u202e1".encode()))
    violation = find_violation(replace(target, codec=faulty), values_of(target), 3, 1, Tally())
    assert violation is not None
    assert "card_id is outside" in violation.what


class DeadlyTurn:
    """A fault for tests of the watch: the process that reads a batch ends, or stops."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __call__(self, *_: object) -> None:
        os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(
    ("number", "what"), [(signal.SIGKILL, "the process ended with -9"), (signal.SIGSTOP, "no end of a batch")]
)
def test_a_process_that_dies_or_stands_still_is_told_with_its_batch(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, what: str
) -> None:
    monkeypatch.setattr(bench.fuzz, "STALL_S_MAX", 2.0)
    violations = watch_with_a_fault(DeadlyTurn(number))
    assert len(violations) == 1
    assert what in violations[0].what
    assert "not again" in violations[0].what, "its messages do no harm"
    assert violations[0].batch == 5


def test_the_message_that_ends_a_process_is_found(monkeypatch: pytest.MonkeyPatch, targets: list[Target]) -> None:
    values = make_batch(target_of(targets, 5), 1, 5)
    culprit = next(value for value in values[300:] if value and len(value) > 40 and values.count(value) == 1)
    good = bench.fuzz.read

    def deadly(target: Target, some: list[Message]) -> object:
        if culprit in some:
            os.kill(os.getpid(), signal.SIGKILL)
        return good(target, some)

    # forked, so that the fault is there too; simulating again would need threads that a fork leaves behind
    monkeypatch.setattr(bench.fuzz, "START_METHOD", "fork")
    monkeypatch.setattr(bench.fuzz, "make_targets", lambda: targets)
    monkeypatch.setattr(bench.fuzz, "read", deadly)
    report = bench.fuzz.run(8 * 1024, 1, 1, lambda share: None)
    assert [(one.batch, one.message_hex) for one in report.violations] == [(5, culprit[:200].hex())]
    assert "the process ended with -9" in report.violations[0].what


def watch_with_a_fault(turn: Callable[..., None]) -> list[Violation]:
    """The watch over one process that has begun batch 5 and then takes this turn."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    at, queue = context.Value("q", 5), context.Queue()
    process = context.Process(target=turn, daemon=True)
    process.start()
    try:
        return bench.fuzz._watch([bench.fuzz._Crewman(process)], [at], queue, 1, lambda batch: None)
    finally:
        process.kill()
        process.join()
