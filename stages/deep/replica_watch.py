"""Keeps the replicas up to date: connects to new ones, checks all of them, and disconnects those that are gone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from cascade.errors import DeepStageError, ModelServerError
from stages.deep.replicas import Address, Replica, Replicas
from stages.deep.triton_connection import TritonConnection

# A replica that is not ready yet has its share of the requests within a second of being ready.
CHECK_EVERY_S: Final = 0.4
# A check takes about a millisecond of the worker's CPU time.
CHECK_READY_EVERY_S: Final = 0.9
# A healthy server answers a check in some milliseconds, whatever its queue.
ANSWER_S_MAX: Final = 1.0
# So that clients that start together do not check at the same moments.
_JITTER_SHARE: Final = 0.25


class ReplicaWatch:
    """The life of each replica, from the first check to the end of its connection; on one asyncio loop."""

    def __init__(self, replicas: Replicas[TritonConnection]) -> None:
        self._replicas = replicas
        self._connected: dict[Replica[TritonConnection], asyncio.Task[None]] = {}
        self._due: dict[Replica[TritonConnection], asyncio.Event] = {}

    @property
    def connected(self) -> int:
        """The number of connected replicas, with retired ones that still have requests."""
        return len(self._connected)

    async def update(self, addresses: Iterable[Address]) -> None:
        """Adds and retires replicas: see `Replicas.update`."""
        for replica in self._replicas.update(addresses):
            self._due[replica] = asyncio.Event()
            self._connected[replica] = asyncio.create_task(self._tend(replica, self._due[replica]))

    def check_now(self, replica: Replica[TritonConnection]) -> None:
        """Check a replica without waiting for its next turn, since its connection has ended."""
        if replica in self._due:
            self._due[replica].set()

    async def _tend(self, replica: Replica[TritonConnection], due: asyncio.Event) -> None:
        answers = 0
        while not replica.retired:
            # an answered request shows as much as a check, so on a busy stream the checks cost nothing
            if not replica.ready or replica.answers == answers:
                await self._check(replica)
            answers = replica.answers
            pause_s = CHECK_READY_EVERY_S if replica.ready else CHECK_EVERY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s * (1 - _JITTER_SHARE * random.SystemRandom().random())):
                    await due.wait()
            due.clear()
        # its last requests may still be answered
        while replica.outstanding:
            await asyncio.sleep(CHECK_EVERY_S)
        del self._connected[replica], self._due[replica]
        await replica.connection.close()

    async def _check(self, replica: Replica[TritonConnection]) -> None:
        # another server may have the address of one that was not ready, or that one may have another model
        connection, whole = replica.connection, not replica.ready
        check = asyncio.create_task(connection.check_model() if whole else connection.check_ready())
        await asyncio.wait([check], timeout=ANSWER_S_MAX)
        if not check.done():
            self._replicas.late(replica, f"no answer for {ANSWER_S_MAX:g} s")
            # it goes on, and is the only one until it ends: this client cancels no request early (decision 3)
            await asyncio.wait([check])
        try:
            await check
        except DeepStageError as error:
            # overload must not take away a replica that fits
            found = self._replicas.late if error.overloaded else self._replicas.not_ready
            found(replica, str(error))
        except ModelServerError as error:
            self._replicas.not_ready(replica, str(error), differs=True)
        else:
            if whole or replica.ready:
                self._replicas.passed(replica)

    async def close(self) -> None:
        """Closes all connections, after the end of all tasks."""
        for replica in self._connected:
            await replica.connection.close()
        self._connected.clear()
