"""A peer as a process: what it is given, when it is ready, how it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from cascade.errors import LocalPartError
from cascade.local_parts import OwnedProcess

READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 30.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a peer reads, asks and writes; topics and the directory `out` (state and log) are its own.

    `triton_grpc`: `host:port`; `triton_http`: the base of its URLs. Escalated is what reaches the log-odds
    `escalate_above`, or, where that is None, about the share `escalate_share` with the highest scores: peers compute
    fewer features than Cascade, so a threshold of its policy would mean another share to them.
    """

    bootstrap: str
    transactions: str
    decisions: str
    group: str
    bundle: Path
    triton_grpc: str
    triton_http: str
    out: Path
    escalate_share: float = 0.01
    escalate_above: float | None = None

    def arguments(self) -> list[str]:
        """The command line that every peer understands."""
        values: dict[str, object] = {
            "bootstrap": self.bootstrap, "transactions": self.transactions, "decisions": self.decisions,
            "group": self.group, "bundle": self.bundle, "triton-grpc": self.triton_grpc,
            "triton-http": self.triton_http, "state": self.out / "state", "escalate-share": self.escalate_share,
        }  # fmt: skip
        if self.escalate_above is not None:
            values["escalate-above"] = self.escalate_above
        return [f"--{name}={value}" for name, value in values.items()]


class Peer(Protocol):
    """An application that does the work of Cascade's service."""

    @property
    def name(self) -> str:
        """As scenarios name it."""
        ...

    def missing(self) -> str | None:
        """Why it cannot run here, with the remedy, as one line; None where it can."""
        ...

    def install(self, report: Callable[[str], None]) -> None:
        """Bring what it needs, once; raises LocalPartError where that fails."""
        ...

    def run(self, work: Work) -> PeerProcess:
        """It as a process, not yet started; raises LocalPartError where it is missing."""
        ...


class PeerProcess:
    """A peer that runs; a context manager that starts it and stops it, and a `Service` of the bench.

    `log`: the file of its output.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], work: Work) -> None:
        """`environment`: beside that of this process."""
        self.name, self.log, self._work = name, work.out / f"{name}.log", work
        work.out.mkdir(parents=True, exist_ok=True)
        # its arithmetic is a row at a time: more threads would only wait for each other
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = OwnedProcess(name, [*command, *work.arguments()], self.log, inherited)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run. There are no helpers."""
        return self._process.pid

    def log_tail(self) -> str:
        """What it has logged last, as one line."""
        return self._process.log_tail()

    def start(self) -> None:
        """Start it and return at once."""
        self._process.start()

    def check_running(self) -> None:
        """Raise LocalPartError where it has ended."""
        if not self._process.running:
            raise LocalPartError(f"{self.name} ended: {self.log_tail()}")

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return once its group has partitions; raises LocalPartError where it ends or takes longer."""
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
            return False  # not known yet
        return bool(group["group_state"] == "Stable" and group["members"])

    def stop(self) -> None:
        """SIGTERM; it commits and ends, or is killed after half a minute."""
        self._process.stop(STOP_GRACE_S)
