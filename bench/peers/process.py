"""A peer as a process: its arguments, its start and its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from cascade.errors import LocalPartError
from cascade.local_parts import OwnedProcess, local_parts_dir

READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 30.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where a peer works: `transactions` and `decisions` are topics; `out` is a directory for state and log."""

    bootstrap: str
    transactions: str
    decisions: str
    group: str
    out: Path

    def arguments(self) -> list[str]:
        """The options of the command line, one for each field but `out`."""
        values = {name: value for name, value in asdict(self).items() if name != "out" and value is not None}
        return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Job):
    """The arguments of a peer that decides.

    `triton_grpc` is `host:port`; `triton_http` is the base of its URLs. A peer escalates the scores from the log-odds
    `escalate_above` on, or, where that is None, about the share `escalate_share` with the highest scores: a peer
    computes fewer features than Cascade, so the policy's threshold would escalate another share.
    """

    bundle: Path
    triton_grpc: str
    triton_http: str
    escalate_share: float = 0.01
    escalate_above: float | None = None

    def arguments(self) -> list[str]:
        """The command line that every peer that decides understands."""
        return [*Job.arguments(self), f"--state={self.out / 'state'}"]


def peer_directory(name: str) -> Path:
    """Where the peer of that name is installed."""
    return local_parts_dir().absolute() / "peers" / name


class Peer(Protocol):
    """An application with the task of Cascade's service."""

    @property
    def name(self) -> str:
        """The name in scenarios."""

    def missing(self) -> str | None:
        """Why the peer cannot run here, with the remedy, as a single line; None where it can."""

    def install(self, report: Callable[[str], None]) -> None:
        """Installs what the peer needs, if it is not there; raises LocalPartError where that fails."""

    def run(self, work: Work) -> PeerProcess:
        """Makes the peer's process, not started yet; raises LocalPartError where the peer is missing."""


class PeerProcess(OwnedProcess):
    """A peer's process, a `Service` of the bench without a ledger.

    name: of the peer; its log is written to `work.out`.
    command: to run, without the arguments of `work`.
    environment: variables beside those of this process.
    work: the peer's arguments.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], work: Job) -> None:
        # a peer computes a row at a time, so more threads would only wait for each other
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        super().__init__(name, [*command, *work.arguments()], work.out / f"{name}.log", inherited)
        self._work = work

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when the peer's group is stable; raises LocalPartError where the peer ends or takes longer."""
        from kafka import KafkaAdminClient

        give_up_s = time.monotonic() + timeout_s
        with closing(KafkaAdminClient(bootstrap_servers=self._work.bootstrap.split(","))) as admin:
            while not self._joined(admin):
                self.check_running()
                if time.monotonic() > give_up_s:
                    raise LocalPartError(f"{self.name} has no partitions after {timeout_s:g} s: {self.log_tail()}")
                time.sleep(_POLL_S)

    def _joined(self, admin: object) -> bool:
        from kafka.errors import KafkaError

        try:
            group = admin.describe_groups([self._work.group])[self._work.group]  # type: ignore[attr-defined]
        except KafkaError:
            return False  # the broker has no such group yet
        return bool(group["group_state"] == "Stable" and group["members"])

    def stop(self, grace_s: float = STOP_GRACE_S) -> bool:
        """Sends SIGTERM, after which the peer commits and ends; kills it after `grace_s`."""
        return super().stop(grace_s)
