"""The fault simulator finds bugs: each mutation of the worker below breaks a promise in some schedule.

Each mutation names the breach and seeds whose schedules have shown it. A change of the worker can move the breach to
other schedules; the failure then names a seed that a search has found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from bench.faults.run import simulate
from cascade.columns import Float64, Int64
from cascade.engine import Engine, Screened
from cascade.errors import BrokerError, CommitUnknownError
from cascade.features import FeatureEngine
from cascade.ledger import Path
from cascade.policy import Policy
from streaming.kafka import FetchedBatch, Partition
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.escalate import DeepCall, Escalations
from streaming.pipeline.offsets import Decided
from streaming.pipeline.screen import screen
from streaming.pipeline.steps import Pipeline
from streaming.pipeline.table import Table
from streaming.worker.labels import LabelFollower
from streaming.worker.loop import Worker
from streaming.worker.outbox import Acknowledged, AtLeastOnceOutbox, ExactlyOnceOutbox, Offsets, _Message
from streaming.worker.partitions import Accepted, OwnedPartition, Phase
from streaming.worker.recovery import Recovery
from streaming.worker.snapshots import Positions, SnapshotStore

SCHEDULES_MAX = 400
Mutate = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """A mutation by name, a part of the text of the breach, and seeds that have shown it."""

    name: str
    mutate: Mutate
    breach: str
    seeds: tuple[int, ...]


CASES: list[Case] = []


def caught(breach: str, *seeds: int) -> Callable[[Mutate], Mutate]:
    def add(mutate: Mutate) -> Mutate:
        CASES.append(Case(mutate.__name__, mutate, breach, seeds))
        return mutate

    return add


def method(owner: type, name: str, breach: str, *seeds: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a case in which the decorated function replaces a method, which it gets as its first argument."""
    original = getattr(owner, name)

    def add(mutated: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(self: Any, *arguments: Any, **named: Any) -> Any:
            return mutated(original, self, *arguments, **named)

        CASES.append(Case(mutated.__name__, lambda patch: patch.setattr(owner, name, replaced), breach, seeds))
        return mutated

    return add


@method(AtLeastOnceOutbox, "collect", "was lost", 108, 127, 129)
def commit_before_the_decisions_are_acknowledged(
    collect: Any, self: Any, force: bool = False, quiet: bool = False
) -> list[Acknowledged]:
    early = [Acknowledged(replace(sent, path=""), None) for _, sent in self._unacknowledged]
    return [*early, *collect(self, force, quiet)]


@method(ExactlyOnceOutbox, "commit", "was lost", 30, 32, 36)
def commit_offsets_beside_the_transaction(
    commit: Any, self: Any, progress: Callable[[], Offsets], force: bool = False
) -> bool:
    if self._committing:
        self._consumer.commit(progress())
    return bool(commit(self, progress, force))


@method(Worker, "_on_revoked", "was lost", 6, 16, 61)
def commit_in_flight_records_on_revoke(revoked: Any, self: Any, partitions: list[Partition]) -> None:
    self._pipeline.drop(partitions)
    for partition in partitions:
        tracker = self._recovery.owned[partition].tracker
        tracker.decided(tracker.undecided)
    revoked(self, partitions)


@caught("was decided 2 times", 9, 53, 62)
def ignore_the_commit_metadata(patch: pytest.MonkeyPatch) -> None:
    class Forgetful(Decided):
        @classmethod
        def from_commit(cls, offset: int, metadata: str) -> Decided:
            return Decided(offset)

    patch.setattr("streaming.worker.recovery.Decided", Forgetful)


@caught("was decided 2 times", 10, 59, 84)
def publish_a_late_answer(patch: pytest.MonkeyPatch) -> None:
    collect = Escalations.collect
    late: list[tuple[Escalations, Table]] = []

    def count_when_late(self: Escalations, call: DeepCall) -> None:
        def publish(answer: Future[Float64]) -> None:
            if answer.exception() is None:
                call.table.rows["score"] = self._policy.combined.probability(call.screener_raw, answer.result())
                late.append((self, call.table))

        call.future.add_done_callback(publish)

    def mutated(self: Escalations) -> list[Table]:
        published = [table for escalations, table in late if escalations is self]
        late[:] = [pair for pair in late if pair[0] is not self]
        return collect(self) + published

    patch.setattr(Escalations, "_count_when_late", count_when_late)
    patch.setattr(Escalations, "collect", mutated)


@method(Engine, "fold", "state: of worker", 0, 3, 5)
def fold_nothing_in_a_replay(*_: Any) -> None:
    """Nothing."""


@method(SnapshotStore, "candidates", "was lost", 56, 60, 80)
def restore_a_snapshot_ahead_of_the_commit(
    candidates: Any, self: Any, committed: Positions, beginnings: Positions
) -> Any:
    return candidates(self, dict.fromkeys(committed, 1 << 40), beginnings)


@method(ExactlyOnceOutbox, "commit", "was decided 2 times", 157, 352, 359)
def continue_after_a_commit_of_unknown_outcome(
    commit: Any, self: Any, progress: Callable[[], Offsets], force: bool = False
) -> bool:
    try:
        return bool(commit(self, progress, force))
    except CommitUnknownError:
        self._failure, self._open = None, False
        self._messages.clear()
        return True


@method(Recovery, "_replay", "state: of worker", 0, 3, 5)
def resume_at_the_commit_instead_of_the_snapshot(_: Any, self: Any, owned: OwnedPartition) -> None:
    owned.phase = Phase.REPLAYING
    owned.next = self._consumer.position(owned.partition)
    self._consumer.resume([owned.partition])


@method(Recovery, "lose", "waits for its state", 186, 243, 433)
def wait_for_partitions_that_were_lost_while_they_were_rebuilt(
    lose: Any, self: Any, partitions: list[Partition]
) -> None:
    self._show_progress = lambda: None
    lose(self, partitions)
    del self._show_progress


@method(FeatureEngine, "forget", "state: of worker", 1, 27, 29)
def keep_the_state_of_lost_partitions(*_: Any) -> None:
    """Nothing."""


@method(FirstDecisions, "absorb", "must repeat", 48, 50, 63)
def lose_first_decisions_in_a_restart(*_: Any) -> None:
    """Nothing."""


@method(Worker, "_make_outbox", "in flight, at most", 7, 16, 52)
def ignore_the_limit_of_records_in_flight(made: Any, self: Any) -> Any:
    outbox = made(self)
    self._in_flight_max = 1 << 30
    return outbox


@method(Pipeline, "_send", "decisions in the ledger", 5, 9, 10)
def count_decisions_when_they_are_sent(send: Any, self: Any, table: Table, chosen: Int64, path: Path) -> None:
    self._ledger.record_decisions(path, np.zeros(len(chosen)), "error" if path == "degraded" else None)
    send(self, table, chosen, "")


@method(Pipeline, "reject", "the lag remains", 0, 1, 2)
def dead_letter_nothing(*_: Any) -> None:
    """Nothing."""


@method(OwnedPartition, "accept", "was lost", 2, 7, 8)
def ignore_gaps_between_fetches(_: Any, self: Any, fetched: FetchedBatch) -> Accepted:
    self.next = int(fetched.offsets[-1]) + 1
    return Accepted(fetched)


@method(LabelFollower, "rewind", "for labels differs", 0, 10, 34)
def never_rewind_the_labels(rewind: Any, self: Any, positions: Mapping[Partition, int] | None = None) -> None:
    ends = self._consumer.end_offsets(self.partitions)
    rewind(self, positions if positions is not None else ends)


@method(ExactlyOnceOutbox, "forget", "was decided 2 times", 595, 1572, 1714)
def keep_the_transaction_after_a_partition_is_lost(_: Any, self: Any, partitions: Sequence[Partition]) -> None:
    for partition in partitions:
        self.committed.pop(partition, None)


@method(_Message, "without", "was decided 2 times", 37, 91, 111)
def send_the_decisions_of_lost_partitions_again(_: Any, self: Any, partitions: Sequence[Partition]) -> Any:
    return self


@method(ExactlyOnceOutbox, "_refused", "was lost", 115, 121, 164)
def send_nothing_again_after_a_refusal(_: Any, self: Any) -> None:
    self._messages, self._rows = [], 0


@method(ExactlyOnceOutbox, "commit", "decisions in the ledger", 23, 37, 39)
def count_a_refused_transaction(commit: Any, self: Any, progress: Callable[[], Offsets], force: bool = False) -> bool:
    committing = self._committing
    commit(self, progress, force)
    return bool(committing)


@method(AtLeastOnceOutbox, "collect", "was lost", 74, 129, 220)
def commit_after_a_failed_delivery(
    collect: Any, self: Any, force: bool = False, quiet: bool = False
) -> list[Acknowledged]:
    try:
        found: list[Acknowledged] = collect(self, force, quiet)
    except BrokerError:
        _, sent = self._unacknowledged.popleft()
        return [Acknowledged(sent, 0.0)]
    return found


@caught("and its budget counted", 2, 3, 4)
def escalate_more_than_the_budget_chose(patch: pytest.MonkeyPatch) -> None:
    def mutated(*arguments: Any) -> tuple[Screened, Int64, Int64, Float64]:
        screened, clear, escalated, queue_s = screen(*arguments)
        return screened, clear[1:], np.concatenate([escalated, clear[:1]]), queue_s

    patch.setattr("streaming.pipeline.steps.screen", mutated)


@caught("transactions of the band, with a budget", 8, 9, 12)
def escalate_less_than_the_budget_chose(patch: pytest.MonkeyPatch) -> None:
    def mutated(*arguments: Any) -> tuple[Screened, Int64, Int64, Float64]:
        screened, clear, escalated, queue_s = screen(*arguments)
        return screened, np.sort(np.concatenate([clear, escalated])), escalated[:0], queue_s

    patch.setattr("streaming.pipeline.steps.screen", mutated)


@caught("escalated, though it is outside the band", 5, 6, 8)
def forget_the_centre_of_the_band(patch: pytest.MonkeyPatch) -> None:
    def mutated(policy: Policy, raw: Float64) -> tuple[Float64, Float64]:
        return policy.screener.probability(raw), raw

    patch.setattr("cascade.engine.judge", mutated)


def find(case: Case, seeds: Iterable[int]) -> int | None:
    """The first of the seeds whose schedule shows the breach."""
    for seed in seeds:
        if any(case.breach in problem for problem in simulate(seed).problems):
            return seed
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mutation_is_caught_by_a_schedule_that_the_worker_passes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(case, case.seeds) is None
    case.mutate(monkeypatch)
    found = find(case, case.seeds)
    assert found is not None, f"no breach {case.breach!r}; a seed with it: {find(case, range(SCHEDULES_MAX))}"
