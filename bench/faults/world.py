"""Simulated time: one queue of events, and processes that take turns, all in one thread.

A process that waits runs the events and the other processes that are due meanwhile, on its own stack. So a process can
be interrupted at each of its external calls, and two processes can be between the same two side effects. The
interrupted process continues only after the process that interrupted it. A wait may therefore last longer than
requested, as on a loaded machine.

Source: Zhou et al., "FoundationDB", SIGMOD 2021, section 4 (deterministic simulation).
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Literal, Protocol, get_args

# The least duration of an external call. Without it a loop that never waits would stop simulated time.
CALL_S = 20e-6
NEVER_S = float("inf")
# A crash that follows a late commit strikes within this number of external calls.
CRASH_SOON_CALLS_MAX = 10
# Upper bound on the events and turns of a run: about a hundred times what a run needs.
ROUNDS_MAX = 2_000_000
# The kinds of fault. A run counts how often each struck.
Kind = Literal[
    "crash",
    "zombie",
    "clock-jump",
    "restarted",
    "message-delay",
    "connection-clogged",
    "connection-released",
    "reordered-partitions",
    "records-skipped",
    "commit-failed",
    "offsets-refused",
    "commit-reply-lost",
    "commit-late",
    "delivery-failed",
    "producer-fenced",
    "transaction-timeout",
    "rebalance",
    "rebalance-in-replay",
    "session-expired",
    "offsets-expired",
    "input-duplicate",
    "malformed-message",
    "upstream-aborted",
    "model-slow",
    "model-lying",
    "model-late-answer",
    "model-doubled-answer",
    "disk-full",
    "snapshot-torn",
    "snapshot-slow",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class SimCrash(BaseException):
    """The process crashes at this call. A BaseException, so that no `except Exception` catches it."""


class SimTooLong(BaseException):
    """The run exceeds ROUNDS_MAX."""


class Scheduled(Protocol):
    """A process that the world schedules. `wake_s`: time of its next turn. `running`: a turn of it has not returned."""

    wake_s: float
    running: bool

    def turn(self) -> None:
        """Take one step."""
        ...


class World:
    """Clock, random generator, trace and scheduled processes of one run. `now_s`: seconds since the run began.

    `calm`: no new fault strikes. `fired`: number of faults by kind. `trace`: (seconds, actor, event).

    >>> world, seen = World(7), []
    >>> world.at(2.0, lambda: seen.append(world.now_s))
    >>> world.wait(1.5), seen, world.wait(5.0, lambda: bool(seen)), seen
    (False, [2.0], True, [2.0])
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.calm = False
        self.fired: Counter[str] = Counter()
        self.trace: list[tuple[float, str, str]] = []
        self.processes: list[Scheduled] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._rounds = 0
        # the ends of the waits that are in progress further down the stack
        self._waiting_until_s: list[float] = []

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in `delay_s` seconds."""
        self._number += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._number, action))

    def fire(self, kind: Kind) -> None:
        """Count a fault that struck; raises ValueError for a kind that is not in KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind} is not a kind of fault")
        self.fired[kind] += 1
        self.log("fault", kind)

    def log(self, actor: str, event: str) -> None:
        """Add a line to the trace."""
        self.trace.append((self.now_s, actor, event))

    def happens(self, share: float) -> bool:
        """True with probability `share`; never once the run is calm."""
        return share > 0.0 and not self.calm and self.chance.random() < share

    @property
    def limit_s(self) -> float:
        """The earliest end of the waits that are in progress further down the stack."""
        return min(self._waiting_until_s, default=NEVER_S)

    def wait(self, until_s: float, ready: Callable[[], bool] | None = None, alone: bool = False) -> bool:
        """Let time pass until `until_s`, or until `ready` returns true; returns whether it did.

        `alone`: no other process gets a turn meanwhile.
        """
        while True:
            self._rounds += 1
            if self._rounds > ROUNDS_MAX:
                raise SimTooLong
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

    def _next_turn(self) -> Scheduled | None:
        idle = (process for process in self.processes if not process.running)
        return min(idle, key=lambda process: process.wake_s, default=None)


class Life:
    """The lifetime of one process. Each external call passes `fault_point`, where a crash or a freeze may strike.

    crash_in: the number of the call at which the process crashes; 0: never.
    freeze_in: the number of the call at which it freezes; 0: never. A frozen process sends no heartbeats.
    freeze_s: duration of the freeze, seconds.
    """

    def __init__(self, world: World, name: str, crash_in: int = 0, freeze_in: int = 0, freeze_s: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.frozen = False
        self.calls = 0
        self.on_thaw: Callable[[], None] = lambda: None
        self._crash_in, self._freeze_in, self._freeze_s = crash_in, freeze_in, freeze_s

    @property
    def heartbeats(self) -> bool:
        """Whether the process sends heartbeats."""
        return not self.dead and not self.frozen

    def check(self) -> None:
        """Raise SimCrash if the process has been killed."""
        if self.dead:
            raise SimCrash(self.name)

    def fault_point(self, call: str) -> None:
        """Trace an external call, at which the process may crash or freeze; raises SimCrash."""
        self.check()
        world = self.world
        self.calls += 1
        world.log(self.name, call)
        if world.calm:
            return
        if self.calls == self._crash_in:
            world.fire("crash")
            self.dead = True
            raise SimCrash(self.name)
        if self.calls == self._freeze_in:
            self._freeze()

    def crash_soon(self) -> None:
        """Schedule a crash at one of the next calls."""
        self._crash_in = self.calls + self.world.chance.randint(1, CRASH_SOON_CALLS_MAX)

    def _freeze(self) -> None:
        world = self.world
        world.log(self.name, f"freezes for {self._freeze_s:.1f} s")
        self.frozen = True
        world.wait(world.now_s + self._freeze_s, lambda: world.calm)
        self.frozen = False
        world.log(self.name, "thaws")
        self.check()
        self.on_thaw()
