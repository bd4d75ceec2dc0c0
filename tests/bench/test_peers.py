"""The peers: a decision for each transaction, by the features that they document. Peers not installed are skipped."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bench.cluster import simulated
from bench.peers import PEERS, Peer, Work, peer_named
from bench.peers.scoring import (
    CARD_FEATURES,
    DAY_MS,
    TERMINAL_FEATURES,
    TRANSACTION_FEATURES,
    Card,
    Days,
    Escalation,
    add,
    means,
    probability,
    transaction_features,
)
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import ColumnBatch, Float64
from cascade.config import KafkaSettings
from cascade.errors import LocalPartError
from stages.assembly import deep_signature
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from streaming.codecs import codec
from streaming.kafka import make_consumer, make_producer
from streaming.pipeline.decisions import Decision, decode_decision, message_keys
from tests.conftest import Broker

ROWS = 600
SHARE = 0.1
WAIT_S_MAX = 60.0
# its state belongs to the key of the messages
WITHOUT_TERMINALS = ("quix-streams",)
# a restart begins with an empty state
WITHOUT_STORE = ("plain-loop",)

# --- what is computed -------------------------------------------------------------------------------------------------


def test_windows_count_their_own_days_and_no_others() -> None:
    chance = np.random.default_rng(1)
    times = np.sort(chance.integers(0, 90 * DAY_MS, 500))
    amounts = chance.uniform(1, 100, 500)
    days: Days = []
    for row, (now_ms, amount) in enumerate(zip(times.tolist(), amounts.tolist(), strict=True)):
        counts, sums = add(days, now_ms, amount)
        age = now_ms // DAY_MS - times[: row + 1] // DAY_MS
        for window, count, total in zip((1, 7, 30), counts, sums, strict=True):
            assert count == (age < window).sum()
            assert total == pytest.approx(amounts[: row + 1][age < window].sum())
    assert len(days) <= 30


def test_a_late_transaction_counts_as_of_the_newest_day() -> None:
    days: Days = []
    add(days, 5 * DAY_MS, 1.0)
    assert add(days, 5 * DAY_MS - 1, 2.0)[0] == (2, 2, 2)
    assert [day for day, _, _ in days] == [5]


def test_a_cards_features_use_its_last_transaction_and_its_steps_are_sixteen() -> None:
    card = Card([], [])
    features = [dict(zip(CARD_FEATURES, card.features(1_000 * i, 10.0 * (i + 1)), strict=True)) for i in range(20)]
    assert [row["card_seconds_since_last"] for row in features[:2]] == [-1.0, 1.0]
    assert [row["card_amount_ratio_to_mean_30d"] for row in features[:3]] == [1.0, 2.0, 2.0]
    assert [time_ms for time_ms, *_ in card.steps] == [1_000 * i for i in range(4, 20)]


@pytest.mark.parametrize("start", [-50.0, 3.0])
def test_the_share_is_escalated_wherever_the_threshold_starts(start: float) -> None:
    escalation = Escalation(start, 0.01)
    scores = np.random.default_rng(2).normal(-6, 2, 100_000).tolist()
    escalated = np.array([escalation(score) for score in scores])
    assert escalated[20_000:].mean() == pytest.approx(0.01, abs=0.001)


def test_a_fixed_threshold_stays() -> None:
    escalation = Escalation(0.5, None)
    assert [escalation(score) for score in (0.4, 0.5, 0.6)] == [False, True, True]
    assert escalation.threshold == 0.5


# --- the applications -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> ColumnBatch:
    schema = load_bundle(SHIPPED_BUNDLE).schema
    return simulated(schema, cards=40, terminals=30, days=20, seed=5).take(np.arange(ROWS)).batch


@pytest.fixture(scope="module")
def triton_server(triton_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalTriton:
    bundle = load_bundle(SHIPPED_BUNDLE)
    out = tmp_path_factory.mktemp("triton") / "models"
    repository = write_repository(bundle.directory / "deep.onnx", deep_signature(bundle), out, "cpu")
    return LocalTriton(repository, parts_dir=triton_parts)


def screened_offline(rows: ColumnBatch, with_terminals: bool) -> Float64:
    """The screener's probability for each transaction, by the features of `bench.peers.scoring`."""
    import lightgbm

    screener = lightgbm.Booster(model_file=str(SHIPPED_BUNDLE / "screener.txt"))
    calibration = json.loads((SHIPPED_BUNDLE / "policy.json").read_bytes())["screener"]
    names = TRANSACTION_FEATURES + TERMINAL_FEATURES + CARD_FEATURES
    feature_columns = [screener.feature_name().index(name) for name in names]
    cards: dict[int, Card] = {}
    terminals: dict[int, Days] = {}
    matrix = np.zeros((rows.rows, len(screener.feature_name())))
    columns = (rows[name].tolist() for name in ("event_time", "amount", "card_id", "terminal_id"))
    for row, (time_ms, amount, card, terminal) in enumerate(zip(*columns, strict=True)):
        counts, sums = add(terminals.setdefault(terminal, []), time_ms, amount)
        of_terminal = [*counts, *means(counts, sums)] if with_terminals else [0.0] * len(TERMINAL_FEATURES)
        of_card = cards.setdefault(card, Card([], [])).features(time_ms, amount)
        matrix[row, feature_columns] = [*transaction_features(time_ms, amount), *of_terminal, *of_card]
    raw = screener.predict(matrix, raw_score=True)
    return np.array([probability(calibration, score) for score in raw])


