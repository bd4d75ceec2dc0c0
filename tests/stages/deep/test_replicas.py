"""The choice among replicas, and their states: no sockets, no threads."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.deep.replicas import FAILURES_MAX, REPLICAS_MAX, TURNS_BEHIND_MAX, Address, Replica, Replicas


def address(number: int) -> Address:
    return Address(f"10.0.{number // 250}.{number % 250}", 8001, "triton")


def ready_replicas(count: int, seed: int | None = None) -> tuple[Replicas[Address], list[Replica[Address]]]:
    """`seed`: of the ranks; None: in the order of the addresses."""
    chance = (lambda: 0.0) if seed is None else random.Random(seed).random
    replicas = Replicas(connect=lambda where: where, chance=chance)
    added = replicas.update(address(number) for number in range(count))
    for replica in added:
        replicas.passed(replica)
    return replicas, added


def send(replicas: Replicas[Address], other_than: Replica[Address] | None = None) -> Replica[Address]:
    chosen = replicas.choose(other_than)
    assert chosen is not None
    replicas.sent(chosen)
    return chosen


def test_before_its_first_check_a_replica_gets_nothing() -> None:
    replicas = Replicas(connect=lambda where: where)
    (replica,) = replicas.update([address(0)])
    assert replicas.choose() is None
    assert (replicas.ready, replicas.all_checked) == (0, False)
    assert replicas.problem == "not checked yet"
    replicas.passed(replica)
    assert replicas.choose() is replica
    assert (replicas.ready, replicas.all_checked, replicas.problem) == (1, True, "")


@given(count=st.integers(1, REPLICAS_MAX), calls=st.integers(1, 300), seed=st.integers(0, 1_000))
def test_calls_that_are_answered_at_once_take_turns(count: int, calls: int, seed: int) -> None:
    replicas, added = ready_replicas(count, seed)
    for _ in range(calls):
        replicas.answered(send(replicas))
    found = [replica.calls for replica in added]
    assert sum(found) == calls
    assert max(found) - min(found) <= 1


@given(count=st.integers(2, 16), seed=st.integers(0, 1_000_000))
def test_the_chosen_replica_never_has_more_outstanding_requests_than_another(count: int, seed: int) -> None:
    replicas, added = ready_replicas(count)
    chance = random.Random(seed)
    outstanding: list[Replica[Address]] = []
    for _ in range(200):
        if outstanding and chance.random() < 0.45:
            replicas.answered(outstanding.pop(chance.randrange(len(outstanding))))
        else:
            least = min(replica.outstanding for replica in added)
            chosen = replicas.choose()
            assert chosen is not None
            assert chosen.outstanding == least
            replicas.sent(chosen)
            outstanding.append(chosen)
    assert sum(replica.outstanding for replica in added) == len(outstanding)


def test_a_replica_that_answers_nothing_gets_no_more_than_the_busiest_of_the_others() -> None:
    replicas, (hung, *_) = ready_replicas(4)
    in_flight: list[Replica[Address]] = []
    for _ in range(10_000):
        chosen = send(replicas)
        if chosen is not hung:
            in_flight.append(chosen)
        if len(in_flight) > 9:
            replicas.answered(in_flight.pop(0))
    assert hung.calls <= 4
    assert min(replica.calls for replica in replicas._all if replica is not hung) > 3_000


def test_a_replica_that_is_gone_is_passed_by_at_once_and_used_again_after_a_check() -> None:
    replicas, (first, second) = ready_replicas(2)
    replicas.failed(send(replicas), "UNAVAILABLE: refused", gone=True)
    assert [replica.ready for replica in (first, second)] == [False, True]
    assert {send(replicas).address for _ in range(5)} == {second.address}
    assert [(state.ready, state.problem) for state in replicas.states()] == [
        (False, "UNAVAILABLE: refused"),
        (True, ""),
    ]
    replicas.passed(first)
    # it has the fewest outstanding requests
    assert {send(replicas).address for _ in range(5)} == {first.address}


def test_a_server_that_may_have_been_replaced_gets_nothing_before_its_check_even_if_there_is_no_other() -> None:
    for gone in (
        lambda replicas, only: replicas.failed(send(replicas), "UNAVAILABLE: refused", gone=True),
        lambda replicas, only: replicas.not_ready(only, "UNAVAILABLE: refused"),
    ):
        replicas, (only,) = ready_replicas(1)
        gone(replicas, only)
        replicas.late(only, "no answer")
        assert replicas.choose() is None
        replicas.passed(only)
        assert replicas.choose() is only


def test_a_replica_whose_requests_all_fail_at_once_does_not_attract_them() -> None:
    replicas, (broken, *others) = ready_replicas(3)
    for _ in range(300):
        chosen = send(replicas)
        if chosen is broken:
            replicas.failed(chosen, "INTERNAL: CUDA error")
        else:
            replicas.answered(chosen)
    assert broken.calls == broken.failures == FAILURES_MAX
    assert [replica.failures for replica in others] == [0, 0]


def test_an_overloaded_replica_stays_in_use() -> None:
    replicas, (only,) = ready_replicas(1)
    for _ in range(3 * FAILURES_MAX):
        replicas.failed(send(replicas), "queue is full", overloaded=True)
    assert (only.ready, only.failures, only.outstanding) == (True, 3 * FAILURES_MAX, 0)


def test_failures_with_answers_in_between_are_no_reason_to_pass_by_a_replica() -> None:
    replicas, (only,) = ready_replicas(1)
    for _ in range(20):
        for _ in range(FAILURES_MAX - 1):
            replicas.failed(send(replicas), "INTERNAL")
        assert only.ready
        replicas.answered(send(replicas))
    for _ in range(FAILURES_MAX - 1):
        replicas.failed(send(replicas), "INTERNAL")
    replicas.late(only, "no answer")
    replicas.passed(only)
    replicas.failed(send(replicas), "INTERNAL")
    assert only.ready, "failures from before its check count on"


def test_if_no_replica_is_ready_those_that_were_get_the_requests() -> None:
    replicas, (first, second) = ready_replicas(2)
    (never,) = replicas.update(address(number) for number in range(3))
    for replica in (first, second):
        replicas.late(replica, "no answer")
    assert {send(replicas).address for _ in range(6)} == {first.address, second.address}
    assert replicas.problem == f"none of 3 replicas is ready; {first.address.target}: no answer"
    replicas.passed(never)
    assert {send(replicas).address for _ in range(6)} == {never.address}


def test_a_replica_with_another_model_gets_nothing_even_if_there_is_no_other() -> None:
    replicas, (only,) = ready_replicas(1)
    replicas.not_ready(only, "serves another model", differs=True)
    assert replicas.choose() is None
    assert replicas.all_differ
    replicas.not_ready(only, "no answer")
    assert replicas.choose() is None
    assert not replicas.all_differ
    replicas.passed(only)
    assert replicas.choose() is only


def test_a_replica_with_another_bundles_model_gets_nothing_and_may_get_the_right_one() -> None:
    replicas, (only,) = ready_replicas(1)
    replicas.not_ready(only, "another bundle's")
    assert replicas.choose() is None
    assert not replicas.all_differ, "an update is no wrong setting: a start waits for its end"
    replicas.passed(only)
    assert replicas.choose() is only


def test_the_second_call_goes_to_another_replica_where_there_is_one() -> None:
    replicas, (first, second) = ready_replicas(2)
    replicas.sent(second)
    assert send(replicas, other_than=first) is second
    replicas.late(second, "no answer")
    assert replicas.choose(other_than=first) is None


def test_a_new_replica_gets_the_same_share_as_the_others_and_no_flood() -> None:
    replicas, _ = ready_replicas(3)
    for _ in range(3_000):
        replicas.answered(send(replicas))
    (new,) = replicas.update(address(number) for number in range(4))
    replicas.passed(new)
    counted = Counter(send(replicas).address for _ in range(400))
    assert set(counted.values()) == {100}


def test_clients_that_start_together_begin_with_different_replicas() -> None:
    first = Counter(send(ready_replicas(4, seed)[0]).address for seed in range(400))
    assert min(first.values()) > 60


def test_a_replica_that_hung_and_answers_again_does_not_get_all_that_it_missed() -> None:
    replicas, (hung, *_) = ready_replicas(3)
    waiting = [replicas.sent(hung) for _ in range(5)]
    for _ in range(900):
        chosen = send(replicas)
        assert chosen is not hung
        replicas.answered(chosen)
    for _ in waiting:
        replicas.answered(hung)
    missed = hung.calls
    for _ in range(300):
        replicas.answered(send(replicas))
    assert 100 <= hung.calls - missed <= 100 + TURNS_BEHIND_MAX


def test_a_replica_that_vanished_gets_nothing_and_its_last_requests_may_end() -> None:
    replicas, (first, second) = ready_replicas(2)
    replicas.sent(first)
    assert replicas.update([second.address]) == []
    assert (first.retired, first.ready, first.outstanding) == (True, False, 1)
    replicas.answered(first)
    replicas.passed(first)
    assert {send(replicas).address for _ in range(5)} == {second.address}
    assert [state.address for state in replicas.states()] == [second.address.target]
    (again,) = replicas.update([first.address, second.address])
    assert (again.address, again.ready) == (first.address, False)


def test_an_empty_answer_of_the_name_server_changes_nothing() -> None:
    replicas, (only,) = ready_replicas(1)
    assert replicas.update([]) == []
    assert replicas.choose() is only


def test_more_addresses_than_the_limit_are_cut_always_to_the_same() -> None:
    many = [address(number) for number in range(3 * REPLICAS_MAX)]
    replicas = Replicas(connect=lambda where: where)
    kept = {replica.address for replica in replicas.update(many)}
    assert len(kept) == REPLICAS_MAX
    assert replicas.update(reversed(many)) == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["update", "passed", "not ready", "differs", "sent", "answered", "failed", "gone", "full", "late"]
            ),
            st.integers(0, 7),
            st.sets(st.integers(0, 7), max_size=8),
        ),
        max_size=80,
    )
)
def test_whatever_happens_only_a_replica_that_fits_is_chosen_and_the_counts_agree(
    events: list[tuple[str, int, set[int]]],
) -> None:
    replicas = Replicas(connect=lambda where: where)
    everyone: list[Replica[Address]] = []
    outstanding: list[Replica[Address]] = []
    for what, number, numbers in events:
        if what == "update":
            everyone += replicas.update(map(address, numbers))
            if numbers:
                assert {replica.address for replica in replicas._all} == set(map(address, numbers))
        elif what == "sent":
            chosen = replicas.choose()
            ready = [replica for replica in replicas._all if replica.ready]
            fit = [replica for replica in replicas._all if replica.fits]
            assert (chosen is None) == (not fit)
            if chosen is not None:
                assert chosen in (ready or fit)
                assert not chosen.retired
                replicas.sent(chosen)
                outstanding.append(chosen)
        elif what in ("answered", "failed", "gone", "full") and outstanding:
            replica = outstanding.pop(number % len(outstanding))
            end: dict[str, Any] = {
                "answered": lambda: replicas.answered(replica),  # noqa: B023
                "failed": lambda: replicas.failed(replica, "INTERNAL"),  # noqa: B023
                "full": lambda: replicas.failed(replica, "full", overloaded=True),  # noqa: B023
                "gone": lambda: replicas.failed(replica, "UNAVAILABLE", gone=True),  # noqa: B023
            }
            end[what]()
        elif everyone and what in ("passed", "not ready", "differs", "late"):
            replica = everyone[number % len(everyone)]
            if what == "passed":
                replicas.passed(replica)
            elif what == "late":
                replicas.late(replica, what)
            else:
                replicas.not_ready(replica, what, differs=what == "differs")
        assert all(replica.fits and not replica.problem for replica in replicas._all if replica.ready)
        assert not any(replica.ready for replica in everyone if replica.retired)
    for replica in everyone:
        assert replica.outstanding == outstanding.count(replica)
        assert replica.calls == replica.answers + replica.failures + replica.outstanding


@pytest.mark.parametrize(("ip", "target"), [("10.0.0.1", "10.0.0.1:8001"), ("fd00::1", "[fd00::1]:8001")])
def test_an_address_is_written_as_grpc_reads_it(ip: str, target: str) -> None:
    assert Address(ip, 8001, "triton").target == target
