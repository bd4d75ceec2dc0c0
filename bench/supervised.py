"""The processes of a service with several workers: its supervisor, the workers, and the standby."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from contextlib import suppress

import psutil

from bench.embedded import ServiceProcess
from cascade.errors import LocalPartError

STANDBY_READY = re.compile(rb'^cascade_standby_ready\{worker="shared"\} 1', re.MULTILINE)
ANSWER_S_MAX = 5.0


class Supervised:
    """Signals to the processes of a service; `service` runs with `worker.processes` above 1."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service

    def workers(self) -> list[psutil.Process]:
        """The workers, in the order in which their processes started: each is connected to the broker."""
        return [child for child in self._children() if _is_connected(child)]

    def standby_ready(self) -> bool:
        """Whether the standby has loaded everything, by the supervisor's metrics."""
        config = self._service.config.health
        try:
            with urllib.request.urlopen(f"http://{config.host}:{config.port}/metrics", timeout=ANSWER_S_MAX) as answer:
                return STANDBY_READY.search(answer.read()) is not None
        except OSError:
            return False

    def kill(self, number: int, with_standby: bool) -> None:
        """Kills (SIGKILL) a worker, and the standby too if `with_standby`; raises LocalPartError if no worker runs.

        `number`: modulo the workers that run.
        """
        children = self._children()
        workers = [child for child in children if _is_connected(child)]
        if not workers:
            raise LocalPartError("no worker runs")
        chosen = [workers[number % len(workers)]]
        if with_standby:
            chosen += [child for child in children if child not in workers]
        for process in chosen:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def freeze(self) -> None:
        """Suspends the supervisor, which then restarts no worker; the workers go on."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resumes the supervisor."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if (pid := self._service.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _children(self) -> list[psutil.Process]:
        if (pid := self._service.pid) is None:
            return []
        with suppress(psutil.NoSuchProcess):
            return sorted(psutil.Process(pid).children(), key=lambda child: (child.create_time(), child.pid))
        return []


def _is_connected(process: psutil.Process) -> bool:
    try:
        return any(found.status == psutil.CONN_ESTABLISHED for found in process.net_connections("tcp"))
    except psutil.Error:
        return False
