"""The simulator finds bugs: each deliberate one below is found within a bounded number of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from bench.faults.run import simulate
from cascade.columns import ColumnBatch, Float64, Int64
from cascade.engine import Engine
from cascade.errors import BrokerError, CommitUnknownError
from cascade.features import FeatureEngine
from streaming.clients import FetchedBatch, Partition
from streaming.duplicates import FirstDecisions
from streaming.escalations import Escalations, Outcome
from streaming.in_flight import DeepCall
from streaming.labels import LabelFollower
from streaming.offsets import Decided
from streaming.outbox import AtLeastOnceOutbox, ExactlyOnceOutbox, Sent
from streaming.partitions import Accepted, OwnedPartition, Phase
from streaming.publisher import Publisher
from streaming.recovery import Recovery
from streaming.snapshots import Positions, SnapshotStore
from streaming.worker import Worker

Mutation = Callable[[pytest.MonkeyPatch], None]
SCHEDULES_MAX = 400
pytestmark = pytest.mark.slow


def commit_before_the_decisions_are_kept(patch: pytest.MonkeyPatch) -> None:
    send_many = AtLeastOnceOutbox.send_many

    def mutated(
        self: AtLeastOnceOutbox, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent
    ) -> None:
        self._on_decided(sent)
        send_many(self, topic, keys, values, replace(sent, offsets={}))

    patch.setattr(AtLeastOnceOutbox, "send_many", mutated)


def commit_offsets_beside_the_transaction(patch: pytest.MonkeyPatch) -> None:
    advance = ExactlyOnceOutbox.advance

    def mutated(self: ExactlyOnceOutbox, force: bool = False) -> None:
        if self._in_transaction and (force or self._clock.monotonic() >= self._due_s):
            for sent in self._in_transaction:
                self._on_decided(sent)
                sent.offsets.clear()
            self._consumer.commit(self._progress())
        advance(self, force)

    patch.setattr(ExactlyOnceOutbox, "advance", mutated)


def take_what_is_in_flight_for_decided_on_revoke(patch: pytest.MonkeyPatch) -> None:
    revoked = Worker._on_revoked

    def mutated(self: Worker, partitions: list[Partition]) -> None:
        self._drop(partitions)
        for partition in partitions:
            tracker = self._recovery.owned[partition].tracker
            tracker.decided(np.array(sorted(set(tracker._waiting) - tracker._decided), np.int64))
        revoked(self, partitions)

    patch.setattr(Worker, "_on_revoked", mutated)


def forget_what_is_decided_ahead(patch: pytest.MonkeyPatch) -> None:
    class Forgetful(Decided):
        @classmethod
        def from_commit(cls, offset: int, metadata: str) -> Decided:
            return Decided(offset)

    patch.setattr("streaming.recovery.Decided", Forgetful)


def publish_a_late_answer(patch: pytest.MonkeyPatch) -> None:
    collect = Escalations.collect
    late: list[tuple[Escalations, Outcome]] = []

    def await_late(self: Escalations, call: DeepCall) -> None:
        def publish(answer: Future[Float64]) -> None:
            if answer.exception() is None:
                late.append(
                    (self, Outcome(call.rows, "deep", self._policy.deep.probability(answer.result()), None, 0.0))
                )

        call.future.add_done_callback(publish)

    def mutated(self: Escalations) -> list[Outcome]:
        ours = [outcome for one, outcome in late if one is self]
        late[:] = [pair for pair in late if pair[0] is not self]
        return collect(self) + ours

    patch.setattr(Escalations, "_await_late", await_late)
    patch.setattr(Escalations, "collect", mutated)


def fold_nothing_in_a_replay(patch: pytest.MonkeyPatch) -> None:
    def mutated(self: Engine, batch: ColumnBatch, sources: Int64 | None = None) -> None:
        """Nothing."""

    patch.setattr(Engine, "fold", mutated)


def take_a_snapshot_that_is_ahead_of_the_commit(patch: pytest.MonkeyPatch) -> None:
    candidates = SnapshotStore.candidates

    def mutated(self: SnapshotStore, committed: Positions, beginnings: Positions) -> dict[Partition, list[str]]:
        return candidates(self, dict.fromkeys(committed, 1 << 40), beginnings)

    patch.setattr(SnapshotStore, "candidates", mutated)


def send_on_after_a_commit_of_unknown_outcome(patch: pytest.MonkeyPatch) -> None:
    advance = ExactlyOnceOutbox.advance

    def mutated(self: ExactlyOnceOutbox, force: bool = False) -> None:
        try:
            advance(self, force)
        except CommitUnknownError:
            self._failure = None
            self._in_transaction.clear()

    patch.setattr(ExactlyOnceOutbox, "advance", mutated)


def go_on_where_the_group_says_instead_of_where_the_state_stands(patch: pytest.MonkeyPatch) -> None:
    def replay(self: Recovery, one: OwnedPartition) -> None:
        one.phase = Phase.REPLAYING
        one.next = self._consumer.position(one.partition)
        self._consumer.resume([one.partition])

    patch.setattr(Recovery, "_replay", replay)


def keep_the_state_of_lost_partitions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FeatureEngine, "forget", lambda self, source: None)


def forget_first_decisions_with_the_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FirstDecisions, "absorb", lambda self, arrays, partitions: None)


def let_everything_wait(patch: pytest.MonkeyPatch) -> None:
    made = Worker._make_outbox

    def mutated(self: Worker) -> object:
        outbox = made(self)
        self._in_flight_max = 1 << 30
        return outbox

    patch.setattr(Worker, "_make_outbox", mutated)


def count_decisions_when_they_are_sent(patch: pytest.MonkeyPatch) -> None:
    send_many = ExactlyOnceOutbox.send_many

    def mutated(
        self: ExactlyOnceOutbox, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent
    ) -> None:
        send_many(self, topic, keys, values, replace(sent, path=""))
        self._on_acknowledged(sent)

    patch.setattr(ExactlyOnceOutbox, "send_many", mutated)


def dead_letter_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "reject", lambda self, fetched, rejects: None)


def pass_over_gaps(patch: pytest.MonkeyPatch) -> None:
    """Whatever a fetch holds is taken, wherever it begins."""

    def mutated(self: OwnedPartition, fetched: FetchedBatch) -> Accepted:
        self.next = int(fetched.offsets[-1]) + 1
        return Accepted(fetched)

    patch.setattr(OwnedPartition, "accept", mutated)


def never_rewind_the_labels(patch: pytest.MonkeyPatch) -> None:
    rewind = LabelFollower.rewind

    def mutated(self: LabelFollower, positions: Mapping[Partition, int] | None = None) -> None:
        ends = self._consumer.end_offsets(self.partitions)
        rewind(self, positions if positions is not None else ends)

    patch.setattr(LabelFollower, "rewind", mutated)


def mend_a_lost_partition_in_place(patch: pytest.MonkeyPatch) -> None:
    """The open transaction goes on although it holds decisions of a partition that another owns."""

    def mutated(self: ExactlyOnceOutbox, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._committed.pop(partition, None)

    patch.setattr(ExactlyOnceOutbox, "forget", mutated)


def commit_after_failed_deliveries(patch: pytest.MonkeyPatch) -> None:
    advance = AtLeastOnceOutbox.advance

    def mutated(self: AtLeastOnceOutbox, force: bool = False) -> None:
        try:
            advance(self, force)
        except BrokerError:
            _, sent = self._unacknowledged.popleft()
            self._on_decided(sent)

    patch.setattr(AtLeastOnceOutbox, "advance", mutated)


MUTATIONS = [
    one for name, one in list(globals().items()) if callable(one) and getattr(one, "__module__", "") == __name__
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.__name__)
def test_a_mutation_of_the_worker_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    for seed in range(SCHEDULES_MAX):
        outcome = simulate(seed)
        if outcome.problems:
            print(f"caught by seed {seed}: {outcome.problems[0]}")
            return
    pytest.fail(f"not caught within {SCHEDULES_MAX} schedules")
