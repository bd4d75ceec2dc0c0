"""The calls over several replicas, which are stand-ins in this process so that they fail on demand."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import grpc
import msgspec
import numpy as np
import psutil
import pytest

from cascade.columns import Float64
from cascade.errors import DeepStageError, ModelServerError
from cascade.protocols import ReplicaState
from stages.deep import batch_call as module
from stages.deep.replica_watch import ReplicaWatch
from stages.deep.replicas import Address, Replicas
from stages.deep.triton import TritonDeepStage
from stages.deep.triton_connection import TritonConnection
from tests.conftest import TinyDeepModel
from tests.stages.deep.conftest import StageMaker, failure
from tests.stages.deep.fake_triton import FakeTriton, fake_tritons
from tests.timing import wait_until, wait_within

REFUSED = (grpc.StatusCode.UNAVAILABLE, "Server is stopping")
FULL = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
BROKEN = (grpc.StatusCode.INTERNAL, "CUDA error")


@pytest.fixture
def pair(tiny_deep_model: TinyDeepModel) -> Iterator[list[FakeTriton]]:
    with fake_tritons(tiny_deep_model.signature, 2) as servers:
        yield servers


def url_of(servers: list[FakeTriton]) -> str:
    return ",".join(server.url for server in servers)


def state_of(stage: TritonDeepStage, server: FakeTriton) -> ReplicaState:
    return next(state for state in stage.replicas() if state.address == server.url)


def ready(stage: TritonDeepStage) -> dict[str, bool]:
    return {state.address: state.ready for state in stage.replicas()}


def all_ready(stage: TritonDeepStage, count: int) -> bool:
    return list(ready(stage).values()) == [True] * count


def scores(stage: TritonDeepStage, model: TinyDeepModel, calls: int) -> Counter[float]:
    """How often each server answered, one call after another."""
    return Counter(float(stage.submit(model.inputs(2), 10).result()[0]) for _ in range(calls))


def test_calls_one_after_another_take_turns(
    pair: list[FakeTriton], new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(url_of(pair))
    assert scores(stage, tiny_deep_model, 20) == {0.0: 10, 1.0: 10}


@pytest.mark.parametrize(("fault", "still_ready"), [(REFUSED, False), (FULL, True)])
def test_a_call_that_a_replica_does_not_take_is_answered_by_another(
    pair: list[FakeTriton],
    new_stage: StageMaker,
    tiny_deep_model: TinyDeepModel,
    fault: tuple[grpc.StatusCode, str],
    still_ready: bool,
) -> None:
    stage = new_stage(url_of(pair))
    pair[0].fault = fault
    assert scores(stage, tiny_deep_model, 12) == {1.0: 12}
    assert (pair[0].calls > 3) == still_ready
    assert ready(stage) == {pair[0].url: still_ready, pair[1].url: True}
    assert sum(state.calls for state in stage.replicas()) == pair[0].calls + pair[1].calls
    pair[0].fault = None
    wait_until(lambda: all_ready(stage, 2), "the replica is used again", 10)
    assert len(scores(stage, tiny_deep_model, 4)) == 2


def test_a_call_is_tried_twice_and_not_three_times(new_stage: StageMaker, tiny_deep_model: TinyDeepModel) -> None:
    with fake_tritons(tiny_deep_model.signature, 4) as servers:
        stage = new_stage(url_of(servers))
        for server in servers:
            server.fault = REFUSED
        error = failure(stage.submit(tiny_deep_model.inputs(2), 10))
        assert error.cause == "error"
        assert "Server is stopping" in str(error)
        assert sum(server.calls for server in servers) == 2


def test_another_error_is_not_tried_again_and_three_in_a_row_end_the_use_of_a_replica(
    pair: list[FakeTriton], new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(url_of(pair))
    pair[0].fault = BROKEN
    futures: list[Future[Float64]] = []
    for _ in range(30):
        futures.append(stage.submit(tiny_deep_model.inputs(2), 10))
        futures[-1].exception(10)
    causes = Counter(str(getattr(future.exception(), "cause", None)) for future in futures)
    assert causes == {"None": 27, "error": 3}
    assert pair[0].calls == 3
    # the probe of a check fails too
    assert ready(stage) == {pair[0].url: False, pair[1].url: True}
    assert "CUDA error" in state_of(stage, pair[0]).problem


def test_a_replica_that_takes_calls_and_answers_none_does_not_stop_the_others(
    pair: list[FakeTriton], new_stage: StageMaker, tiny_deep_model: TinyDeepModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABANDONED_S_MAX", 3.0)
    stage = new_stage(url_of(pair))
    pair[0].goes_on.clear()
    both = [stage.submit(tiny_deep_model.inputs(2), 2.0) for _ in pair]
    # while both are open, the replicas are equal, and the next call may go to either
    wait_until(lambda: pair[0].calls == 1 and any(future.done() for future in both), "a call waits", 10)
    assert scores(stage, tiny_deep_model, 38) == {1.0: 38}
    assert pair[0].calls == 1
    assert sorted(str(getattr(future.exception(10), "cause", None)) for future in both) == ["None", "deadline"]
    wait_until(lambda: state_of(stage, pair[0]).failures == 1, "the abandoned call ends", 20)


def test_the_second_call_of_hedging_goes_to_the_other_replica(
    pair: list[FakeTriton], new_stage: StageMaker, tiny_deep_model: TinyDeepModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABANDONED_S_MAX", 3.0)
    # far above the time of a call, so that a busy machine makes no further one late
    stage = new_stage(url_of(pair), hedge_ms=1_000.0)
    pair[0].goes_on.clear()
    assert scores(stage, tiny_deep_model, 6) == {1.0: 6}
    assert stage.hedged == pair[0].calls == 1


def test_a_replica_with_another_model_is_not_used_and_alone_it_ends_the_start(
    new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    other = msgspec.structs.replace(tiny_deep_model.signature, features=9)
    with FakeTriton(tiny_deep_model.signature, 1.0) as right, FakeTriton(other, 2.0) as wrong:
        stage = new_stage(f"{wrong.url},{right.url}")
        assert ready(stage) == {wrong.url: False, right.url: True}
        assert scores(stage, tiny_deep_model, 8) == {1.0: 8}
        assert wrong.rows == []
        alone = TritonDeepStage(wrong.url, tiny_deep_model.signature)
        with pytest.raises(ModelServerError, match=r"tensor features is FP32 \[-1, 9\], in the bundle FP32 \[-1, 4\]"):
            alone.wait_ready(60)
        assert failure(alone.submit(tiny_deep_model.inputs(2), 10)).cause == "error"
        alone.close()


def test_a_replica_whose_model_is_replaced_by_another_is_not_used_any_more(
    pair: list[FakeTriton], new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(url_of(pair))
    pair[0].ready = False
    wait_until(lambda: not state_of(stage, pair[0]).ready, "it loads a model", 10)
    pair[0].signature = msgspec.structs.replace(tiny_deep_model.signature, features=9)
    pair[0].ready = True
    wait_until(lambda: "serves another" in state_of(stage, pair[0]).problem, "the other model is found", 10)
    before = len(pair[0].rows)
    assert scores(stage, tiny_deep_model, 8) == {1.0: 8}
    assert len(pair[0].rows) == before


def test_a_replica_that_answers_nonsense_gets_no_call_and_is_used_once_it_answers(
    new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    with FakeTriton(tiny_deep_model.signature) as running, FakeTriton(tiny_deep_model.signature) as broken:
        broken.cut = True
        stage = new_stage(url_of([running, broken]))
        assert ready(stage) == {running.url: True, broken.url: False}
        assert "the model is ready but does not answer" in state_of(stage, broken).problem
        broken.cut = False
        wait_until(lambda: all_ready(stage, 2), "the replica is used", 10)


def test_the_start_needs_one_replica_and_not_all(new_stage: StageMaker, tiny_deep_model: TinyDeepModel) -> None:
    with FakeTriton(tiny_deep_model.signature) as running, FakeTriton(tiny_deep_model.signature) as late:
        late.ready = False
        stage = new_stage(f"{late.url},{running.url}")
        assert ready(stage) == {late.url: False, running.url: True}
        assert state_of(stage, late).problem == "the model is not ready"


@pytest.mark.parametrize(("cause", "used"), [("queue-full", True), ("deadline", True), ("error", False)])
def test_a_check_that_finds_an_overloaded_replica_does_not_take_it_away(cause: Any, used: bool) -> None:
    class Connection:
        async def check_model(self) -> None:
            raise DeepStageError(cause, "the model is ready but does not answer")

    replicas: Replicas[Any] = Replicas(connect=lambda _: Connection())
    (only,) = replicas.update([Address("10.0.0.1", 8001, "triton")])
    replicas.passed(only)
    replicas.late(only, "no answer")
    asyncio.run(ReplicaWatch(replicas)._check(only))
    assert only.problem == "the model is ready but does not answer"
    assert replicas.choose() is (only if used else None)


# --- addresses that come and go -------------------------------------------------------------------------------------


class Names:
    """The addresses behind the name `triton`, all of them on this machine's loopback network.

    Names are resolved while `answers` is set. `waits`: whether a resolution has waited for that.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.waits, self.answers = threading.Event(), threading.Event()
        self.answers.set()

    def resolve(self, host: str, port: int) -> list[str]:
        assert host == "triton"
        if not self.answers.is_set():
            self.waits.set()
            self.answers.wait(60)
        return self.addresses


