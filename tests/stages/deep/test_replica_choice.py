"""The choice among replicas, simulated against other rules: what decision 12 rests on. `pytest -s` prints the table."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import pytest

from stages.deep.replicas import Address, Replica, Replicas

DEADLINE_S: Final = 0.050
# A request to a replica that hangs is cancelled this long after its deadline.
ABANDONED_S: Final = 30.0
CALLS: Final = 60_000


class Rule(Protocol):
    def choose(self) -> int: ...

    def ended(self, place: int) -> None: ...


class Turns:
    """Plain round-robin."""

    def __init__(self, count: int) -> None:
        self._count, self._next = count, 0

    def choose(self) -> int:
        self._next = (self._next + 1) % self._count
        return self._next

    def ended(self, place: int) -> None:
        pass


class TwoChoices:
    """The one with fewer outstanding requests of two random ones (Mitzenmacher, 2001)."""

    def __init__(self, count: int) -> None:
        self._outstanding, self._chance = [0] * count, random.Random(2)

    def choose(self) -> int:
        two = self._chance.sample(range(len(self._outstanding)), 2)
        place = min(two, key=self._outstanding.__getitem__)
        self._outstanding[place] += 1
        return place

    def ended(self, place: int) -> None:
        self._outstanding[place] -= 1


class OutstandingThenTurns:
    """The fewest outstanding requests, and turns among equals, without a memory of who had how many."""

    def __init__(self, count: int) -> None:
        self._outstanding, self._turn = [0] * count, 0

    def choose(self) -> int:
        count = len(self._outstanding)
        order = [(self._turn + step) % count for step in range(count)]
        place = min(order, key=self._outstanding.__getitem__)
        self._outstanding[place] += 1
        self._turn = place + 1
        return place

    def ended(self, place: int) -> None:
        self._outstanding[place] -= 1


class Ours:
    """`Replicas`."""

    def __init__(self, count: int) -> None:
        self._replicas: Replicas[None] = Replicas(connect=lambda _: None, chance=lambda: 0.0)
        self._added = self._replicas.update(Address(f"10.0.0.{place}", 8001, "triton") for place in range(count))
        for replica in self._added:
            self._replicas.passed(replica)

    def choose(self) -> int:
        chosen: Replica[None] | None = self._replicas.choose()
        assert chosen is not None
        self._replicas.sent(chosen)
        return self._added.index(chosen)

    def ended(self, place: int) -> None:
        self._replicas.answered(self._added[place])


class Outcome(NamedTuple):
    """Latency in ms; share of calls without an answer at the deadline; (most - fewest calls of a replica) over mean."""

    ms_p50: float
    ms_p99: float
    late: float
    spread: float


def simulate(rule: Rule, service_ms: Sequence[float], use: float, hung: Sequence[int] = ()) -> Outcome:
    """Poisson arrivals at `use` of the capacity; exponential service, one request at a time, in each replica."""
    chance = random.Random(1)
    rate = use * sum(1e3 / service for service in service_ms)
    free_s, calls = [0.0] * len(service_ms), [0] * len(service_ms)
    ends: list[tuple[float, int]] = []
    latency_s, now_s = np.empty(CALLS), 0.0
    for number in range(CALLS):
        now_s += chance.expovariate(rate)
        while ends and ends[0][0] <= now_s:
            rule.ended(heapq.heappop(ends)[1])
        place = rule.choose()
        calls[place] += 1
        if place in hung:
            end_s = now_s + DEADLINE_S + ABANDONED_S
        else:
            end_s = free_s[place] = max(free_s[place], now_s) + chance.expovariate(1e3 / service_ms[place])
        heapq.heappush(ends, (end_s, place))
        latency_s[number] = end_s - now_s
    p50, p99 = np.quantile(latency_s, [0.5, 0.99]) * 1e3
    return Outcome(p50, p99, float((latency_s > DEADLINE_S).mean()), (max(calls) - min(calls)) * len(calls) / CALLS)


EQUAL = (4.0, 4.0, 4.0, 4.0)
# as slices of three, two, one and one seventh of a GPU
MIXED = (4.0, 6.0, 12.0, 12.0)
CASES: dict[str, tuple[Sequence[float], float, Sequence[int]]] = {
    "equal, 30 % used": (EQUAL, 0.3, ()),
    "equal, 70 % used": (EQUAL, 0.7, ()),
    "mixed, 30 % used": (MIXED, 0.3, ()),
    "mixed, 50 % used": (MIXED, 0.5, ()),
    "mixed, 70 % used": (MIXED, 0.7, ()),
    "one of four hangs, 30 % used": (EQUAL, 0.3, (1,)),
}


@pytest.mark.parametrize("case", CASES)
def test_fewest_outstanding_is_even_among_equals_and_better_than_turns_or_chance_with_mixed_sizes_or_a_hung_replica(
    case: str,
) -> None:
    service_ms, use, hung = CASES[case]
    rules: dict[str, Rule] = {
        "turns": Turns(4),
        "two choices": TwoChoices(4),
        "outstanding, then turns": OutstandingThenTurns(4),
        "ours": Ours(4),
    }
    found = {name: simulate(rule, service_ms, use, hung) for name, rule in rules.items()}
    for name, outcome in found.items():
        print(
            f"\n{case}: {name}: p50 {outcome.ms_p50:.1f} ms, p99 {outcome.ms_p99:,.0f} ms, late {outcome.late:.2%},"
            f" spread {outcome.spread:.1%}",
            end="",
        )
    ours, others = found["ours"], (found["turns"], found["two choices"])
    assert ours.late <= min(outcome.late for outcome in others)
    assert ours.ms_p99 <= min(outcome.ms_p99 for outcome in others)
    if service_ms is EQUAL and not hung:
        assert ours.spread < 0.001
    if hung:
        assert ours.late < 0.002
        assert found["turns"].late > 0.2