def send(broker: Broker, topic: str, rows: ColumnBatch) -> None:
    schema = load_bundle(SHIPPED_BUNDLE).schema
    producer = make_producer(KafkaSettings(bootstrap=broker.bootstrap))
    producer.send_many(topic, message_keys(rows["card_id"]), codec("json", schema.fields, 65_536).encode(rows))
    producer.close(10.0)


def read_decisions(broker: Broker, topic: str, count: int) -> list[Decision]:
    """The topic's first `count` decisions, and those that follow within half a second."""
    values: list[bytes | None] = []
    with closing(make_consumer(KafkaSettings(bootstrap=broker.bootstrap), None)) as consumer:
        consumer.assign(consumer.partitions_for(topic))
        give_up_s = time.monotonic() + WAIT_S_MAX
        while len(values) < count and time.monotonic() < give_up_s:
            values += [value for batch in consumer.poll(0.1, 10_000) for value in batch.values]
        values += [value for batch in consumer.poll(0.5, 10_000) for value in batch.values]
    return [decode_decision(value or b"", "json") for value in values]


@pytest.mark.kafka
@pytest.mark.triton
@pytest.mark.long
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_each_transaction_gets_a_single_decision_also_after_a_restart(
    peer: Peer,
    broker: Broker,
    triton_server: LocalTriton,
    rows: ColumnBatch,
    new_topic: Callable[..., str],
    tmp_path: Path,
) -> None:
    if (why := peer.missing()) is not None:
        pytest.skip(f"{peer.name}: {why}")
    transactions = new_topic()
    with triton_server:
        work = Work(
            bootstrap=broker.bootstrap,
            transactions=transactions,
            decisions=new_topic(),
            group=transactions,
            bundle=SHIPPED_BUNDLE,
            triton_grpc=triton_server.grpc_url,
            triton_http=triton_server.http_url,
            out=tmp_path,
            escalate_share=SHARE,
        )
        send(broker, transactions, rows.take(np.arange(ROWS - 1)))
        with peer.run(work) as process:
            process.wait_ready()
            read_decisions(broker, work.decisions, ROWS - 1)
            process.check_running()
        send(broker, transactions, rows.take(np.arange(ROWS - 1, ROWS)))
        with peer.run(work):
            decisions = read_decisions(broker, work.decisions, ROWS)
    ids = Counter(decision.decision_id for decision in decisions)
    assert ids == {f"{transactions}-0-{row}": 1 for row in range(ROWS)}
    assert [decision.transaction_id for decision in decisions] == rows["transaction_id"].tolist()
    expected = screened_offline(rows, peer.name not in WITHOUT_TERMINALS)
    comparable = ROWS - 1 if peer.name in WITHOUT_STORE else ROWS
    scores = [decision.screener_score for decision in decisions]
    assert scores[:comparable] == pytest.approx(expected[:comparable].tolist(), rel=1e-6)
    escalated = [decision for decision in decisions if decision.stage == "deep"]
    assert 0.3 * SHARE < len(escalated) / ROWS < 3 * SHARE
    assert all(decision.latency_ms.deep > 0 and decision.score != decision.screener_score for decision in escalated)
    assert not any(decision.degraded for decision in decisions)


@pytest.mark.kafka
def test_a_peer_that_cannot_start_raises_its_reason_as_a_line(
    broker: Broker, new_topic: Callable[..., str], tmp_path: Path
) -> None:
    topic = new_topic()
    work = Work(
        bootstrap=broker.bootstrap,
        transactions=topic,
        decisions=topic,
        group=topic,
        bundle=tmp_path / "none",
        triton_grpc="127.0.0.1:1",
        triton_http="http://127.0.0.1:1",
        out=tmp_path,
    )
    with peer_named("plain-loop").run(work) as process, pytest.raises(LocalPartError, match=r"policy\.json") as raised:
        process.wait_ready()
    assert len(str(raised.value).splitlines()) == 1
