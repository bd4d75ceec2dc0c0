"""The replicas of a model server: the state of each, and which of them gets the next request.

The next request goes to the ready replica with the fewest outstanding requests; among those, to the one that had the
fewest requests so far. Equal replicas so get equal shares, faster ones more under load, and one that answers nothing
stops to get any, because its requests stay outstanding. Decision 12 compares this with plain turns and others.

No sockets, threads or clocks here: the caller reports what happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from cascade.protocols import ReplicaState

# Each replica has a connection and a label in the metrics.
REPLICAS_MAX: Final = 64
# A replica that fails at once always has the fewest outstanding requests, and would get nearly all of them.
FAILURES_MAX: Final = 3
# A replica that was slow for a while does not get all the requests afterwards that it missed, but at most so many.
TURNS_BEHIND_MAX: Final = 32
_NOT_CHECKED: Final = "not checked yet"
_random = random.SystemRandom()


class Address(NamedTuple):
    """Where a replica listens.

    - `ip`, `port`: of the socket.
    - `host`: the name or address in the configuration, to which the server's certificate must belong.
    """

    ip: str
    port: int
    host: str

    @property
    def target(self) -> str:
        """`ip:port`, with an IPv6 address in brackets."""
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


Connection = TypeVar("Connection")


@dataclass(eq=False, slots=True)
class Replica(Generic[Connection]):
    """A replica. Its fields are set by `Replicas`.

    - `ready`: its last check succeeded, and no request has shown since that it is gone.
    - `fits`: its model is that of the bundle, by its last check, and it has been there since.
    - `checked`: whether any check has ended. `differs`: whether the last one found other tensors.
    - `problem`: why it is not ready; empty if it is.
    - `retired`: its address is gone. It gets no more requests.
    - `outstanding`: requests without an end, those included for which nobody waits any more.
    - `calls`, `answers`, `failures`: requests sent, answered, and failed, since it was added.
    - `failures_in_row`: failures since the last answer, without those of an overloaded replica.
    - `turns`: the requests that it had, as they count for its next one. `rank`: decides among equals.
    """

    address: Address
    connection: Connection
    rank: float
    ready: bool = False
    fits: bool = False
    checked: bool = False
    differs: bool = False
    problem: str = _NOT_CHECKED
    retired: bool = False
    outstanding: int = 0
    calls: int = 0
    answers: int = 0
    failures: int = 0
    failures_in_row: int = 0
    turns: int = 0


class Replicas(Generic[Connection]):
    """All replicas of a model server. For one thread, except `states`.

    - `connect`: makes the connection of a new replica.
    - `chance`: a number in [0, 1) for the rank of each replica: clients that start together prefer different ones.

    >>> replicas = Replicas(connect=lambda address: None, chance=lambda: 0.0)
    >>> for replica in replicas.update([Address("10.0.0.1", 8001, "triton"), Address("10.0.0.2", 8001, "triton")]):
    ...     replicas.passed(replica)
    >>> for _ in range(3):
    ...     chosen = replicas.choose()
    ...     replicas.sent(chosen)
    ...     print(chosen.address.target, chosen.outstanding)
    10.0.0.1:8001 1
    10.0.0.2:8001 1
    10.0.0.1:8001 2
    >>> replicas.ready
    2
    """

    def __init__(self, connect: Callable[[Address], Connection], chance: Callable[[], float] = _random.random) -> None:
        self._connect = connect
        # replaced as a whole, so other threads may read them
        self._all: tuple[Replica[Connection], ...] = ()
        self._choices: tuple[Replica[Connection], ...] = ()
        self._chance = chance
        self._turns = 0

    def update(self, addresses: Iterable[Address]) -> list[Replica[Connection]]:
        """Adds and retires replicas, so that there is one for each address; returns those added.

        No address changes nothing: a name service that is down must not end what works. More than REPLICAS_MAX
        addresses are cut to the first ones in their order.
        """
        wanted = {address.target: address for address in sorted(set(addresses))}
        wanted = dict(list(wanted.items())[:REPLICAS_MAX])
        if not wanted:
            return []
        known = {replica.address.target: replica for replica in self._all}
        new = [address for name, address in wanted.items() if name not in known]
        added = [Replica(address, self._connect(address), self._chance()) for address in new]
        for name in known.keys() - wanted.keys():
            known[name].retired, known[name].ready = True, False
        kept = [replica for replica in self._all if not replica.retired]
        self._all = (*kept, *added)
        self._find_choices()
        return added

    def choose(self, other_than: Replica[Connection] | None = None) -> Replica[Connection] | None:
        """The replica for the next request; None if there is none. `other_than`: a replica that is not chosen.

        If no replica is ready, it is one that fits and does not answer, or whose requests fail: a request does no harm.
        """
        best: Replica[Connection] | None = None
        for replica in self._choices:
            if replica is not other_than and (
                best is None or (replica.outstanding, replica.turns) < (best.outstanding, best.turns)
            ):
                best = replica
        return best

    def sent(self, replica: Replica[Connection]) -> None:
        """A request was sent. Exactly one of `answered` and `failed` follows."""
        replica.calls += 1
        replica.outstanding += 1
        replica.turns = max(replica.turns, self._turns - TURNS_BEHIND_MAX) + 1
        self._turns = max(self._turns, replica.turns)

    def answered(self, replica: Replica[Connection]) -> None:
        """A request was answered."""
        replica.outstanding -= 1
        replica.answers += 1
        replica.failures_in_row = 0

    def failed(self, replica: Replica[Connection], problem: str, gone: bool = False, overloaded: bool = False) -> None:
        """A request failed.

        - `gone`: the server refused the connection or closed it. The next server there may have another model, so the
          replica gets no request before its next check.
        - `overloaded`: its queue was full, or the request waited there too long, which is no fault of the replica.
        """
        replica.outstanding -= 1
        replica.failures += 1
        replica.fits = replica.fits and not gone
        if not overloaded:
            replica.failures_in_row += 1
        if gone or replica.failures_in_row >= FAILURES_MAX:
            self._set(replica, ready=False, problem=problem)

    def passed(self, replica: Replica[Connection]) -> None:
        """A check has found the replica ready, with the bundle's model."""
        replica.checked, replica.differs, replica.fits = True, False, True
        if not replica.ready:
            replica.failures_in_row, replica.turns = 0, self._turns
        self._set(replica, ready=True, problem="")

    def late(self, replica: Replica[Connection], problem: str) -> None:
        """A check has no answer yet, or found a full queue. The replica gets requests only if no other is ready."""
        replica.checked = True
        self._set(replica, ready=False, problem=problem)

    def not_ready(self, replica: Replica[Connection], problem: str, differs: bool = False) -> None:
        """A check has failed: the replica gets no request. `differs`: its model has other tensors than the bundle's."""
        replica.checked, replica.differs, replica.fits = True, differs, False
        self._set(replica, ready=False, problem=problem)

    def _set(self, replica: Replica[Connection], ready: bool, problem: str) -> None:
        replica.problem = problem
        if not replica.retired:
            replica.ready = ready
            self._find_choices()

    def _find_choices(self) -> None:
        ready = [replica for replica in self._all if replica.ready]
        found = ready or [replica for replica in self._all if replica.fits]
        self._choices = tuple(sorted(found, key=lambda replica: replica.rank))

    @property
    def ready(self) -> int:
        """The number of replicas that are ready."""
        return sum(replica.ready for replica in self._all)

    @property
    def all_checked(self) -> bool:
        """Whether there are replicas, and each was checked."""
        return bool(self._all) and all(replica.checked for replica in self._all)

    @property
    def all_differ(self) -> bool:
        """Whether there are replicas, and each serves a model with other tensors."""
        return bool(self._all) and all(replica.differs for replica in self._all)

    @property
    def problem(self) -> str:
        """The problem of the first replica, for a message that none is ready; empty if there is no replica."""
        if not self._all:
            return ""
        first = self._all[0]
        if len(self._all) == 1:
            return first.problem
        return f"none of {len(self._all)} replicas is ready; {first.address.target}: {first.problem}"

    def states(self) -> list[ReplicaState]:
        """The state of each replica, for any thread."""
        return [
            ReplicaState(replica.address.target, replica.ready, replica.problem, replica.calls, replica.failures)
            for replica in self._all
        ]
