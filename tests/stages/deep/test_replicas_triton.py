"""Three real Tritons under load: the spread of the calls, and one of them killed, added and frozen."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from cascade.columns import Float64
from cascade.errors import DeepStageError
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from stages.deep.triton import TritonDeepStage
from tests.conftest import TinyDeepModel
from tests.timing import wait_until, wait_within

pytestmark = pytest.mark.triton

CALLS_PER_S = 150
# Far above the time of a call, so that only a replica's fault makes one late and not the machine's other load.
DEADLINE_S = 1.5
# A sleep that is late by so much shows that the whole machine stood still: then calls are late that no replica lost.
STANDSTILL_S = 0.5
CALLS = 1_200
SPREAD_MAX = 0.05
# Calls of a replica within six seconds, in seconds of the load: a fair share of three replicas is two seconds.
SHARE_MIN = 1.0
NOTICED_S_MAX = 1.0


@pytest.fixture(scope="module")
def tritons(
    triton_parts: Path, tiny_deep_model: TinyDeepModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[LocalTriton]]:
    directory = tmp_path_factory.mktemp("replicas")
    repository = write_repository(tiny_deep_model.path, tiny_deep_model.signature, directory / "models", "cpu")
    with ExitStack() as stack:
        servers = []
        for number in range(3):
            (directory / str(number)).mkdir()
            servers.append(LocalTriton(repository, parts_dir=triton_parts, log_dir=directory / str(number)))
            stack.enter_context(servers[-1])
        yield servers


@pytest.fixture
def running(tritons: list[LocalTriton]) -> Iterator[list[LocalTriton]]:
    """All three, also where the test before has stopped one."""
    for server in tritons:
        server.start()
    yield tritons
    for server in tritons:
        server.thaw()


@pytest.fixture
def stage(running: list[LocalTriton], tiny_deep_model: TinyDeepModel) -> Iterator[TritonDeepStage]:
    made = TritonDeepStage(",".join(server.grpc_url for server in running), tiny_deep_model.signature)
    made.wait_ready(30)
    wait_until(lambda: all(state.ready for state in made.replicas()), "all are ready", 30)
    yield made
    made.close()


@dataclass
class Load:
    """Sends CALLS_PER_S calls a second in a thread, whatever becomes of them; a context manager."""

    stage: TritonDeepStage
    model: TinyDeepModel
    calls: list[tuple[float, Future[Float64]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._standstills_s: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        inputs, started_s = self.model.inputs(4), time.monotonic()
        while not self._stop.is_set():
            due_s = started_s + len(self.calls) / CALLS_PER_S
            asleep_s = time.monotonic()
            time.sleep(max(due_s - asleep_s, 0.0))
            if time.monotonic() - max(due_s, asleep_s) > STANDSTILL_S:
                self._standstills_s.append(asleep_s)
            self.calls.append((time.monotonic(), self.stage.submit(inputs, DEADLINE_S)))

    def failures(self, since_s: float = 0.0) -> list[str]:
        """The causes of the calls that failed, of those sent after `since_s` and not under way at a standstill."""
        errors = [
            future.exception(20)
            for sent_s, future in self.calls
            if sent_s >= since_s and not any(sent_s <= at_s < sent_s + DEADLINE_S for at_s in self._standstills_s)
        ]
        return [error.cause for error in errors if isinstance(error, DeepStageError)]


def counts(stage: TritonDeepStage) -> dict[str, int]:
    return {state.address: state.calls for state in stage.replicas()}


def answered_by(server: LocalTriton) -> int:
    """The inferences that Triton itself has counted."""
    text = urllib.request.urlopen(server.metrics_url, timeout=5).read().decode()  # noqa: S310
    (found,) = re.findall(r"^nv_inference_request_success\{model=\"fraud_deep\".*\} ([0-9.e+]+)$", text, re.MULTILINE)
    return round(float(found))


def spread(shares: list[int]) -> float:
    """The largest difference between two shares, over their mean."""
    return (max(shares) - min(shares)) / (sum(shares) / len(shares))


def is_ready(stage: TritonDeepStage, server: LocalTriton) -> bool:
    return next(state.ready for state in stage.replicas() if state.address == server.grpc_url)


def test_equal_replicas_get_equal_shares_by_their_own_count(
    stage: TritonDeepStage, running: list[LocalTriton], tiny_deep_model: TinyDeepModel
) -> None:
    """One call at a time: with several, a replica that the machine slows gets fewer, and that is meant."""
    before, inputs = [answered_by(server) for server in running], tiny_deep_model.inputs(4)
    for _ in range(CALLS):
        stage.submit(inputs, DEADLINE_S).result()

    def answered() -> list[int]:
        return [answered_by(server) - count for server, count in zip(running, before, strict=True)]

    # Triton counts a request a moment after its answer
    wait_until(lambda: sum(answered()) >= CALLS, "all are counted", 20)
    print(f"calls of each: {answered()}, spread {spread(answered()):.1%}")
    assert spread(answered()) < SPREAD_MAX


def test_a_replica_that_is_killed_costs_no_decision_and_the_others_share_its_calls(
    stage: TritonDeepStage, running: list[LocalTriton], tiny_deep_model: TinyDeepModel
) -> None:
    killed, *others = running
    with Load(stage, tiny_deep_model) as load:
        time.sleep(2)
        killed.kill()
        noticed_s = wait_within(NOTICED_S_MAX, lambda: not is_ready(stage, killed), "the killed replica is noticed")
        before, killed_at = counts(stage), len(load.calls)
        time.sleep(6)
        after = counts(stage)
    failures = load.failures()
    print(f"noticed after {noticed_s:.2f} s; {len(load.calls) - killed_at} calls without it; failed: {failures}")
    # the calls to it were sent to another replica
    assert len(failures) <= 1
    assert after[killed.grpc_url] == before[killed.grpc_url]
    assert min(after[server.grpc_url] - before[server.grpc_url] for server in others) > SHARE_MIN * CALLS_PER_S


def test_a_replica_that_is_added_has_its_share_within_a_second_of_being_ready(
    stage: TritonDeepStage, running: list[LocalTriton], tiny_deep_model: TinyDeepModel
) -> None:
    added = running[1]
    added.kill()
    with Load(stage, tiny_deep_model) as load:
        time.sleep(1)
        before = counts(stage)
        added.start()
        due = before[added.grpc_url] + 3
        noticed_s = wait_within(NOTICED_S_MAX, lambda: counts(stage)[added.grpc_url] > due, "the added one has calls")
        before = counts(stage)
        time.sleep(6)
        after = counts(stage)
    shares = [after[address] - before[address] for address in after]
    print(f"used after {noticed_s:.2f} s; calls of each: {shares}, spread {spread(shares):.1%}")
    assert min(shares) > SHARE_MIN * CALLS_PER_S
    assert len(load.failures()) <= 1


def is_used_again(stage: TritonDeepStage, thawed: LocalTriton) -> bool:
    """Whether a thawed server is ready; it is started again where the thaw has ended it.

    The Python backend of Triton 2.51 aborts at times when it was frozen while it computed (decision 3).
    """
    thawed.start()
    return is_ready(stage, thawed)


def test_a_frozen_replica_costs_its_calls_and_no_other_and_is_used_again_when_it_thaws(
    stage: TritonDeepStage, running: list[LocalTriton], tiny_deep_model: TinyDeepModel
) -> None:
    frozen = running[2]
    with Load(stage, tiny_deep_model) as load:
        time.sleep(1)
        frozen.freeze()
        before = counts(stage)
        wait_until(lambda: not is_ready(stage, frozen), "the frozen replica is noticed", 20)
        noticed_s, noticed = time.monotonic(), counts(stage)
        time.sleep(3)
        went_on = counts(stage)
        frozen.thaw()
        wait_until(lambda: is_used_again(stage, frozen), "the thawed replica is noticed", 20, stage.replicas)
        thawed = counts(stage)
        time.sleep(6)
        after = counts(stage)
    failures, later = load.failures(), load.failures(noticed_s)
    print(
        f"{len(load.calls)} calls, {went_on[frozen.grpc_url] - before[frozen.grpc_url]} to the frozen one: {failures};"
        f" calls of each after the thaw: {[after[address] - thawed[address] for address in after]}"
    )
    # as many as another one had outstanding at most
    assert len(failures) < 0.05 * len(load.calls)
    assert set(failures) <= {"deadline"}
    assert went_on[frozen.grpc_url] == noticed[frozen.grpc_url]
    assert later == []
    assert sum(went_on.values()) - sum(before.values()) > 3 * 0.8 * CALLS_PER_S
    assert after[frozen.grpc_url] - thawed[frozen.grpc_url] > SHARE_MIN * CALLS_PER_S
