"""Connections between processes and the broker, with their faults.

A request travels to the broker, the broker serves it, and the answer travels back; each of the three can fail. A
clogged connection delays what clients send over it, in order, until it is released. The broker then serves also the
requests that their clients have given up: so a commit can come late. Clogged connections are released one by one in
random order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from bench.faults.world import Life, World
from cascade.errors import BrokerError

# Share of late commits after which the process crashes.
CRASH_AFTER_LATE_SHARE = 0.5
Answer = TypeVar("Answer")
# What happens to a request.
Fate = Literal["served", "refused", "reply-lost", "late"]


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """Shares are of messages unless stated otherwise; times in seconds.

    `latency_s`: longest time of one way. `request_timeout_s`, `delivery_timeout_s`: when a client gives up a request, a
    batch of records. `preempt_share`: requests during which other processes get a turn. `delay_share`: messages that
    take up to `delay_s` longer. `commit_refused_share`, `commit_reply_lost_share`, `commit_late_share`: of commits.
    `undelivered_share`: of batches of records. `fetch_delay_share`: fetches of a partition that come up to
    `fetch_delay_s` later than those of the others. `skipped_share`: fetches of a group member that omit their first
    records, once at each offset: a bug in a client library.
    """

    latency_s: float = 0.001
    request_timeout_s: float = 1.0
    delivery_timeout_s: float = 2.0
    preempt_share: float = 0.05
    delay_share: float = 0.0
    delay_s: float = 0.3
    commit_refused_share: float = 0.0
    commit_reply_lost_share: float = 0.0
    commit_late_share: float = 0.0
    undelivered_share: float = 0.0
    fetch_delay_share: float = 0.0
    fetch_delay_s: float = 0.5
    skipped_share: float = 0.0


class RequestTimeout(BrokerError):
    """No answer came in time: the broker may have served the request, may serve it later, or never."""


class Network:
    """All connections to the broker."""

    def __init__(self, world: World, faults: NetworkFaults) -> None:
        self.world = world
        self.faults = faults
        self.connections: list[Connection] = []

    def clog(self, count: int, duration_s: float) -> None:
        """Clog up to `count` connections. They are released one by one, the first after `duration_s` at the latest."""
        chance = self.world.chance
        unclogged = [connection for connection in self.connections if not connection.clogged]
        for connection in chance.sample(unclogged, min(count, len(unclogged))):
            connection.clogged = True
            self.world.log("network", f"{connection.name} is clogged")
        self.world.at(chance.uniform(0.2, 1.0) * duration_s, lambda: self._release_one(duration_s))

    def cut(self, life: Life) -> None:
        """Cut the connections of a process that has ended."""
        for connection in [connection for connection in self.connections if connection.life is life]:
            connection.cut()

    def release_all(self) -> None:
        """Release every clogged connection, in random order."""
        clogged = self._clogged()
        self.world.chance.shuffle(clogged)
        for connection in clogged:
            connection.release()

    def _clogged(self) -> list[Connection]:
        return [connection for connection in self.connections if connection.clogged]

    def _release_one(self, duration_s: float) -> None:
        clogged = self._clogged()
        if not clogged:
            return
        self.world.chance.choice(clogged).release()
        self.world.fire("connection-released")
        self.world.at(self.world.chance.uniform(0.0, 0.5) * duration_s, lambda: self._release_one(duration_s))


class Connection:
    """One client's connection. Messages arrive in the order in which the client sends them."""

    def __init__(self, network: Network, life: Life, name: str) -> None:
        self.name = f"{life.name}/{name}"
        self.clogged = False
        self.life = life
        self._network, self._world = network, network.world
        self._delayed: deque[Callable[[], None]] = deque()
        self._free_s = 0.0
        self._lost = False
        network.connections.append(self)

    def send(self, action: Callable[[], None]) -> None:
        """Send a message; `action` runs when it arrives at the broker. The client does not wait."""
        world = self._world
        # not before the message before it
        self._free_s = max(self._free_s, world.now_s + self._latency_s())
        world.at(self._free_s - world.now_s, lambda: self._arrive(action))

    def call(self, name: str, action: Callable[[], Answer], fate: Fate = "served") -> Answer:
        """Send a request, and wait for the answer of `action`; raises RequestTimeout and what `action` raises.

        The process may crash before the request, and after the broker has served it.
        """
        world, faults = self._world, self._network.faults
        self.life.fault_point(name)
        deadline_s = world.now_s + faults.request_timeout_s
        answers: list[Answer | BrokerError] = []

        def serve() -> None:
            try:
                answers.append(action())
            except BrokerError as error:
                answers.append(error)

        alone = not world.happens(faults.preempt_share)
        world.wait(max(world.now_s + self._latency_s(), self._free_s), alone=alone)
        lost = self._serve(name, serve, fate)
        if not lost:
            world.wait(deadline_s, lambda: bool(answers), alone=alone)
            world.wait(world.now_s + self._latency_s(), alone=alone)
        else:
            world.wait(deadline_s)
        self.life.fault_point(f"{name}: {'no answer' if lost or not answers else 'answered'}")
        if lost or not answers:
            raise RequestTimeout(f"{name}: no answer within {faults.request_timeout_s:g} s")
        answer = answers[0]
        if isinstance(answer, BrokerError):
            raise answer
        return answer

    def release(self) -> None:
        """Release the connection: the delayed messages arrive, in order."""
        self.clogged = False
        self._world.log("network", f"{self.name} is released")
        while self._delayed:
            self._delayed.popleft()()

    def cut(self) -> None:
        """Close the connection of a process that has ended. Its messages under way arrive, or get lost, by chance."""
        if self._world.chance.random() < 0.5:
            self._delayed.clear()
            self._lost = True
        if not self._delayed:
            self.clogged = False
            if self in self._network.connections:
                self._network.connections.remove(self)

    def _serve(self, name: str, serve: Callable[[], None], fate: Fate) -> bool:
        """Deliver a request according to its fate; returns whether the client gets no answer."""
        world, faults = self._world, self._network.faults
        if fate == "refused":
            world.fire("commit-failed")
            raise BrokerError(f"{name}: refused: the coordinator is not available")
        if fate == "late":
            world.fire("commit-late")
            delay_s = faults.request_timeout_s * world.chance.choice([1.05, 1.2, 2.0, 4.0])
            world.at(delay_s, partial(self._serve_late, serve))
            return True
        self._arrive(serve)
        if fate == "reply-lost":
            world.fire("commit-reply-lost")
            return True
        return False

    def _serve_late(self, serve: Callable[[], None]) -> None:
        """Serve a late commit, and crash the process soon: only a process that commits no more shows the damage."""
        serve()
        if self._world.happens(CRASH_AFTER_LATE_SHARE):
            self.life.crash_soon()

    def _arrive(self, action: Callable[[], None]) -> None:
        if self._lost:
            return
        if self.clogged:
            self._world.fire("connection-clogged")
            self._delayed.append(action)
        else:
            action()

    def _latency_s(self) -> float:
        world, faults = self._world, self._network.faults
        latency_s = faults.latency_s * world.chance.random()
        if world.happens(faults.delay_share):
            world.fire("message-delay")
            latency_s += faults.delay_s * world.chance.random()
        return latency_s
