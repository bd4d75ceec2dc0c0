"""The steps of the pipeline, each over a table of its own, and their order in a micro-batch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streaming.pipeline
from bench.faults.model import SimScreener
from bench.faults.process import POLICY
from bench.faults.traffic import SCHEMA, feature_spec
from cascade.columns import ColumnBatch
from cascade.config import Config, DuplicateSettings
from cascade.engine import Engine
from cascade.features import FeatureEngine
from cascade.ledger import StageLaps
from streaming.codecs import Reject, RejectReason
from streaming.kafka import FetchedBatch, Headers
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.deduplicate import deduplicate
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.repeats import Repeats
from streaming.pipeline.screen import screen
from streaming.pipeline.send import Sent, path_of, send, send_dead_letter
from streaming.pipeline.table import Table

ROOT = Path(__file__).parents[3]


class Mailbox:
    """An outbox that keeps what is sent."""

    def __init__(self) -> None:
        self.many: list[tuple[str, list[bytes | None], list[bytes | None], Sent]] = []
        self.one: list[tuple[str, bytes | None, bytes | None, Headers, Sent]] = []

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        self.one.append((topic, key, value, headers, sent))

    def send_many(self, topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], sent: Sent) -> None:
        self.many.append((topic, list(keys), list(values), sent))


def transactions(count: int, **columns: Any) -> Table:
    batch = {name: np.arange(count).astype(field.dtype) for name, field in SCHEMA.fields.items()}
    return Table.of("transactions", ColumnBatch(batch, count), ("v1",), **{"offset": np.arange(count)} | columns)


def made_repeats(first_decisions: FirstDecisions) -> Repeats:
    return Repeats(Config(), first_decisions, POLICY, {}, pytest.fail, None)  # type: ignore[arg-type]


def test_the_list_of_steps_names_modules_that_there_are() -> None:
    steps = re.findall(r"^    (\w+) +(\S+\.py)", streaming.pipeline.__doc__ or "", re.MULTILINE)
    assert [name for name, _ in steps] == [
        "fetch", "decode", "deduplicate", "features", "screen", "escalate", "decide", "encode", "send", "acknowledge",
        "commit",
    ]  # fmt: skip
    for _, path in steps:
        assert (ROOT / path).exists(), path
        importlib.import_module(path.removesuffix(".py").replace("/", "."))


def test_repeats_leave_the_table_and_wait_but_not_those_that_were_decided_before() -> None:
    first_decisions = FirstDecisions(DuplicateSettings())
    repeats = made_repeats(first_decisions)
    table = transactions(4, undecided=[True, True, True, False])
    for name in (SCHEMA.roles.transaction_id, SCHEMA.roles.card, SCHEMA.roles.amount):
        table.batch[name][[1, 2, 3]] = table.batch[name][0]  # the same transaction four times
    left = deduplicate(table, first_decisions, repeats, SCHEMA.roles)
    assert left.rows["offset"].tolist() == [0]
    assert repeats.open == 2
    assert deduplicate(left, first_decisions, repeats, SCHEMA.roles).rows["offset"].tolist() == [0], "read again"


def test_a_table_without_repeats_is_not_copied() -> None:
    first_decisions = FirstDecisions(DuplicateSettings())
    table = transactions(3)
    assert deduplicate(table, first_decisions, made_repeats(first_decisions), SCHEMA.roles) is table


def test_screening_fills_scores_and_times_and_keeps_what_was_escalated_before() -> None:
    engine = Engine(FeatureEngine(feature_spec(False), SCHEMA), SimScreener(), POLICY)
    reference = Engine(FeatureEngine(feature_spec(False), SCHEMA), SimScreener(), POLICY)
    table = transactions(40, undecided=True, was_escalated=np.arange(40) == 7)
    table.rows["undecided"][3] = False
    laps = StageLaps()
    laps.begin()
    table.rows["queue_ms"] = np.arange(40)
    screened, clear, escalated, queue_s = screen(table, engine, 1.0, laps)
    expected = reference.screen(table.batch)
    undecided = np.arange(40) != 3
    chosen = reference.escalation.choose(expected.escalation_score[undecided], (np.arange(40) == 7)[undecided])
    rows = table.rows
    assert rows["screener_score"].tolist() == expected.probability.tolist() == screened.probability.tolist()
    assert rows["escalate"][undecided].tolist() == chosen.tolist()
    assert not rows["escalate"][3], "it had its decision"
    assert rows["escalate"][7], "it was escalated before"
    assert engine.escalation.level == reference.escalation.level < 0.2 * 39 - 1
    assert rows["score"].tolist() == rows["screener_score"].tolist()
    assert queue_s.tolist() == [row / 1e3 for row in range(40) if row != 3]
    assert (rows["features_ms"] == laps.wall_ms("features")).all()
    assert (rows["screener_ms"] == laps.wall_ms("screener")).all()
    assert escalated.tolist() == np.flatnonzero(rows["escalate"] & rows["undecided"]).tolist() != []
    assert clear.tolist() == np.flatnonzero(~rows["escalate"] & rows["undecided"]).tolist() != []


def test_the_action_follows_from_score_and_thresholds() -> None:
    table = transactions(4, screener_score=[0.1, 0.5, 0.9, 0.7])
    kernels.by_screener(table.rows, np.array([0, 1, 2]), 2, 4.5)
    kernels.decide(table.rows, np.array([0, 1, 2]), 0.5, 0.9, 1_000.5)
    rows = table.rows
    assert rows["score"].tolist() == [0.1, 0.5, 0.9, 0.0]
    assert rows["action"].tolist() == [0, 1, 2, 0]
    assert rows["cause"].tolist() == [2, 2, 2, 0]
    assert rows["deep_ms"].tolist() == [4.5, 4.5, 4.5, 0.0]
    assert rows["decided_ms"].tolist() == [1_000.5, 1_000.5, 1_000.5, 0.0]


def test_the_kernel_decides_as_the_policy() -> None:
    scores = np.random.default_rng(1).random(200)
    scores[:2] = POLICY.review_from, POLICY.decline_from
    table = transactions(200, screener_score=scores)
    every = np.arange(200)
    kernels.by_screener(table.rows, every, 0, 0.0)
    kernels.decide(table.rows, every, POLICY.review_from, POLICY.decline_from, 0.0)
    assert table.rows["action"].tolist() == POLICY.actions(scores).tolist()


def test_what_is_sent_names_its_records_and_its_path() -> None:
    table = transactions(3, partition_id=[0, 1, 0], start_ms=[1.0, 2.0, 3.0], stage=1)
    mailbox, chosen = Mailbox(), np.array([2, 1])
    assert path_of(table, chosen) == "escalated"
    send(table, chosen, "escalated", [b"2", b"1"], [b"b", b"a"], "decisions", mailbox)
    ((topic, keys, values, sent),) = mailbox.many
    assert (topic, keys, values) == ("decisions", [b"2", b"1"], [b"b", b"a"])
    assert {at: offsets.tolist() for at, offsets in sent.offsets.items()} == {
        ("transactions", 0): [2],
        ("transactions", 1): [1],
    }
    assert (sent.path, sent.cause, sent.start_ms.tolist()) == ("escalated", None, [3.0, 2.0])
    assert sent.records is not None
    assert sent.records.offsets.tolist() == [2, 1]


@pytest.mark.parametrize(("stage", "cause", "path"), [(0, 0, "screened"), (1, 0, "escalated"), (0, 1, "degraded")])
def test_the_path_is_that_of_stage_and_cause(stage: int, cause: int, path: str) -> None:
    table = transactions(1, stage=stage, cause=cause)
    assert path_of(table, np.array([0])) == path
    mailbox = Mailbox()
    send(table, np.array([0]), path_of(table, np.array([0])), [b"k"], [b"v"], "decisions", mailbox)
    assert mailbox.many[0][3].cause == ("deadline" if cause else None)


def test_a_dead_letter_has_the_offset_of_its_record() -> None:
    fetched = FetchedBatch("t", 4, np.array([10, 12]), np.array([1, 2]), [b"k", b"l"], [b"x", b"y"], [(), ()])
    mailbox = Mailbox()
    send_dead_letter(fetched, Reject(1, RejectReason.SYNTAX, "odd"), 5.0, None, "letters", mailbox)
    ((topic, key, value, _, sent),) = mailbox.one
    assert (topic, key, value) == ("letters", b"l", b"y")
    assert {at: offsets.tolist() for at, offsets in sent.offsets.items()} == {("t", 4): [12]}
    assert sent.path == ""
