"""The fault simulator finds bugs: each mutation of the worker below breaks a promise in some schedule.

Each mutation names the breach and seeds whose schedules have shown it. A change of the worker can move the breach to
other schedules; the long test then searches for other seeds, and prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Case:
    """A mutation, a part of the text of the breach, and seeds that have shown it."""

    mutate: Mutation
    breach: str
    seeds: tuple[int, ...]


CASES: list[Case] = []


def caught(breach: str, *seeds: int) -> Callable[[Mutation], Mutation]:
    def add(mutate: Mutation) -> Mutation:
        CASES.append(Case(mutate, breach, seeds))
        return mutate

    return add


@caught("was lost", 108, 127, 129)
def commit_before_the_decisions_are_acknowledged(patch: pytest.MonkeyPatch) -> None:
    send_many = AtLeastOnceOutbox.send_many

    def mutated(
        self: AtLeastOnceOutbox, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent
    ) -> None:
        self._on_decided(sent)
        send_many(self, topic, keys, values, replace(sent, offsets={}))

    patch.setattr(AtLeastOnceOutbox, "send_many", mutated)


@caught("was lost", 5, 9, 11)
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


@caught("was lost", 3, 14)
def commit_in_flight_records_on_revoke(patch: pytest.MonkeyPatch) -> None:
    revoked = Worker._on_revoked

    def mutated(self: Worker, partitions: list[Partition]) -> None:
        self._drop(partitions)
        for partition in partitions:
            tracker = self._recovery.owned[partition].tracker
            tracker.decided(np.array(sorted(set(tracker._waiting) - tracker._decided), np.int64))
        revoked(self, partitions)

    patch.setattr(Worker, "_on_revoked", mutated)


@caught("was decided 2 times", 9, 53, 62)
def ignore_the_commit_metadata(patch: pytest.MonkeyPatch) -> None:
    class Forgetful(Decided):
        @classmethod
        def from_commit(cls, offset: int, metadata: str) -> Decided:
            return Decided(offset)

    patch.setattr("streaming.recovery.Decided", Forgetful)


@caught("raised ValueError", 38, 55, 59)
def publish_a_late_answer(patch: pytest.MonkeyPatch) -> None:
    collect = Escalations.collect
    late: list[tuple[Escalations, Outcome]] = []

    def count_when_late(self: Escalations, call: DeepCall) -> None:
        def publish(answer: Future[Float64]) -> None:
            if answer.exception() is None:
                late.append(
                    (self, Outcome(call.rows, "deep", self._policy.deep.probability(answer.result()), None, 0.0))
                )

        call.future.add_done_callback(publish)

    def mutated(self: Escalations) -> list[Outcome]:
        published = [outcome for escalations, outcome in late if escalations is self]
        late[:] = [pair for pair in late if pair[0] is not self]
        return collect(self) + published

    patch.setattr(Escalations, "_count_when_late", count_when_late)
    patch.setattr(Escalations, "collect", mutated)


@caught("state: of worker", 0, 3, 5)
def fold_nothing_in_a_replay(patch: pytest.MonkeyPatch) -> None:
    def mutated(self: Engine, batch: ColumnBatch, partition_ids: Int64 | None = None) -> None:
        """Nothing."""

    patch.setattr(Engine, "fold", mutated)


@caught("was lost", 23, 30, 36)
def restore_a_snapshot_ahead_of_the_commit(patch: pytest.MonkeyPatch) -> None:
    candidates = SnapshotStore.candidates

    def mutated(self: SnapshotStore, committed: Positions, beginnings: Positions) -> dict[Partition, list[str]]:
        return candidates(self, dict.fromkeys(committed, 1 << 40), beginnings)

    patch.setattr(SnapshotStore, "candidates", mutated)


@caught("was decided 2 times", 30, 45, 98)
def continue_after_a_commit_of_unknown_outcome(patch: pytest.MonkeyPatch) -> None:
    advance = ExactlyOnceOutbox.advance

    def mutated(self: ExactlyOnceOutbox, force: bool = False) -> None:
        try:
            advance(self, force)
        except CommitUnknownError:
            self._failure = None
            self._in_transaction.clear()

    patch.setattr(ExactlyOnceOutbox, "advance", mutated)


@caught("state: of worker", 0, 3, 5)
def resume_at_the_commit_instead_of_the_snapshot(patch: pytest.MonkeyPatch) -> None:
    def replay(self: Recovery, owned: OwnedPartition) -> None:
        owned.phase = Phase.REPLAYING
        owned.next = self._consumer.position(owned.partition)
        self._consumer.resume([owned.partition])

    patch.setattr(Recovery, "_replay", replay)


@caught("state: of worker", 3, 15, 18)
def keep_the_state_of_lost_partitions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FeatureEngine, "forget", lambda self, partition_id: None)


@caught("must repeat", 48, 50, 63)
def lose_first_decisions_in_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FirstDecisions, "absorb", lambda self, arrays, partitions: None)


@caught("in flight, at most", 7, 16, 52)
def ignore_the_limit_of_records_in_flight(patch: pytest.MonkeyPatch) -> None:
    made = Worker._make_outbox

    def mutated(self: Worker) -> object:
        outbox = made(self)
        self._in_flight_max = 1 << 30
        return outbox

    patch.setattr(Worker, "_make_outbox", mutated)


@caught("decisions in the ledger", 5, 9, 10)
def count_decisions_when_they_are_sent(patch: pytest.MonkeyPatch) -> None:
    send_many = ExactlyOnceOutbox.send_many

    def mutated(
        self: ExactlyOnceOutbox, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent
    ) -> None:
        send_many(self, topic, keys, values, replace(sent, path=""))
        self._on_acknowledged(sent)

    patch.setattr(ExactlyOnceOutbox, "send_many", mutated)


@caught("the lag remains", 0, 1, 2)
def dead_letter_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "reject", lambda self, fetched, rejects: None)


@caught("was lost", 2, 7, 8)
def ignore_gaps_between_fetches(patch: pytest.MonkeyPatch) -> None:
    def mutated(self: OwnedPartition, fetched: FetchedBatch) -> Accepted:
        self.next = int(fetched.offsets[-1]) + 1
        return Accepted(fetched)

    patch.setattr(OwnedPartition, "accept", mutated)


@caught("for labels differs", 0, 10, 34)
def never_rewind_the_labels(patch: pytest.MonkeyPatch) -> None:
    rewind = LabelFollower.rewind

    def mutated(self: LabelFollower, positions: Mapping[Partition, int] | None = None) -> None:
        ends = self._consumer.end_offsets(self.partitions)
        rewind(self, positions if positions is not None else ends)

    patch.setattr(LabelFollower, "rewind", mutated)


@caught("was decided 2 times", 35, 351)
def keep_the_transaction_after_a_partition_is_lost(patch: pytest.MonkeyPatch) -> None:
    def mutated(self: ExactlyOnceOutbox, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._committed.pop(partition, None)

    patch.setattr(ExactlyOnceOutbox, "forget", mutated)


@caught("was lost", 60, 108, 127)
def commit_after_a_failed_delivery(patch: pytest.MonkeyPatch) -> None:
    advance = AtLeastOnceOutbox.advance

    def mutated(self: AtLeastOnceOutbox, force: bool = False) -> None:
        try:
            advance(self, force)
        except BrokerError:
            _, sent = self._unacknowledged.popleft()
            self._on_decided(sent)

    patch.setattr(AtLeastOnceOutbox, "advance", mutated)


def find(case: Case, seeds: Iterable[int]) -> int | None:
    """The first of the seeds whose schedule shows the breach."""
    for seed in seeds:
        if any(case.breach in problem for problem in simulate(seed).problems):
            return seed
    return None


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.mutate.__name__)


@each_case
def test_a_mutation_is_caught_by_a_schedule_that_the_worker_passes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(case, case.seeds) is None
    case.mutate(monkeypatch)
    assert find(case, case.seeds) is not None, f"no breach {case.breach!r}; the long test finds other seeds"


@pytest.mark.long
@each_case
def test_a_mutation_is_caught_by_a_search(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.mutate(monkeypatch)
    seed = find(case, range(SCHEDULES_MAX))
    assert seed is not None
    print(f"{case.mutate.__name__}: {case.breach!r} by seed {seed}")
