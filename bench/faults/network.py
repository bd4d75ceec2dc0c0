"""Connections between processes and the broker, with their faults.

A request travels, is served, and its answer travels back; each of the three can go wrong. What is sent over a clogged
connection is held, in order, and arrives when the connection is released, also where nobody waits for it any more:
that is how a commit comes late. Clogged connections are released one by one in random order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from bench.faults.world import Life, World
from cascade.errors import BrokerError

CRASH_AFTER_LATE_SHARE = 0.5
Answer = TypeVar("Answer")
Fate = Literal["served", "refused", "reply-lost", "late"]


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad the network is. Shares are of requests or records, times in seconds.

    `latency_s`: one way, at most. `request_timeout_s`: after it a client gives a request up. `delivery_timeout_s`: the
    same for records. `preempt_share`: requests during which other processes get a turn. `refused_share`,
    `reply_lost_share`, `late_share`: of commits. `undelivered_share`: of batches of records. `held_share`: fetches of a
    partition that lag behind those of the others, by up to `held_s`. `skipped_share`: fetches of a group's member that
    leave out their first records, once at each place: a client library with a bug.
    """

    latency_s: float = 0.001
    request_timeout_s: float = 1.0
    delivery_timeout_s: float = 2.0
    preempt_share: float = 0.05
    delay_share: float = 0.0
    delay_s: float = 0.3
    refused_share: float = 0.0
    reply_lost_share: float = 0.0
    late_share: float = 0.0
    undelivered_share: float = 0.0
    held_share: float = 0.0
    held_s: float = 0.5
    skipped_share: float = 0.0


class RequestTimeout(BrokerError):
    """No answer came: the request may be served, may be served later, or never."""


class Network:
    """All connections, and who of them is clogged."""

    def __init__(self, world: World, weather: Weather) -> None:
        self.world = world
        self.weather = weather
        self.links: list[Link] = []

    def clog(self, count: int, pause_s: float) -> None:
        """Clog up to `count` connections; from `pause_s` on they are released one by one."""
        chance = self.world.chance
        open_links = [one for one in self.links if not one.clogged]
        for link in chance.sample(open_links, min(count, len(open_links))):
            link.clogged = True
            self.world.tell("network", f"{link.name} is clogged")
        self.world.at(chance.uniform(0.2, 1.0) * pause_s, lambda: self._release_one(pause_s))

    def cut(self, life: Life) -> None:
        """A process is gone: so are its connections."""
        for link in [one for one in self.links if one.life is life]:
            link.cut()

    def release_all(self) -> None:
        """Release every connection, in random order."""
        clogged = [one for one in self.links if one.clogged]
        self.world.chance.shuffle(clogged)
        for link in clogged:
            link.release()

    def _release_one(self, pause_s: float) -> None:
        clogged = [one for one in self.links if one.clogged]
        if not clogged:
            return
        self.world.chance.choice(clogged).release()
        self.world.fire("connection-released")
        self.world.at(self.world.chance.uniform(0.0, 0.5) * pause_s, lambda: self._release_one(pause_s))


class Link:
    """One client's connection; what is sent over it arrives in order."""

    def __init__(self, network: Network, life: Life, name: str) -> None:
        self.name = f"{life.name}/{name}"
        self.clogged = False
        self.life = life
        self._network, self._world = network, network.world
        self._held: deque[Callable[[], None]] = deque()
        self._free_s = 0.0
        self._lost = False
        network.links.append(self)

    def send(self, action: Callable[[], None]) -> None:
        """Let the broker do something when this message arrives; nobody waits for it."""
        world = self._world
        # in order: not before what was sent earlier
        self._free_s = max(self._free_s, world.now_s + self._latency_s())
        world.at(self._free_s - world.now_s, lambda: self._arrive(action))

    def call(self, what: str, action: Callable[[], Answer], fate: Fate = "served") -> Answer:
        """Ask the broker for something and wait for the answer; raises what it raises, or RequestTimeout.

        The process may be killed before it asks, and after the broker has served it.
        """
        world, weather = self._world, self._network.weather
        self.life.point(what)
        deadline_s = world.now_s + weather.request_timeout_s
        answers: list[Answer | BrokerError] = []

        def serve() -> None:
            try:
                answers.append(action())
            except BrokerError as error:
                answers.append(error)

        alone = not world.happens(weather.preempt_share)
        world.wait(max(world.now_s + self._latency_s(), self._free_s), alone=alone)
        lost = self._serve(what, serve, fate)
        if not lost:
            world.wait(deadline_s, lambda: bool(answers), alone=alone)
            world.wait(world.now_s + self._latency_s(), alone=alone)
        else:
            world.wait(deadline_s, lambda: False)
        self.life.point(f"{what}: {'no answer' if lost or not answers else 'answered'}")
        if lost or not answers:
            raise RequestTimeout(f"{what}: no answer within {weather.request_timeout_s:g} s")
        answer = answers[0]
        if isinstance(answer, BrokerError):
            raise answer
        return answer

    def release(self) -> None:
        """Let everything through that was held, in its order."""
        self.clogged = False
        self._world.tell("network", f"{self.name} is released")
        while self._held:
            self._held.popleft()()

    def cut(self) -> None:
        """The process is gone; what it had sent may be lost on the way or not."""
        if self._world.chance.random() < 0.5:
            self._held.clear()
            self._lost = True
        if not self._held:
            self.clogged = False
            if self in self._network.links:
                self._network.links.remove(self)

    def _serve(self, what: str, serve: Callable[[], None], fate: Fate) -> bool:
        """Let a request arrive, or not; whether its answer will never come."""
        world, weather = self._world, self._network.weather
        if fate == "refused":
            world.fire("commit-failed")
            raise BrokerError(f"{what}: refused: the coordinator is not available")
        if fate == "late":
            world.fire("commit-late")
            world.at(
                weather.request_timeout_s * world.chance.choice([1.05, 1.2, 2.0, 4.0]), partial(self._serve_late, serve)
            )
            return True
        self._arrive(serve)
        if fate == "reply-lost":
            world.fire("commit-reply-lost")
            return True
        return False

    def _serve_late(self, serve: Callable[[], None]) -> None:
        """What a late commit spoils shows where the process is lost before it commits again."""
        serve()
        if self._world.happens(CRASH_AFTER_LATE_SHARE):
            self.life.crash_soon()

    def _arrive(self, action: Callable[[], None]) -> None:
        if self._lost:
            return
        if self.clogged:
            self._world.fire("connection-clogged")
            self._held.append(action)
        else:
            action()

    def _latency_s(self) -> float:
        world, weather = self._world, self._network.weather
        latency_s = weather.latency_s * world.chance.random()
        if world.happens(weather.delay_share):
            world.fire("message-delay")
            latency_s += weather.delay_s * world.chance.random()
        return latency_s