class Service(NamedTuple):
    """Two stand-ins on one port of two addresses, and the name server, which knows the first."""

    first: FakeTriton
    second: FakeTriton
    names: Names
    url: str


@pytest.fixture
def service(tiny_deep_model: TinyDeepModel) -> Iterator[Service]:
    signature = tiny_deep_model.signature
    with FakeTriton(signature, 1.0) as first, FakeTriton(signature, 2.0, "127.0.0.2", first.port) as second:
        yield Service(first, second, Names("127.0.0.1"), f"triton:{first.port}")


def test_replicas_follow_the_name_within_a_second_each_way(
    service: Service, new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(service.url, resolve=service.names.resolve)
    assert scores(stage, tiny_deep_model, 4) == {1.0: 4}
    service.names.addresses = ["127.0.0.1", "127.0.0.2"]
    added_s = wait_within(1.0, lambda: all_ready(stage, 2), "the new address is used")
    assert scores(stage, tiny_deep_model, 10) == {1.0: 5, 2.0: 5}
    service.names.addresses = ["127.0.0.2"]
    removed_s = wait_within(1.0, lambda: ready(stage) == {service.second.url: True}, "the old address is not used")
    assert scores(stage, tiny_deep_model, 4) == {2.0: 4}
    print(f"added after {added_s:.2f} s, removed after {removed_s:.2f} s")


def test_calls_under_way_to_a_replica_that_vanishes_are_answered_before_its_connection_ends(
    service: Service, new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(service.url, resolve=service.names.resolve)
    service.first.goes_on.clear()
    waiting = stage.submit(tiny_deep_model.inputs(2), 20)
    wait_until(lambda: service.first.calls == 1, "the call is under way", 10)
    service.names.addresses = ["127.0.0.2"]
    wait_until(lambda: ready(stage) == {service.second.url: True}, "the other replica is ready", 10)
    assert stage._watch.connected == 2
    service.first.goes_on.set()
    assert waiting.result()[0] == 1.0
    wait_until(lambda: stage._watch.connected == 1, "its connection ends", 10)


def test_a_name_server_that_does_not_answer_delays_no_call(
    service: Service, new_stage: StageMaker, tiny_deep_model: TinyDeepModel
) -> None:
    stage = new_stage(service.url, resolve=service.names.resolve)
    service.names.answers.clear()
    assert service.names.waits.wait(20)
    assert scores(stage, tiny_deep_model, 20) == {1.0: 20}
    service.names.answers.set()


def test_a_start_without_any_address_names_the_name_server(tiny_deep_model: TinyDeepModel) -> None:
    stage = TritonDeepStage("triton:8001", tiny_deep_model.signature, resolve=Names().resolve)
    with pytest.raises(ModelServerError, match=r"within 0.3 s \(triton has no address\)"):
        stage.wait_ready(0.3)
    assert failure(stage.submit(tiny_deep_model.inputs(2), 10)).cause == "error"
    stage.close()


@pytest.mark.timeout(300)
def test_a_thousand_resolutions_leave_no_connection_task_thread_or_file_behind(
    tiny_deep_model: TinyDeepModel, new_stage: StageMaker
) -> None:
    with fake_tritons(tiny_deep_model.signature, 6) as servers:
        stage = new_stage(servers[0].url)
        everyone = [Address("127.0.0.1", server.port, "127.0.0.1") for server in servers]
        gone = [Address("127.0.0.1", 1, "127.0.0.1")]

        def cycle(number: int) -> None:
            some = [everyone[(number + step) % len(everyone)] for step in range(1 + number % 4)]
            stage._loop.submit(stage._watch.update(some + gone * (number % 3 == 0))).result(10)
            if number % 5 == 0:
                time.sleep(0.01)
            error = stage.submit(tiny_deep_model.inputs(2), 5).exception(10)
            assert error is None or isinstance(error, DeepStageError)

        def settle() -> tuple[int, int, int]:
            stage._loop.submit(stage._watch.update(everyone[:1])).result(10)
            wait_until(lambda: stage._watch.connected == 1 and all_ready(stage, 1), "the old ones end", 30)

            async def tasks() -> int:
                return len(asyncio.all_tasks())

            gc.collect()
            connections = sum(isinstance(item, TritonConnection) for item in gc.get_objects())
            threads = [thread for thread in threading.enumerate() if "ThreadPoolExecutor" not in thread.name]
            return connections, stage._loop.submit(tasks()).result(10), len(threads)

        process = psutil.Process()
        for number in range(200):
            cycle(number)
        before, files, memory = settle(), process.num_fds(), process.memory_info().rss
        for number in range(1_000):
            cycle(number)
        after = settle()
        assert after[0] == before[0] == 1
        assert after[1] <= before[1] + 2
        assert after[2] <= before[2] + 1
        assert process.num_fds() <= files + 3
        # some thousand connections were made; the rest is what gRPC and the stand-ins' threads take once
        assert process.memory_info().rss - memory < 30e6
        assert np.isfinite(stage.submit(tiny_deep_model.inputs(2), 10).result()).all()
