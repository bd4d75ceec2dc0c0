"""A batch over replicas whose requests end when the test says so: first and second requests, and abandoned ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from cascade.errors import DeepStageError
from cascade.protocols import DeepInputs
from stages.deep import batch_call as module
from stages.deep.batch_call import ABANDONED_MAX, BatchCall, Outcome, Requests
from stages.deep.grpc_channel import GrpcCall
from stages.deep.replicas import Address, Replica, Replicas
from stages.deep.triton_connection import ReplicaUnavailableError

ROW = DeepInputs({"card_sequence": np.zeros((1, 1, 1), np.float32)}, np.zeros((1, 1), np.float32))
FULL = DeepStageError("queue-full", "full")
GONE = ReplicaUnavailableError("error", "gone")


class Parts:
    """A stage's requests to some replicas. `sent`: replica, channel and end of each request; `cancelled`: how many."""

    def __init__(self, replicas: int = 1, hedge_s: float = 0.0) -> None:
        self.replicas: Replicas[Any] = Replicas(connect=lambda _: self, chance=lambda: 0.0)
        addresses = [Address(f"10.0.0.{number}", 8001, "triton") for number in range(replicas)]
        self.all: list[Replica[Any]] = self.replicas.update(addresses)
        for replica in self.all:
            self.replicas.passed(replica)
        self.gone: list[Replica[Any]] = []
        self.requests = Requests("triton:8001", self.replicas, hedge_s, self.gone.append, lambda: "no replica")
        self.sent: list[tuple[Callable[[Outcome], None], int]] = []
        self.cancelled = 0
        self.outcomes: list[Outcome] = []

    def start(self, inputs: DeepInputs, queue_s: float, ended: Callable[[Outcome], None], channel: int) -> GrpcCall:
        self.sent.append((ended, channel))
        return len(self.sent)

    def cancel(self, call: GrpcCall, channel: int) -> None:
        self.cancelled += 1

    def call(self, timeout_s: float = 60.0) -> BatchCall:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        made = BatchCall(self.requests, ROW, deadline_s, self.outcomes.append)
        made.start()
        return made

    def end(self, request: int, outcome: Outcome | float) -> None:
        self.sent[request][0](np.array([outcome]) if isinstance(outcome, float) else outcome)

    def only_outcome(self) -> str:
        (outcome,) = self.outcomes
        return str(outcome) if isinstance(outcome, DeepStageError) else str(outcome.tolist())


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ([(0, 1.0), (1, 2.0)], "[1.0]"),
        ([(1, 2.0), (0, 1.0)], "[2.0]"),
        ([(0, FULL), (1, 2.0)], "[2.0]"),
        ([(1, FULL), (0, 1.0)], "[1.0]"),
        ([(0, FULL), (1, GONE)], "gone"),
        ([(1, GONE), (0, FULL)], "full"),
    ],
)
def test_of_two_requests_the_first_answer_counts_and_a_failure_only_where_both_fail(
    ends: list[tuple[int, float | DeepStageError]], outcome: str
) -> None:
    async def test() -> None:
        parts = Parts(hedge_s=0.001)
        parts.call()
        await until(lambda: len(parts.sent) == 2)
        # with one replica, over the other connection
        assert [channel for _, channel in parts.sent] == [0, 1]
        assert parts.requests.hedged == 1
        for request, end in ends:
            parts.end(request, end)
        assert parts.only_outcome() == outcome
        assert (parts.requests.abandoned, parts.requests.late_answers, parts.cancelled) == ({}, 0, 0)
        assert (parts.all[0].outstanding, parts.all[0].calls, len(parts.sent)) == (0, 2, 2)

    run(test)


def test_a_request_that_is_not_taken_goes_to_another_replica_and_is_not_hedged_too() -> None:
    async def test() -> None:
        parts = Parts(replicas=2, hedge_s=0.02)
        parts.call()
        parts.end(0, GONE)
        assert parts.gone == [parts.all[0]]
        await asyncio.sleep(0.1)
        assert (len(parts.sent), parts.requests.hedged) == (2, 0)
        parts.end(1, GONE)
        assert parts.only_outcome() == "gone"
        assert [replica.calls for replica in parts.all] == [1, 1]

    run(test)


@pytest.mark.parametrize(("replicas", "end"), [(1, GONE), (2, FULL)])
def test_other_failures_and_those_without_another_replica_end_the_call(replicas: int, end: DeepStageError) -> None:
    async def test() -> None:
        parts = Parts(replicas)
        parts.call()
        parts.end(0, end)
        assert (parts.only_outcome(), len(parts.sent)) == (str(end), 1)

    run(test)


def test_an_answer_after_the_deadline_is_counted_and_changes_nothing() -> None:
    async def test() -> None:
        parts = Parts()
        parts.call(timeout_s=0.01)
        await until(lambda: bool(parts.outcomes))
        assert parts.only_outcome() == "Triton at triton:8001 did not answer in time"
        assert len(parts.requests.abandoned) == parts.all[0].outstanding == 1
        parts.end(0, 1.0)
        assert (parts.requests.late_answers, len(parts.requests.abandoned), parts.all[0].outstanding) == (1, 0, 0)
        assert len(parts.outcomes) == 1

    run(test)


def test_abandoned_requests_are_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABANDONED_S_MAX", 0.2)

    async def test() -> None:
        parts = Parts()
        for _ in range(ABANDONED_MAX + 10):
            parts.call(timeout_s=0.05)
        await until(lambda: len(parts.outcomes) == ABANDONED_MAX + 10)
        assert len(parts.requests.abandoned) == parts.all[0].outstanding == ABANDONED_MAX
        assert parts.cancelled == 10
        await until(lambda: not parts.requests.abandoned)
        assert parts.cancelled == parts.all[0].failures == ABANDONED_MAX + 10
        assert parts.all[0].outstanding == parts.requests.late_answers == 0

    run(test)


def test_a_call_that_is_stopped_before_it_starts_sends_nothing() -> None:
    async def test() -> None:
        parts = Parts()
        call = BatchCall(parts.requests, ROW, asyncio.get_running_loop().time() + 60, parts.outcomes.append)
        call.stop(FULL)
        call.start()
        assert (parts.only_outcome(), parts.sent) == ("full", [])

    run(test)


def test_without_a_replica_or_time_a_call_ends_at_once() -> None:
    async def test() -> None:
        nobody, late = Parts(replicas=0), Parts()
        nobody.call()
        late.call(timeout_s=0.0)
        assert nobody.only_outcome() == "Triton at triton:8001: no replica"
        assert late.only_outcome() == "the deadline had passed before the call began"
        assert late.sent == []

    run(test)
