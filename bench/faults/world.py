"""Simulated time: one queue of events and the processes that take turns, all in one thread.

Whoever waits gives the others their turn: what is due in the meantime runs inside the wait, on the waiter's stack. So a
process is interrupted at any of its calls to the outside, and two of them can be between the same two side effects; but
the one that was interrupted goes on only after the one that interrupted it. A wait may therefore last longer than
asked, as on a loaded machine.

Faults as tests on a simulated clock: Zhou et al., "FoundationDB", SIGMOD 2021, section 4.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Protocol

# What a call to the outside costs at least; time must go on, or a loop that never waits would stop it.
CALL_S = 20e-6
NEVER_S = float("inf")
# Within so many calls a process is killed that a late commit has just been served for.
SOON_POINTS = 10
# Things that happen in one run, some hundred times what a run has.
ROUNDS_MAX = 2_000_000
# Everything that can go wrong; each kind counts how often it did.
KINDS = (
    "crash", "zombie", "clock-jump", "restarted",
    "message-delay", "connection-clogged", "connection-released", "reordered-partitions",
    "records-skipped",
    "commit-failed", "commit-reply-lost", "commit-late", "delivery-failed", "producer-fenced", "transaction-timeout",
    "rebalance", "rebalance-in-replay", "session-expired", "offsets-expired",
    "input-duplicate", "malformed-message", "upstream-aborted",
    "model-slow", "model-lying", "model-late-answer", "model-doubled-answer",
    "disk-full", "snapshot-torn", "snapshot-slow",
)  # fmt: skip


class SimCrash(BaseException):
    """The process is gone at this call; no `except Exception` may keep it alive."""


class SimEndless(BaseException):
    """The run does not come to its end."""


class Turn(Protocol):
    """A process: `wake_s` is when it wants its next turn, `running` whether one of its turns has not ended."""

    wake_s: float
    running: bool

    def turn(self) -> None:
        """Do one thing."""
        ...


class World:
    """Time, chance, what happened, and who is there; `now_s` are seconds since the run began.

    >>> world, seen = World(7), []
    >>> world.at(2.0, lambda: seen.append(world.now_s))
    >>> world.wait(1.5), seen, world.wait(5.0, lambda: bool(seen)), seen
    (False, [2.0], True, [2.0])
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        # no fault begins any more
        self.calm = False
        self.fired: Counter[str] = Counter()
        self.trace: list[tuple[float, str, str]] = []
        self.turns: list[Turn] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._rounds = 0
        # until when those wanted to wait who gave others their turn
        self._waiting_until_s: list[float] = []

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Let something happen `delay_s` seconds from now."""
        self._number += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._number, action))

    def fire(self, kind: str) -> None:
        """A fault has struck; raises ValueError where it is none of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind} is no kind of fault")
        self.fired[kind] += 1
        self.tell("fault", kind)

    def tell(self, who: str, what: str) -> None:
        """Put a line into the trace."""
        self.trace.append((self.now_s, who, what))

    def happens(self, share: float) -> bool:
        """Whether chance says yes, which it does for `share` of the questions while faults are on."""
        return share > 0.0 and not self.calm and self.chance.random() < share

    @property
    def limit_s(self) -> float:
        """When the first of those wants to go on who wait further down the stack."""
        return min(self._waiting_until_s, default=NEVER_S)

    def wait(self, until_s: float, ready: Callable[[], bool] | None = None, alone: bool = False) -> bool:
        """Let time pass up to `until_s`, or until something that happened made it `ready`; whether it is.

        `alone`: no other process gets a turn meanwhile.
        """
        while True:
            self._rounds += 1
            if self._rounds > ROUNDS_MAX:
                raise SimEndless
            if ready is not None and ready():
                return True
            event_s = self._events[0][0] if self._events else NEVER_S
            due = None if alone else self._next_turn()
            turn_s = NEVER_S if due is None else due.wake_s
            if min(event_s, turn_s) > until_s:
                self.now_s = max(self.now_s, until_s)
                return False
            self.now_s = max(self.now_s, min(event_s, turn_s))
            if event_s <= turn_s:
                heapq.heappop(self._events)[2]()
            elif due is not None:
                self._waiting_until_s.append(until_s)
                due.turn()
                self._waiting_until_s.pop()

    def _next_turn(self) -> Turn | None:
        due = None
        for one in self.turns:
            if not one.running and (due is None or one.wake_s < due.wake_s):
                due = one
        return due


class Life:
    """One process from its start to its end, as the outside sees it: each of its calls passes `point`.

    `crash_in`, `freeze_in`: after how many points it is killed, or stands still for `freeze_s` seconds (both 0:
    never). A process that stands still does not heartbeat.
    """

    def __init__(self, world: World, name: str, crash_in: int = 0, freeze_in: int = 0, freeze_s: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.frozen = False
        self.points = 0
        # told when it goes on after it stood still
        self.on_thaw: Callable[[], None] = lambda: None
        self._crash_in, self._freeze_in, self._freeze_s = crash_in, freeze_in, freeze_s

    @property
    def beats(self) -> bool:
        """Whether its heartbeats go out."""
        return not self.dead and not self.frozen

    def check(self) -> None:
        """Raise SimCrash where the process is gone: it was killed from outside."""
        if self.dead:
            raise SimCrash(self.name)

    def point(self, what: str) -> None:
        """Here the process may be killed, or stand still; raises SimCrash."""
        self.check()
        world = self.world
        self.points += 1
        world.trace.append((world.now_s, self.name, what))
        if world.calm:
            return
        if self.points == self._crash_in:
            world.fire("crash")
            self.dead = True
            raise SimCrash(self.name)
        if self.points == self._freeze_in:
            self._freeze()

    def crash_soon(self) -> None:
        """Let the process be killed at one of its next calls."""
        self._crash_in = self.points + self.world.chance.randint(1, SOON_POINTS)

    def _freeze(self) -> None:
        world = self.world
        world.tell(self.name, f"stands still for {self._freeze_s:.1f} s")
        self.frozen = True
        world.wait(world.now_s + self._freeze_s, lambda: world.calm)
        self.frozen = False
        world.tell(self.name, "goes on")
        self.check()
        self.on_thaw()
