"""The service as a process, between a real broker and a real Triton: nothing is lost, whatever is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.cluster import (
    committed_offsets,
    escalating_bundle,
    parse_decision_id,
    read_topic,
    shipped_bundle_with,
    simulated,
)
from bench.embedded import EmbeddedParts, ServiceProcess, new_names, play_file, records_in, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import Bool
from cascade.config import Config, DeepSettings, load_config
from cascade.escalation_budget import EscalationBudget
from cascade.frames import LabelledData
from cascade.ledger import LedgerSummary
from cascade.local_parts import free_ports
from cascade.policy import RAW_MAX
from stages.assembly import deep_signature, make_deep_stage, make_engine
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from stages.offline import OfflineScores, score_offline
from streaming.kafka import FetchedBatch
from streaming.pipeline.decisions import Decision, decode_decision
from streaming.service.locked_memory import locking_problem
from tests.conftest import Broker
from tests.e2e.asking import health, producing
from tests.timing import wait_until

pytestmark = [pytest.mark.kafka]

SCORE_DIFFERENCE_MAX = 1e-6
# A record of the log is fetched, not met: its deadline counts from then.
BACKLOG = {"deadline": {"start": "fetch", "budget_ms": 60_000}, "labels": {"alignment": "exact"}}
# So many are escalated here, a fifth, that every micro-batch brings some.
ESCALATED_SHARE = 0.2
BUDGET_MS = 1_500
Settings = dict[str, dict[str, Any]]
KILLED_AT_COMMIT = "tests.e2e.killed_at_commit"


@dataclass(frozen=True)
class Record:
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes | None]


@dataclass(frozen=True)
class Run:
    """A finished run of the service over a topic."""

    config_path: Path
    config: Config
    records: list[Record]
    ledger: LedgerSummary

    @cached_property
    def decisions(self) -> list[Decision]:
        return [decode_decision(record.value or b"", self.config.kafka.codec) for record in self.records]


@pytest.fixture(scope="module")
def data() -> LabelledData:
    # three weeks: labels, seven days late, act on most of it
    schema = load_bundle(SHIPPED_BUNDLE).schema
    return simulated(schema, cards=250, terminals=200, days=21, seed=3, fraud_share=0.02)


@pytest.fixture(scope="module")
def bundle(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return escalating_bundle(tmp_path_factory.mktemp("bundle") / "bundle", ESCALATED_SHARE, data)


@pytest.fixture(scope="module")
def offline(bundle: Bundle, data: LabelledData) -> OfflineScores:
    with closing(make_deep_stage(bundle, DeepSettings(backend="onnxruntime"))) as deep:
        return score_offline(make_engine(bundle), deep, data, np.ones(data.batch.rows, bool), lambda _: None)


@pytest.fixture(scope="module")
def triton_server(
    triton_parts: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalTriton]:
    out = tmp_path_factory.mktemp("triton") / "models"
    repository = write_repository(bundle.directory / "deep.onnx", deep_signature(bundle), out, "cpu")
    with LocalTriton(repository, parts_dir=triton_parts) as running:
        yield running


ConfigMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def new_config(broker: Broker, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> ConfigMaker:
    """Writes a configuration with topics and a group of its own."""
    parts = EmbeddedParts(tmp_path_factory.mktemp("service"), bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap

    def make(settings: Settings, triton: LocalTriton | None = None, partitions: int = 1) -> Path:
        parts.triton_url = triton.grpc_url if triton is not None else ""
        kafka = new_names() | settings.get("kafka", {})
        return parts.write_config(f"{uuid.uuid4().hex}.toml", settings | {"kafka": kafka}, partitions)

    return make


def read_all(config: Config, topic: str) -> list[Record]:
    found: list[Record] = []

    def take(batch: FetchedBatch) -> None:
        columns = zip(batch.offsets.tolist(), batch.keys, batch.values, batch.headers, strict=True)
        found.extend(Record(offset, key, value, dict(headers)) for offset, key, value, headers in columns)

    read_topic(config, topic, take)
    return found


def decisions_in(config: Config) -> list[Decision]:
    records = read_all(config, config.kafka.topics.decisions)
    return [decode_decision(record.value or b"", config.kafka.codec) for record in records]


def committed(config: Config) -> int:
    return committed_offsets(config)[0]


def over_a_backlog(config_path: Path, data: LabelledData, rows: slice = slice(None)) -> Run:
    """Fill the topics, start the service, wait for all decisions, stop it."""
    config = load_config(config_path)
    play_file(config, data, rows, None, lambda _: None)
    count = len(range(*rows.indices(data.batch.rows)))
    with ServiceProcess(config_path) as service:
        service.wait_ready()
        wait_for_decisions(service, count, lambda _: None)
        ledger = service.stop()
    return Run(config_path, config, read_all(config, config.kafka.topics.decisions), ledger)


def chosen(bundle: Bundle, offline: OfflineScores, starts: Sequence[int] = (0,)) -> Bool:
    """The rows that a service escalates whose processes begin at the rows `starts`, each with an empty bucket."""
    scores = np.split(offline.escalation, starts[1:])
    masks = [EscalationBudget.of_policy(bundle.policy).choose(part, np.zeros(len(part), bool)) for part in scores]
    return np.concatenate(masks)


def check_scores(
    decisions: list[Decision], offline: OfflineScores, bundle: Bundle, starts: Sequence[int] = (0,)
) -> None:
    """Each score, repeats included, is the offline one of its stage; transaction ids are row numbers.

    starts: the first row that each process decides; one that is killed before it commits decides what the next one
    decides again.
    """
    rows = np.array([int(decision.transaction_id) for decision in decisions])
    scores = np.array([decision.score for decision in decisions])
    by_deep = np.array([decision.stage == "deep" for decision in decisions])
    screener = bundle.policy.screener.probability(offline.screener_raw[rows])
    combined = bundle.policy.combined.probability(offline.screener_raw[rows], offline.deep_raw[rows])
    expected = np.where(by_deep, combined, screener)
    np.testing.assert_allclose(scores, expected, atol=SCORE_DIFFERENCE_MAX, rtol=0)
    np.testing.assert_allclose(
        [decision.screener_score for decision in decisions], screener, atol=SCORE_DIFFERENCE_MAX, rtol=0
    )
    escalated = chosen(bundle, offline, starts)[rows]
    assert (by_deep | np.array([decision.degraded for decision in decisions])).tolist() == escalated.tolist()


# --- a whole stream, on Triton and in process -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_triton(new_config: ConfigMaker, triton_server: LocalTriton, data: LabelledData) -> Run:
    # all but the last thousand, which a later start of the service decides
    return over_a_backlog(new_config(BACKLOG, triton_server), data, slice(0, data.batch.rows - 1_000))


@pytest.mark.triton
def test_every_transaction_has_exactly_one_decision(on_triton: Run, data: LabelledData) -> None:
    identities = data.batch["transaction_id"][: data.batch.rows - 1_000].tolist()
    assert identities == list(range(len(identities))), "these tests take ids for row numbers"
    assert sorted(int(decision.transaction_id) for decision in on_triton.decisions) == identities
    assert len({decision.decision_id for decision in on_triton.decisions}) == len(identities)


@pytest.mark.triton
def test_scores_from_the_stream_equal_the_offline_ones(on_triton: Run, offline: OfflineScores, bundle: Bundle) -> None:
    check_scores(on_triton.decisions, offline, bundle)
    share = np.mean([decision.stage == "deep" for decision in on_triton.decisions])
    assert 0.5 * ESCALATED_SHARE < share < 2 * ESCALATED_SHARE
    assert not any(decision.degraded for decision in on_triton.decisions)


@pytest.mark.triton
def test_a_decision_has_its_action_its_stage_and_its_latency(
    on_triton: Run, data: LabelledData, bundle: Bundle
) -> None:
    topic = on_triton.config.kafka.topics.transactions
    now_ms = time.time() * 1e3
    for record, decision in zip(on_triton.records, on_triton.decisions, strict=True):
        row = int(decision.transaction_id)
        assert record.key == b"%d" % data.batch["card_id"][row], "the key must be the card"
        assert decision.decision_id == f"{topic}-0-{row}"
        assert decision.bundle == bundle.version
        assert decision.event_time_ms == data.batch["event_time"][row]
        assert now_ms - 600_000 < decision.decision_time_ms <= now_ms
        assert (
            decision.decision
            == ("approve", "review", "decline")[int(bundle.policy.actions(np.array([decision.score]))[0])]
        )
        assert (decision.degraded, decision.degraded_cause) == (False, None)
        took = decision.latency_ms
        assert min(took.queue, took.features, took.screener, took.deep) >= 0
        assert (took.deep > 0) == (decision.stage == "deep")
        assert took.total >= took.queue + took.deep - 1
    assert set(json.loads(on_triton.records[0].value or b"")) == set(Decision.__struct_fields__)


@pytest.mark.triton
def test_the_ledger_counts_what_is_in_the_topics(on_triton: Run) -> None:
    ledger = on_triton.ledger
    escalated = sum(decision.stage == "deep" for decision in on_triton.decisions)
    assert ledger.transactions == len(on_triton.decisions)
    assert ledger.escalation_share == pytest.approx(escalated / len(on_triton.decisions))


@pytest.mark.triton
def test_stopping_commits_all_and_a_new_start_repeats_nothing_and_goes_on_with_the_same_state(
    on_triton: Run, data: LabelledData, offline: OfflineScores, bundle: Bundle
) -> None:
    config, before = on_triton.config, len(on_triton.decisions)
    assert committed(config) == records_in(config, config.kafka.topics.transactions) == before
    command = [sys.executable, "-m", "cascade", "run", "--json", "--config", str(on_triton.config_path)]
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: health(config, "/readyz")[0] == 200, "ready")
        assert records_in(config, config.kafka.topics.decisions) == before
        play_file(config, data, slice(before, data.batch.rows), None, lambda _: None)
        topic = config.kafka.topics.decisions
        wait_until(lambda: records_in(config, topic) >= data.batch.rows, "all decided")
        again.terminate()
        printed, logged = again.communicate(timeout=30)
    finally:
        again.kill()
    assert again.returncode == 0, logged
    assert json.loads(printed)["transactions"] == data.batch.rows - before
    assert committed(config) == data.batch.rows
    decisions = decisions_in(config)
    assert [int(decision.transaction_id) for decision in decisions[:before]] == [
        int(o.transaction_id) for o in on_triton.decisions
    ]
    assert sorted(int(decision.transaction_id) for decision in decisions) == list(range(data.batch.rows))
    check_scores(decisions, offline, bundle, (0, before))


def test_in_process_the_stream_gives_the_same_scores(
    new_config: ConfigMaker, data: LabelledData, offline: OfflineScores, bundle: Bundle
) -> None:
    settings = BACKLOG | {"deep": {"backend": "onnxruntime"}, "worker": {"lock_memory": not locking_problem()}}
    run = over_a_backlog(new_config(settings), data, slice(0, 3_000))
    assert sorted(int(decision.transaction_id) for decision in run.decisions) == list(range(3_000))
    assert sum(decision.stage == "deep" for decision in run.decisions) > 100
    check_scores(run.decisions, offline, bundle)


# --- what cannot be read --------------------------------------------------------------------------------------------

GOOD = {
    "transaction_id": 1,
    "event_time": 1_735_700_000_000,
    "card_id": 7,
    "terminal_id": 8,
    "amount": 9.5,
    "entry_mode": "chip",
    "category": "grocery",
    "country": "DE",
    "device_id": 0,
}


def spoilt(**fields: Any) -> bytes:
    return msgspec.json.encode(GOOD | fields)


MALFORMED: dict[str, tuple[bytes | None, str]] = {
    "not JSON": (b"hello", "syntax"),
    "cut short": (spoilt()[:-1], "syntax"),
    "two messages": (spoilt() + b"," + spoilt(), "syntax"),
    "no bytes": (b"", "empty"),
    "a tombstone": (None, "empty"),
    "another shape": (b"[1, 2]", "type"),
    "amount as text": (spoilt(amount="9.5"), "type"),
    "card as a float": (spoilt(card_id=7.5), "type"),
    "card is null": (spoilt(card_id=None), "type"),
    "amount missing": (msgspec.json.encode({k: v for k, v in GOOD.items() if k != "amount"}), "missing-field"),
    "amount NaN": (spoilt().replace(b"9.5", b"NaN"), "syntax"),
    "amount infinite": (spoilt().replace(b"9.5", b"1e999"), "not-finite"),
    "amount negative": (spoilt(amount=-0.01), "out-of-limits"),
    "amount too large": (spoilt(amount=100_000.01), "out-of-limits"),
    "before its time": (spoilt(event_time=0), "out-of-limits"),
    "after its time": (spoilt(event_time=9_999_999_999_999), "out-of-limits"),
    "unknown category": (spoilt(entry_mode="cheque"), "unknown-category"),
    "oversized": (spoilt(padding="x" * 70_000), "oversized"),
    "as large as the topic takes": (b"x" * 1_000_000, "oversized"),
    "wrong encoding": (spoilt(entry_mode="chip").replace(b"chip", b"\xff\xfe"), "encoding"),
    "UTF-16": (spoilt().decode().encode("utf-16"), "encoding"),
}


@pytest.fixture(scope="module")
def with_dead_letters(new_config: ConfigMaker) -> Iterator[tuple[Config, ServiceProcess]]:
    """The service after it met every malformed message between good ones, and unreadable labels."""
    path = new_config({"deep": {"backend": "onnxruntime"}})
    config = load_config(path)
    topics = config.kafka.topics
    messages: list[tuple[str, bytes, bytes | None]] = [(topics.labels, b"label", b"no label")]
    for position, (value, _) in enumerate(MALFORMED.values()):
        messages.append((topics.transactions, b"good", spoilt(transaction_id=position)))
        messages.append((topics.transactions, b"bad-%d" % position, value))
    with producing(config) as producer, ServiceProcess(path) as service:
        service.wait_ready()
        for topic, key, value in messages:
            producer.send(topic, key, value, [("trace", b"\x00\xff")])
            producer.flush(20)
        wait_for_decisions(service, 2 * len(MALFORMED) + 1, lambda _: None)
        yield config, service


def test_every_malformed_message_is_a_dead_letter_and_the_stream_goes_on(
    with_dead_letters: tuple[Config, ServiceProcess],
) -> None:
    config, _ = with_dead_letters
    letters = {record.key: record for record in read_all(config, config.kafka.topics.dead_letters)}
    assert len(letters) == len(MALFORMED) + 1
    for position, (name, (value, reason)) in enumerate(MALFORMED.items()):
        letter = letters[b"bad-%d" % position]
        assert letter.value == value, f"{name}: the bytes were touched"
        headers = {key: text for key, text in letter.headers.items() if key.startswith("cascade-")}
        assert headers["cascade-reason"] == reason.encode(), name
        assert headers["cascade-topic"] == config.kafka.topics.transactions.encode()
        assert (headers["cascade-partition"], headers["cascade-offset"]) == (b"0", b"%d" % (2 * position + 1))
        assert letter.headers["trace"] == b"\x00\xff", "the record's own headers were touched"
    assert letters[b"label"].headers["cascade-topic"] == config.kafka.topics.labels.encode()
    assert sorted(int(decision.transaction_id) for decision in decisions_in(config)) == list(range(len(MALFORMED)))


@pytest.fixture(scope="module")
def after_a_restart(with_dead_letters: tuple[Config, ServiceProcess]) -> tuple[Config, LedgerSummary, int]:
    """The ledger of the first start and its committed offset, after a second start that met nothing new."""
    config, service = with_dead_letters
    ledger, until = service.stop(), committed(config)
    service.start()
    service.wait_ready()
    time.sleep(0.5)
    service.stop()
    return config, ledger, until


def test_dead_letters_are_counted_and_committed(after_a_restart: tuple[Config, LedgerSummary, int]) -> None:
    _, ledger, until = after_a_restart
    assert sum(ledger.dead_letters.values()) == len(MALFORMED) + 1
    assert until == 2 * len(MALFORMED)


def test_a_new_start_decides_nothing_twice_and_dead_letters_nothing_twice(
    after_a_restart: tuple[Config, LedgerSummary, int],
) -> None:
    config = after_a_restart[0]
    letters = Counter(record.key for record in read_all(config, config.kafka.topics.dead_letters))
    assert [key for key, count in letters.items() if count > 1 and key != b"label"] == []
    assert len(decisions_in(config)) == len(MALFORMED)


def test_an_unreadable_label_is_a_dead_letter_once(after_a_restart: tuple[Config, LedgerSummary, int]) -> None:
    config = after_a_restart[0]
    letters = read_all(config, config.kafka.topics.dead_letters)
    assert sum(record.key == b"label" for record in letters) == 1


# --- killed in mid-stream -------------------------------------------------------------------------------------------


def offset_of(decision: Decision) -> int:
    """The offset of its transaction."""
    return parse_decision_id(decision.decision_id)[1]


def decided_offsets(config: Config) -> set[int]:
    return set(map(offset_of, decisions_in(config)))


@pytest.mark.triton
@pytest.mark.parametrize("client", ["librdkafka", "kafka-python"])
def test_a_worker_that_is_killed_loses_no_transaction(
    new_config: ConfigMaker,
    triton_server: LocalTriton,
    data: LabelledData,
    offline: OfflineScores,
    bundle: Bundle,
    client: str,
) -> None:
    part, rows = 600, 2_400
    # small batches and frequent commits: a kill falls into the middle of the stream
    settings = {"worker": {"batch_rows_max": 20, "commit_interval_ms": 20}, "kafka": {"client": client}}
    path = new_config(BACKLOG | settings, triton_server)
    config = load_config(path)
    play_file(config, data, slice(0, part), None, lambda _: None)
    with ServiceProcess(path) as service:
        wait_until(lambda: committed(config) == part, "all committed")
        service.kill()
    for until in (2 * part, 3 * part):
        before = len(decisions_in(config))
        play_file(config, data, slice(until - part, until), None, lambda _: None)
        with ServiceProcess(path, KILLED_AT_COMMIT) as service:
            wait_until(lambda: service.pid is None, "the kill")
        assert len(decisions_in(config)) > before, "a commit comes before its decisions"
        assert committed(config) == part
    play_file(config, data, slice(3 * part, rows), None, lambda _: None)
    with ServiceProcess(path) as service:
        wait_until(lambda: len(decided_offsets(config)) == rows, "all decided")
        service.wait_ready()
        service.stop()
    assert committed(config) == rows
    decisions = decisions_in(config)
    assert {int(decision.transaction_id) for decision in decisions} == set(range(rows))
    identities = {(decision.transaction_id, decision.decision_id) for decision in decisions}
    assert len(identities) == rows, "a repeat must carry the same decision id"
    assert len(decisions) > rows, "what was not committed is decided again"
    check_scores(decisions, offline, bundle, (0, part))


@pytest.mark.triton
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_what_a_killed_worker_had_escalated_stays_so_and_what_was_decided_ahead_is_not_decided_again(
    new_config: ConfigMaker,
    triton_server: LocalTriton,
    data: LabelledData,
    offline: OfflineScores,
    bundle: Bundle,
    tmp_path: Path,
    delivery: str,
) -> None:
    rows, more = 400, 100
    # with a name, an open transaction of the killed worker is ended by the next start, and not by its timeout
    path = new_config(BACKLOG | {"delivery": delivery, "kafka": {"instance": "worker-0"}}, triton_server)
    config = load_config(path)
    escalated = chosen(bundle, offline)[:rows]
    with ServiceProcess(path) as service:
        service.wait_ready()
        triton_server.freeze()
        try:
            play_file(config, data, slice(0, rows), None, lambda _: None)
            wait_until(lambda: len(decided_offsets(config)) == int((~escalated).sum()), "what the screener decides")
            wait_until(lambda: committed(config) == np.flatnonzero(escalated)[0], "the commit")
            time.sleep(2 * config.worker.commit_interval_ms / 1e3)
            service.kill()
        finally:
            # the killed worker's calls are cancelled: a Triton of 2.51 that thaws then may crash (decision 3)
            triton_server.kill()
            triton_server.start()
    assert committed(config) < rows // 2, "nothing was decided ahead of the prefix"
    # every score lies below the threshold now; a rebuilt state moves some of them there
    certain = shipped_bundle_with(tmp_path / "certain", "certain", 0.0, RAW_MAX, {})
    settings = msgspec.toml.decode(path.read_bytes()) | {"bundle": {"path": str(certain.directory)}}
    path.write_bytes(msgspec.toml.encode(settings))
    with ServiceProcess(path) as service:
        service.wait_ready()
        play_file(config, data, slice(rows, rows + more), None, lambda _: None)
        wait_until(lambda: len(decided_offsets(config)) == rows + more, "all decided")
        service.stop()
    decisions = decisions_in(config)
    assert sorted(int(decision.transaction_id) for decision in decisions) == list(range(rows + more))
    # the last of them has nothing decided beyond it: that it waited is not known
    waited = np.flatnonzero(escalated & (np.arange(rows) < np.flatnonzero(~escalated)[-1]))
    assert len(waited) > 10
    by_deep = {int(decision.transaction_id) for decision in decisions if decision.stage == "deep"}
    assert by_deep == set(waited.tolist())
    screened = np.array([int(decision.transaction_id) for decision in decisions if decision.stage == "screener"])
    cards = data.batch["card_id"][screened]
    assert all((np.diff(screened[cards == card]) > 0).all() for card in np.unique(cards))


def test_a_killed_worker_goes_on_from_its_snapshot_and_scores_as_if_nothing_had_happened(
    new_config: ConfigMaker, data: LabelledData, offline: OfflineScores, bundle: Bundle, tmp_path: Path
) -> None:
    rows = 3_000
    snapshots = tmp_path / "state"
    state = {"snapshots": str(snapshots), "interval_s": 0.1}
    path = new_config(BACKLOG | {"deep": {"backend": "onnxruntime"}, "state": state})
    config = load_config(path)
    keep = config.state.keep

    def whole() -> list[Path]:
        return sorted(snapshots.glob("*.snapshot"))

    logged = ""
    for first in range(0, rows, 1_000):
        play_file(config, data, slice(first, first + 1_000), None, lambda _: None)
        with ServiceProcess(path) as service:
            wait_for_decisions(service, first + 1_000, lambda _: None)
            wait_until(lambda: committed(config) == first + 1_000, "the commit")  # noqa: B023
            newest = whole()[-1:]
            # before that as many more may exist, of offsets that were ahead of the commit
            wait_until(lambda: whole()[-1:] > newest and 2 <= len(whole()) <= keep, "only the newest")  # noqa: B023
            service.kill()
        logged = path.with_suffix(".log").read_text()
        assert ("restoring a snapshot" in logged) == (first > 0)
        files = whole()
        # one more: the kill may fall between the writing of a new one and the removal of an old one
        assert 2 <= len(files) <= keep + 1
        # the newest is torn, as by a full disk: the one before will do
        files[-1].write_bytes(files[-1].read_bytes()[:-100])
    assert "snapshot ignored" in logged
    decisions = decisions_in(config)
    assert sorted(int(decision.transaction_id) for decision in decisions) == list(range(rows))
    check_scores(decisions, offline, bundle, range(0, rows, 1_000))


# --- Triton in trouble ----------------------------------------------------------------------------------------------


@dataclass
class Outages:
    """Decisions in the order of the topic, by the state of Triton at the time, and what health reported then."""

    decisions: dict[str, list[Decision]]
    health: dict[str, tuple[int, dict[str, Any]]]
    decided: int
    played: int


@pytest.fixture(scope="module")
def outages(new_config: ConfigMaker, triton_parts: Path, triton_server: LocalTriton, data: LabelledData) -> Outages:
    """One service, never restarted, while its Triton freezes, thaws, dies and comes back."""
    breaker = {"calls": 10, "pause_ms": 200, "pause_ms_max": 800}
    settings: Settings = {
        "deadline": {"start": "append", "budget_ms": BUDGET_MS},
        "breaker": breaker,
        # the breaker counts calls: a busy machine would make few of many transactions
        "worker": {"batch_rows_max": 20},
    }
    path = new_config(settings, triton_server)
    config = load_config(path)
    rate, played = 300, 0
    spans: dict[str, range] = {}
    reports: dict[str, tuple[int, dict[str, Any]]] = {}

    def play(name: str, count: int) -> None:
        nonlocal played
        play_file(config, data, slice(played, played + count), rate, lambda _: None)
        spans[name] = range(played, played + count)
        played += count
        wait_for_decisions(service, played, lambda _: None)

    with ServiceProcess(path) as service:
        service.wait_ready()
        play("start", 150)
        play("well", 450)
        triton_server.freeze()
        try:
            play("frozen", 300)
            # all calls of the first are over: they have opened the breaker
            play("frozen_longer", 300)
            reports["frozen"] = health(config, "/readyz")
        finally:
            triton_server.thaw()
        play("thawed", 150)
        # else the breaker is open still, and few are tried
        wait_until(lambda: health(config, "/readyz")[0] == 200, "the thawed model is used again")
        triton_server.kill()
        try:
            play("gone", 300)
            play("gone_longer", 300)
            reports["gone"] = health(config, "/readyz")
        finally:
            triton_server.start()
        play("reconnecting", 300)
        wait_until(lambda: health(config, "/readyz")[0] == 200, "the model that is back is used again")
        play("back", 300)
        reports["back"] = health(config, "/readyz")
        service.stop()
    decisions = decisions_in(config)
    phases = {
        name: [decision for decision in decisions if int(decision.transaction_id) in span]
        for name, span in spans.items()
    }
    return Outages(phases, reports, len(decisions), played)


def causes(decisions: list[Decision]) -> Counter[str | None]:
    return Counter(decision.degraded_cause for decision in decisions if decision.stage == "deep" or decision.degraded)


@pytest.mark.triton
def test_no_transaction_is_lost_or_decided_twice_while_triton_is_in_trouble(outages: Outages) -> None:
    assert outages.decided == outages.played


def check_degraded(decisions: list[Decision], *allowed: str) -> Counter[str | None]:
    """The screener decides what the deep model does not; returns the causes."""
    found = causes(decisions)
    assert set(found) <= set(allowed)
    degraded = [decision for decision in decisions if decision.degraded]
    assert all(decision.stage == "screener" and decision.score == decision.screener_score for decision in degraded)
    return found


@pytest.mark.triton
def test_with_a_frozen_triton_the_screener_decides_at_the_deadline(outages: Outages) -> None:
    frozen = outages.decisions["frozen"]
    assert check_degraded(frozen, "deadline", "breaker-open")["deadline"] > 10
    # the decisions were waited for while Triton stood still: none of them needed its answer
    late = [decision for decision in frozen if decision.degraded_cause == "deadline"]
    assert min(decision.latency_ms.total for decision in late) >= BUDGET_MS - 1


@pytest.mark.triton
def test_screened_decisions_do_not_wait_for_a_frozen_triton(outages: Outages) -> None:
    # in the topic they lie before the decisions of earlier transactions that waited for the deadline
    frozen = outages.decisions["frozen"]
    offsets = list(map(offset_of, frozen))
    overtaken = [
        decision.degraded_cause
        for position, decision in enumerate(frozen)
        if any(later_offset > offsets[position] for later_offset in offsets[:position])
    ]
    assert None not in overtaken
    assert overtaken.count("deadline") > 10


@pytest.mark.triton
def test_without_a_triton_the_screener_decides_at_once_and_is_marked(outages: Outages) -> None:
    # how many come before the breaker opens is the breaker's affair: a failed call may have many rows
    assert check_degraded(outages.decisions["gone"], "error", "deadline", "breaker-open")["error"] > 0


@pytest.mark.triton
def test_an_open_breaker_spares_transactions_the_wait(outages: Outages) -> None:
    for decisions in (outages.decisions["frozen_longer"], outages.decisions["gone_longer"]):
        spared = [decision for decision in decisions if decision.degraded_cause == "breaker-open"]
        assert len(spared) > 10
        assert all(decision.latency_ms.deep == 0 for decision in spared)


@pytest.mark.triton
def test_readiness_names_the_deep_model_while_it_is_gone(outages: Outages) -> None:
    status, report = outages.health["gone"]
    assert status == 503
    assert any(line.startswith("deep model: ") for line in report["waiting_for"])
    assert outages.health["back"][0] == 200


@pytest.mark.triton
def test_a_triton_that_is_well_again_is_used_again(outages: Outages) -> None:
    for decisions in (outages.decisions["well"], outages.decisions["back"]):
        found = causes(decisions)
        assert found[None] > 0.8 * found.total() > 15


@pytest.mark.triton
def test_the_worker_stays_in_its_group_through_all_of_it(outages: Outages) -> None:
    for _, report in outages.health.values():
        assert report["components"]["partitions"]["status"] == "ok"


@pytest.mark.triton
def test_a_start_without_triton_decides_by_the_screener_and_uses_triton_once_it_is_there(
    new_config: ConfigMaker, triton_server: LocalTriton, data: LabelledData
) -> None:
    breaker = {"calls": 10, "pause_ms": 200, "pause_ms_max": 800}
    settings: Settings = {"deadline": {"budget_ms": BUDGET_MS}, "breaker": breaker, "deep": {"start_wait_s_max": 0.0}}
    path = new_config(settings, triton_server)
    config = load_config(path)
    triton_server.kill()
    try:
        with ServiceProcess(path) as service:
            wait_until(lambda: "partitions" in ok_components(config), "it has started without the model")
            assert any(line.startswith("deep model: ") for line in health(config, "/readyz")[1]["waiting_for"])
            # slowly: the breaker counts calls, and a loaded machine makes few of many transactions
            play_file(config, data, slice(0, 300), 60, lambda _: None)
            wait_for_decisions(service, 300, lambda _: None)
            triton_server.start()
            # nothing comes meanwhile: it finds out by itself
            wait_until(lambda: health(config, "/readyz")[0] == 200, "the model is found again")
            play_file(config, data, slice(300, 600), 300, lambda _: None)
            wait_for_decisions(service, 600, lambda _: None)
            service.stop()
    finally:
        triton_server.start()
    by_row = {int(decision.transaction_id): decision for decision in decisions_in(config)}
    without, later = ([by_row[row] for row in rows] for rows in (range(300), range(300, 600)))
    assert causes(without)[None] == 0
    assert causes(without)["breaker-open"] > 0
    found = causes(later)
    assert found[None] > 0.8 * found.total() > 15


def ok_components(config: Config) -> list[str]:
    components = health(config, "/readyz")[1].get("components", {})
    return [name for name, part in components.items() if part["status"] == "ok"]


# --- what is not there at the start ---------------------------------------------------------------------------------


def write_plain_config(tmp_path: Path, sections: Settings) -> Path:
    path = tmp_path / "cascade.toml"
    whole = {"bundle": {"path": str(SHIPPED_BUNDLE)}, "health": {"port": free_ports(1)[0]}}
    path.write_bytes(msgspec.toml.encode(whole | sections))
    return path


def check_waiting(config_path: Path, component: str, address: str) -> None:
    """The service waits, names what for, is alive but not ready, and ends cleanly on SIGTERM."""
    config = load_config(config_path)
    command = [sys.executable, "-m", "cascade", "run", "--config", str(config_path)]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:

        def is_named() -> bool:
            lines = health(config, "/readyz")[1].get("waiting_for", [])
            return any(line.startswith(component) and address in line for line in lines)

        wait_until(is_named, f"health names {component} at {address}")
        assert health(config, "/readyz")[0] == 503
        assert health(config, "/healthz")[0] == 200
        assert service.poll() is None
        service.terminate()
        # what it waits for never comes
        _, logged = service.communicate(timeout=60)
    finally:
        service.kill()
    assert service.returncode == 0, logged
    assert "Traceback" not in logged
    lines = [line for line in logged.splitlines() if address in line]
    assert lines
    assert len(lines) < 25, "the log repeats itself without a pause"


@pytest.mark.parametrize("absent", ["broker", "deep model"])
def test_without_a_broker_or_a_triton_the_service_waits_reports_it_and_stops_on_sigterm(
    tmp_path: Path, broker: Broker, absent: str
) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    sections: Settings = {"kafka": {"bootstrap": address}, "deep": {"backend": "onnxruntime"}}
    if absent == "deep model":
        sections = {"kafka": {"bootstrap": broker.bootstrap}, "deep": {"url": address}}
    check_waiting(write_plain_config(tmp_path, sections), absent, address)


def ends_with_one_line(config_path: Path) -> str:
    command = [sys.executable, "-m", "cascade", "run", "--config", str(config_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    *logged, line = done.stderr.splitlines()
    assert all("[info " in entry for entry in logged)
    assert line.startswith("cascade run: ")
    return line


def test_a_bundle_with_a_wrong_checksum_stops_the_start_with_one_line(tmp_path: Path) -> None:
    altered = Path(shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle"))
    octets = bytearray((altered / "deep.onnx").read_bytes())
    octets[1_000] ^= 1
    (altered / "deep.onnx").write_bytes(octets)
    line = ends_with_one_line(write_plain_config(tmp_path, {"bundle": {"path": str(altered)}}))
    assert "deep.onnx: SHA-256 differs" in line


def test_no_thread_of_these_tests_is_left() -> None:
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("keeper of the service")] == []
