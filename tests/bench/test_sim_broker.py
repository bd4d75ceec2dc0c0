"""The simulated broker follows Kafka's rules; what the simulator finds depends on that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench.faults.broker import BrokerSettings, SimBroker
from bench.faults.clock import SimClock
from bench.faults.consumer import SimConsumer
from bench.faults.disk import DiskFaults, SimDisk, SimFiles, submitter
from bench.faults.model import ModelFaults, SimDeepStage
from bench.faults.network import NetworkFaults
from bench.faults.producer import SimProducer, SimTransactionalProducer
from bench.faults.world import Life, SimCrash, SimTooLong, World
from cascade.errors import (
    BrokerError,
    CommitUnknownError,
    DeepStageError,
    ProducerFencedError,
    TransactionAbortedError,
)
from cascade.protocols import DeepInputs
from streaming.kafka import Partition

IN, OUT = "transactions", "decisions"


class Rig:
    """A world with a broker, and clients that the test drives itself."""

    def __init__(self, partitions: int = 2, **faults: float) -> None:
        self.world = World(1)
        settings = BrokerSettings({IN: partitions, OUT: 1}, IN, faults=NetworkFaults(**faults))
        self.broker = SimBroker(self.world, settings)
        self.acknowledged: list[tuple[str, int]] = []
        self.callbacks: list[tuple[str, str, list[int]]] = []

    def life(self, name: str = "worker", **faults: float) -> Life:
        return Life(self.world, name, **faults)  # type: ignore[arg-type]

    def consumer(self, life: Life, instance: str = "") -> SimConsumer:
        consumer = SimConsumer(self.broker, life, True, instance)

        def note(event: str) -> Callable[[list[Partition]], None]:
            return lambda partitions: self.callbacks.append((life.name, event, [number for _, number in partitions]))

        consumer.subscribe([IN], note("assigned"), note("revoked"), note("lost"))
        return consumer

    def producer(self, life: Life) -> SimProducer:
        return SimProducer(self.broker, life, life.name, self._on_acknowledged)

    def transactional(self, life: Life, name: str = "id") -> SimTransactionalProducer:
        return SimTransactionalProducer(self.broker, life, life.name, self._on_acknowledged, name)

    def open_transaction(self, life: Life) -> tuple[SimConsumer, SimTransactionalProducer]:
        """A member of the group, and a producer that has sent "1" in a transaction that is still open."""
        consumer, producer = self.consumer(life), self.transactional(life)
        polled(consumer)
        producer.begin()
        producer.send(OUT, b"k", b"1")
        return consumer, producer

    def _on_acknowledged(self, topic: str, records: int) -> None:
        self.acknowledged.append((topic, records))

    def fill(self, partition: int, count: int) -> None:
        for _ in range(count):
            log = self.broker.logs[IN, partition]
            log.append(self.broker.now_ms, b"k", b"%d" % log.end)

    def readable(self, topic: str = OUT) -> list[bytes | None]:
        return [record.value for record in self.broker.logs[topic, 0].read(0, 1_000)[0]]


def polled(*consumers: SimConsumer, rounds: int = 6) -> list[list[tuple[int, int]]]:
    """Polls the consumers in turns; returns the (partition, offset) pairs that each of them got."""
    found: list[list[tuple[int, int]]] = [[] for _ in consumers]
    for _ in range(rounds):
        for consumer, positions in zip(consumers, found, strict=True):
            for batch in consumer.poll(0.01, 100):
                positions += [(batch.partition, offset) for offset in batch.offsets.tolist()]
    return found


# --- time and processes ---------------------------------------------------------------------------------------


def test_a_process_crashes_at_its_fault_point_and_does_nothing_more() -> None:
    rig = Rig()
    life = rig.life(crash_in=3)
    clock = SimClock(life)
    clock.sleep(1.0)
    clock.sleep(1.0)
    with pytest.raises(SimCrash):
        clock.sleep(1.0)
    with pytest.raises(SimCrash):
        rig.producer(life).send(OUT, b"k", b"v")
    assert rig.world.fired["crash"] == 1
    rig.world.wait(5.0)
    assert rig.readable() == []


def test_what_was_sent_before_the_kill_arrives() -> None:
    rig = Rig()
    life = rig.life()
    rig.producer(life).send(OUT, b"k", b"v")
    life.dead = True
    rig.world.wait(1.0)
    assert rig.readable() == [b"v"]


def test_a_run_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.faults.world.ROUNDS_MAX", 1_000)
    world = World(1)

    def again() -> None:
        world.at(0.0, again)

    again()
    with pytest.raises(SimTooLong):
        world.wait(1.0)


def test_a_fault_of_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a kind of fault"):
        World(1).fire("sunspots")  # type: ignore[arg-type]


# --- logs and transactions ------------------------------------------------------------------------------------


def test_an_open_transaction_hides_what_comes_after_it_until_it_ends() -> None:
    rig = Rig()
    writer, other = rig.transactional(rig.life("a"), "a"), rig.producer(rig.life("b"))
    writer.begin()
    writer.send(OUT, b"k", b"1")
    rig.world.wait(rig.world.now_s + 0.1)
    other.send(OUT, b"k", b"2")
    rig.world.wait(rig.world.now_s + 0.1)
    assert rig.readable() == []
    writer.abort()
    rig.world.wait(rig.world.now_s + 0.1)
    assert rig.readable() == [b"2"]
    # the aborted record and its marker occupy offsets
    assert rig.broker.logs[OUT, 0].end == 3


def test_a_transaction_commits_records_and_offsets_together_and_reports_them() -> None:
    rig = Rig()
    life = rig.life()
    consumer, producer = rig.consumer(life), rig.transactional(life)
    polled(consumer)
    producer.begin()
    producer.send_many(OUT, [b"k", b"k"], [b"1", b"2"])
    assert rig.acknowledged == []
    producer.commit({(IN, 0): (7, "ahead")}, consumer.member())
    assert consumer.committed([(IN, 0), (IN, 1)]) == {(IN, 0): (7, "ahead")}
    assert rig.readable() == [b"1", b"2"]
    assert rig.acknowledged == [(OUT, 2)]


def test_a_second_producer_of_the_id_fences_the_first_and_aborts_its_open_transaction() -> None:
    rig = Rig()
    first = rig.transactional(rig.life("a"))
    first.begin()
    first.send(OUT, b"k", b"1")
    rig.world.wait(rig.world.now_s + 0.1)
    second = rig.transactional(rig.life("b"))
    consumer = rig.consumer(rig.life("c"))
    polled(consumer)
    with pytest.raises(ProducerFencedError):
        first.commit({(IN, 0): (1, "")}, consumer.member())
    second.begin()
    second.send(OUT, b"k", b"2")
    second.commit({(IN, 0): (2, "")}, consumer.member())
    assert consumer.committed([(IN, 0)]) == {(IN, 0): (2, "")}
    assert rig.readable() == [b"2"]
    assert rig.world.fired["producer-fenced"] == 1


def test_a_transaction_of_an_earlier_generation_is_refused_and_aborted_and_its_producer_goes_on() -> None:
    rig = Rig()
    consumer, producer = rig.consumer(rig.life("a")), rig.transactional(rig.life("a"))
    polled(consumer)
    member = consumer.member()
    polled(consumer, rig.consumer(rig.life("b")))
    producer.begin()
    producer.send(OUT, b"k", b"1")
    assert not producer.commit({(IN, 0): (1, "")}, member)
    rig.world.wait(rig.world.now_s + 0.1)
    assert rig.readable() == []
    assert consumer.committed([(IN, 0)]) == {}
    assert rig.acknowledged == []
    producer.begin()
    producer.send(OUT, b"k", b"2")
    assert producer.commit({(IN, 0): (1, "")}, consumer.member())
    rig.world.wait(rig.world.now_s + 0.1)
    assert rig.readable() == [b"2"]


def test_a_member_learns_of_its_generation_a_moment_after_the_group_has_it() -> None:
    rig = Rig()
    consumer, producer = rig.open_transaction(rig.life("a"))
    group = rig.broker.group
    generation = group.generation
    group.rebalance()
    group.join(group.members[0], {(IN, 0), (IN, 1)})
    assert group.generation == generation + 1
    assert not producer.commit({(IN, 0): (1, "")}, consumer.member())
    assert rig.world.fired["offsets-refused"] == 1
    polled(consumer)
    producer.begin()
    assert producer.commit({(IN, 0): (1, "")}, consumer.member())


def test_a_transaction_that_is_open_for_too_long_is_aborted_and_its_producer_fenced() -> None:
    rig = Rig()
    consumer, producer = rig.open_transaction(rig.life("a"))
    rig.world.wait(rig.world.now_s + 10.0)
    polled(consumer)
    with pytest.raises(ProducerFencedError):
        producer.commit({(IN, 0): (1, "")}, consumer.member())
    assert rig.readable() == []
    assert rig.world.fired["transaction-timeout"] == 1


def test_a_commit_whose_reply_is_lost_was_applied() -> None:
    rig = Rig(commit_reply_lost_share=1.0)
    consumer, producer = rig.open_transaction(rig.life("a"))
    with pytest.raises(CommitUnknownError):
        producer.commit({(IN, 0): (1, "")}, consumer.member())
    assert rig.readable() == [b"1"]
    assert rig.acknowledged == []


@pytest.mark.parametrize(("new_producer", "committed"), [(False, [b"1", b"2"]), (True, [])])
def test_a_late_commit_commits_the_same_producers_next_transaction_but_not_a_new_producers(
    new_producer: bool, committed: list[bytes]
) -> None:
    rig = Rig(commit_late_share=1.0)
    life = rig.life("a")
    consumer, producer = rig.open_transaction(life)
    with pytest.raises(CommitUnknownError):
        producer.commit({(IN, 0): (1, "")}, consumer.member())
    if new_producer:
        producer = rig.transactional(life)
    producer.begin()
    producer.send(OUT, b"k", b"2")
    rig.world.wait(rig.world.now_s + 2.0)
    assert [record.value for record in rig.broker.logs[OUT, 0].committed_records()] == committed


def test_a_refused_commit_stores_nothing() -> None:
    rig = Rig(commit_refused_share=1.0)
    consumer, producer = rig.open_transaction(rig.life("a"))
    with pytest.raises(TransactionAbortedError):
        producer.commit({(IN, 0): (1, "")}, consumer.member())
    with pytest.raises(BrokerError):
        consumer.commit({(IN, 0): (1, "")})
    assert consumer.committed([(IN, 0)]) == {}
    assert rig.readable() == []


def test_a_failed_delivery_appends_a_part_and_nothing_that_was_sent_after_it() -> None:
    rig = Rig(undelivered_share=1.0)
    producer = rig.producer(rig.life())
    first = producer.send_many(OUT, [b"k"] * 3, [b"1", b"2", b"3"])
    producer.send(OUT, b"k", b"4")
    rig.world.wait(1.0)
    with pytest.raises(BrokerError):
        first.done()
    with pytest.raises(BrokerError):
        producer.send(OUT, b"k", b"5")
    assert rig.readable() == [b"1", b"2", b"3"][: len(rig.readable())]


def test_a_transaction_whose_records_do_not_arrive_in_time_is_not_committed() -> None:
    rig = Rig()
    consumer, producer = rig.consumer(rig.life("a")), rig.transactional(rig.life("a"))
    polled(consumer)
    connection = rig.broker.network.connections[-1]
    producer.begin()
    connection.clogged = True
    producer.send(OUT, b"k", b"1")
    with pytest.raises(TransactionAbortedError, match="the transaction is aborted"):
        producer.commit({(IN, 0): (1, "")}, consumer.member())
    connection.release()
    rig.world.wait(rig.world.now_s + 1.0)
    assert consumer.committed([(IN, 0)]) == {}
    assert rig.readable() == []


def test_fetching_committed_offsets_waits_for_open_transactions() -> None:
    rig = Rig()
    consumer = rig.consumer(rig.life("a"))
    polled(consumer)
    rig.broker.transactions.initialise("x")
    rig.broker.transactions.add_offsets("x", 0, {(IN, 0): (5, "")}, 1)
    rig.world.at(0.2, lambda: rig.broker.transactions.end("x", 0, commit=True))
    assert consumer.committed([(IN, 0)]) == {(IN, 0): (5, "")}
    rig.broker.transactions.add_offsets("x", 0, {(IN, 0): (6, "")}, 2)
    with pytest.raises(BrokerError, match="does not end"):
        consumer.committed([(IN, 0)])


# --- the group ------------------------------------------------------------------------------------------------


def test_a_second_member_gets_the_revoked_partition_and_the_first_reads_on_from_the_other() -> None:
    rig = Rig()
    first, second = rig.consumer(rig.life("a")), rig.consumer(rig.life("b"))
    polled(first)
    assert rig.callbacks == [("a", "assigned", [0, 1])]
    rig.fill(0, 2)
    rig.fill(1, 2)
    polled(first, second)
    assert rig.callbacks[1:] == [("a", "revoked", [1]), ("b", "assigned", [1])]
    assert (first.assignment(), second.assignment()) == ({(IN, 0)}, {(IN, 1)})


def test_a_frozen_member_is_dropped_and_loses_its_partitions() -> None:
    rig = Rig()
    silent, other = rig.life("a"), rig.life("b")
    first, second = rig.consumer(silent), rig.consumer(other)
    polled(first, second)
    member = first.member()
    silent.frozen = True
    rig.world.wait(rig.world.now_s + 5.0)
    polled(second)
    assert second.assignment() == {(IN, 0), (IN, 1)}
    silent.frozen = False
    with pytest.raises(BrokerError, match="generation"):
        first.commit({(IN, 0): (1, "")})
    assert first.dropped
    polled(first, second)
    assert ("a", "lost", [0]) in rig.callbacks
    assert first.member() != member


def test_a_static_member_replaces_its_namesake_without_a_rebalance_and_fences_it() -> None:
    rig = Rig()
    first = rig.consumer(rig.life("a"), "name")
    polled(first)
    generation = rig.broker.group.generation
    second = rig.consumer(rig.life("b"), "name")
    polled(second)
    assert rig.broker.group.generation == generation
    assert second.assignment() == {(IN, 0), (IN, 1)}
    with pytest.raises(BrokerError, match="fenced: another consumer"):
        first.poll(0.01, 1)
    with pytest.raises(BrokerError):
        first.commit({(IN, 0): (1, "")})


def test_a_member_that_leaves_can_commit_while_it_revokes_its_partitions() -> None:
    rig = Rig()
    life = rig.life("a")
    consumer = SimConsumer(rig.broker, life, True)

    def revoked(partitions: list[Partition]) -> None:
        consumer.commit(dict.fromkeys(partitions, (3, "")))

    consumer.subscribe([IN], lambda partitions: None, revoked)
    polled(consumer)
    consumer.close()
    assert rig.broker.group.offsets == {(IN, 0): (3, ""), (IN, 1): (3, "")}
    assert rig.broker.group.members == []


def test_a_partition_starts_at_its_committed_offset_and_skips_markers() -> None:
    rig = Rig(partitions=1)
    rig.fill(0, 2)
    log = rig.broker.logs[IN, 0]
    log.append(0, b"k", b"gone", (), 5)
    log.write_marker(5, False, 0)
    rig.fill(0, 1)
    rig.broker.group.commit({(IN, 0): (1, "")}, 1)
    consumer = rig.consumer(rig.life())
    assert polled(consumer) == [[(0, 1), (0, 4)]]
    assert consumer.position((IN, 0)) == 5


def test_reading_deleted_records_is_an_error() -> None:
    rig = Rig(partitions=1)
    rig.fill(0, 3)
    rig.broker.logs[IN, 0].beginning = 2
    consumer = rig.consumer(rig.life())
    polled(consumer, rounds=1)
    consumer.seek((IN, 0), 1)
    with pytest.raises(BrokerError, match="is gone"):
        polled(consumer)


def test_a_paused_partition_is_not_fetched_and_an_unassigned_one_has_no_position() -> None:
    rig = Rig()
    consumer = rig.consumer(rig.life())
    polled(consumer)
    consumer.pause([(IN, 0)])
    rig.fill(0, 1)
    rig.fill(1, 1)
    assert polled(consumer) == [[(1, 0)]]
    consumer.resume([(IN, 0)])
    assert polled(consumer) == [[(0, 0)]]
    with pytest.raises(BrokerError, match="not assigned"):
        consumer.position((OUT, 0))


# --- the network ----------------------------------------------------------------------------------------------


def test_a_clogged_connection_delays_all_records_in_order_until_it_is_released() -> None:
    rig = Rig()
    producer = rig.producer(rig.life())
    rig.broker.network.connections[-1].clogged = True
    first, second = producer.send(OUT, b"k", b"1"), producer.send(OUT, b"k", b"2")
    rig.world.wait(0.5)
    assert not first.done()
    assert rig.readable() == []
    rig.broker.network.release_all()
    rig.world.wait(1.0)
    assert first.done()
    assert second.done()
    assert rig.readable() == [b"1", b"2"]


def test_a_request_over_a_clogged_connection_times_out_and_is_served_when_it_is_released() -> None:
    rig = Rig()
    consumer = rig.consumer(rig.life())
    polled(consumer)
    rig.broker.network.connections[-1].clogged = True
    rig.world.at(1.2, rig.broker.network.release_all)
    with pytest.raises(BrokerError, match="no answer"):
        consumer.commit({(IN, 0): (1, "")})
    assert rig.broker.group.offsets == {}
    rig.world.wait(2.0)
    assert rig.broker.group.offsets == {(IN, 0): (1, "")}


def test_clogged_connections_are_released_one_by_one() -> None:
    rig = Rig()
    for number in range(4):
        rig.producer(rig.life(f"{number}"))
    network = rig.broker.network
    network.clog(4, 1.0)
    counts = []
    for _ in range(400):
        rig.world.wait(rig.world.now_s + 0.01)
        counts.append(sum(connection.clogged for connection in network.connections))
    assert [count for i, count in enumerate(counts) if i == 0 or counts[i - 1] != count] == [4, 3, 2, 1, 0]


def test_a_dead_process_sends_no_more_over_its_connections() -> None:
    rig = Rig()
    life = rig.life()
    rig.producer(life)
    rig.broker.network.cut(life)
    assert all(each.clogged for each in rig.broker.network.connections if each.life is life)


# --- disk and model -------------------------------------------------------------------------------------------


def test_a_full_disk_writes_nothing_and_a_torn_write_leaves_a_truncated_file() -> None:
    rig = Rig()
    files = SimFiles(SimDisk(rig.world, DiskFaults(full_share=1.0)), rig.life())
    with pytest.raises(OSError, match="no space left"):
        files.write("a", b"content")
    assert files.names() == []
    files = SimFiles(SimDisk(rig.world, DiskFaults(torn_share=1.0)), rig.life())
    files.write("a", b"content")
    assert len(files.read("a")) < 7
    with pytest.raises(FileNotFoundError):
        files.read("b")


def test_slow_work_ends_later_and_never_in_a_dead_process() -> None:
    rig = Rig()
    alive, dying, done = rig.life("a"), rig.life("b"), []
    disk = SimDisk(rig.world, DiskFaults(slow_share=1.0))
    future = submitter(disk, alive)(lambda: done.append("a"))
    submitter(disk, dying)(lambda: done.append("b"))
    assert not future.done()
    dying.dead = True
    rig.world.wait(5.0)
    assert done == ["a"]


def model_inputs(rows: int = 2) -> DeepInputs:
    return DeepInputs({"card_sequence": np.zeros((rows, 2, 3), np.float32)}, np.ones((rows, 4), np.float32))


def test_a_slow_model_gives_up_at_the_deadline() -> None:
    rig = Rig()
    answer = SimDeepStage(rig.life(), ModelFaults(slow_share=1.0)).submit(model_inputs(), 0.1)
    rig.world.wait(0.05)
    assert not answer.done()
    rig.world.wait(0.2)
    error = answer.exception(0)
    assert isinstance(error, DeepStageError)
    assert error.cause == "deadline"


def test_an_invalid_answer_is_an_error_and_never_a_score() -> None:
    rig = Rig()
    stage = SimDeepStage(rig.life(), ModelFaults(invalid_share=1.0))
    for _ in range(20):
        answer = stage.submit(model_inputs(), 1.0)
        rig.world.wait(rig.world.now_s + 2.0)
        error = answer.exception(0)
        assert isinstance(error, DeepStageError)
        assert error.cause == "error"


def test_a_late_answer_comes_after_the_deadline_and_a_second_one_changes_nothing() -> None:
    rig = Rig()
    late = SimDeepStage(rig.life(), ModelFaults(late_share=1.0)).submit(model_inputs(), 0.1)
    rig.world.wait(0.1)
    assert not late.done()
    rig.world.wait(1.0)
    assert late.result(0).shape == (2,)
    doubled = SimDeepStage(rig.life(), ModelFaults(doubled_share=1.0)).submit(model_inputs(), 0.1)
    first = doubled.result(0).tolist()
    rig.world.wait(rig.world.now_s + 1.0)
    assert doubled.result(0).tolist() == first
