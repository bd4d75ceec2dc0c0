"""Exactly once, and once again: kills with transactions, duplicates in the input, workers that share a group."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack

import msgspec
import pytest

from bench.embedded import ServiceProcess, new_names, play_file, wait_for_decisions
from cascade.bundle import Bundle
from cascade.config import Config, load_config
from cascade.frames import LabelledData
from stages.offline import OfflineScores
from tests.e2e.asking import producing
from tests.e2e.test_worker import (  # the fixtures are used by name
    BACKLOG,
    KILLED_AT_COMMIT,
    ConfigMaker,
    bundle,
    check_scores,
    committed,
    data,
    decided_offsets,
    decisions_in,
    new_config,
    offline,
    offset_of,
    read_all,
)
from tests.timing import wait_until

__all__ = ["bundle", "data", "new_config", "offline"]
pytestmark = [pytest.mark.kafka]
IN_PROCESS = {"deep": {"backend": "onnxruntime"}}
ROWS = 1_500


@pytest.fixture(scope="module")
def killed(new_config: ConfigMaker, data: LabelledData) -> Config:
    """A service with exactly-once delivery that was killed twice with a transaction open, and then finished."""
    part = ROWS // 3
    worker = {"batch_rows_max": 10, "transaction_interval_ms": 60}
    path = new_config(
        BACKLOG | IN_PROCESS | {"worker": worker, "kafka": {"instance": "only"}, "delivery": "exactly-once"}
    )
    config = load_config(path)
    for until in (part, 2 * part):
        play_file(config, data, slice(until - part, until), None, lambda _: None)
        with ServiceProcess(path, KILLED_AT_COMMIT) as service:
            wait_until(lambda: service.pid is None, "the kill")
        assert decided_offsets(config) == set(), "no transaction was committed"
    play_file(config, data, slice(2 * part, ROWS), None, lambda _: None)
    with ServiceProcess(path) as service:
        wait_until(lambda: len(decided_offsets(config)) == ROWS, "all decided")
        service.wait_ready()
        service.stop()
    return config


def test_exactly_once_decides_every_transaction_once_through_kills(
    killed: Config, offline: OfflineScores, bundle: Bundle
) -> None:
    decisions = decisions_in(killed)
    assert sorted(int(decision.transaction_id) for decision in decisions) == list(range(ROWS))
    assert committed(killed) == ROWS
    check_scores(decisions, offline, bundle)


def test_what_the_killed_service_had_sent_stays_invisible(killed: Config) -> None:
    offsets = [record.offset for record in read_all(killed, killed.kafka.topics.decisions)]
    assert offsets[0] > 1, "the log begins with the decisions of the transactions that were aborted"


# --- what comes again -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repeated(new_config: ConfigMaker, data: LabelledData) -> tuple[Config, float | None]:
    """Transactions, the same bytes again, a restart by kill, and again; and ids used again for other amounts."""
    path = new_config(BACKLOG | IN_PROCESS)
    config = load_config(path)
    rows = 400
    play_file(config, data, slice(0, rows), None, lambda _: None)
    originals = read_all(config, config.kafka.topics.transactions)

    def again(count: int, altered: bool = False) -> None:
        with producing(config) as producer:
            for record in originals[:count]:
                value = record.value
                if altered:
                    value = msgspec.json.encode(msgspec.json.decode(value or b"") | {"amount": 12_345.0})
                producer.send(config.kafka.topics.transactions, record.key, value)

    with ServiceProcess(path) as service:
        again(rows)
        wait_for_decisions(service, 2 * rows, lambda _: None)
        wait_until(lambda: committed(config) == 2 * rows, "the commit", 30)
        service.kill()
    with ServiceProcess(path) as service:
        again(rows)
        wait_for_decisions(service, 3 * rows, lambda _: None)
        again(50, altered=True)
        wait_for_decisions(service, 3 * rows + 50, lambda _: None)
        return config, service.stop().duplicate_share


def test_a_transaction_that_comes_again_gets_its_first_decision_again(
    repeated: tuple[Config, float | None],
) -> None:
    decisions = decisions_in(repeated[0])
    first = {decision.transaction_id: decision for decision in decisions if offset_of(decision) < 400}
    assert len(first) == 400
    assert not any(decision.duplicate for decision in first.values())
    again = [decision for decision in decisions if 400 <= offset_of(decision) < 1_200]
    assert len(again) == 800, "repeats before and after the kill"
    for decision in again:
        known = first[decision.transaction_id]
        assert decision.duplicate
        assert decision.first_decision_id == known.decision_id
        for field in ("decision", "score", "stage", "screener_score", "bundle", "degraded", "degraded_cause"):
            assert getattr(decision, field) == getattr(known, field), field


def test_an_id_that_comes_with_another_amount_is_scored(repeated: tuple[Config, float | None]) -> None:
    altered = [decision for decision in decisions_in(repeated[0]) if offset_of(decision) >= 1_200]
    assert len(altered) == 50
    assert not any(decision.duplicate for decision in altered)


def test_the_ledger_has_the_hit_rate(repeated: tuple[Config, float | None]) -> None:
    assert repeated[1] == pytest.approx(400 / 450)


# --- several workers ------------------------------------------------------------------------------------------------


def test_workers_share_partitions_and_what_they_know_of_terminals(
    new_config: ConfigMaker, data: LabelledData, bundle: Bundle
) -> None:
    """Two workers, four partitions: all decided once, and terminals counted across both."""
    shared = {"terminals": {"share": True, "interval_s": 0.2}}
    settings, names = BACKLOG | IN_PROCESS | shared | {"delivery": "exactly-once"}, new_names()
    first, second = (
        new_config(settings | {"kafka": names | {"instance": name}}, partitions=4) for name in ("first", "second")
    )
    config, half, rows = load_config(first), 1_000, 2_000
    with ExitStack() as stack:
        service = stack.enter_context(ServiceProcess(first))
        service.wait_ready()
        stack.enter_context(ServiceProcess(second))
        wait_until(
            lambda: second.with_suffix(".log").exists() and "partition live" in second.with_suffix(".log").read_text(),
            "the second worker has partitions",
            60,
        )
        play_file(config, data, slice(0, half), 500, lambda _: None)
        wait_for_decisions(service, half, lambda _: None)
        time.sleep(1)
        play_file(config, data, slice(half, rows), 500, lambda _: None)
        wait_until(lambda: len(decisions_in(config)) >= rows, "all decided", 60)
        summaries = read_all(config, config.kafka.topics.summaries)
    decisions = decisions_in(config)
    assert Counter(int(decision.transaction_id) for decision in decisions) == Counter(range(rows))
    by_partition = Counter(decision.decision_id.rsplit("-", 2)[1] for decision in decisions)
    assert set(by_partition) == {"0", "1", "2", "3"}
    assert len(summaries) > 100
