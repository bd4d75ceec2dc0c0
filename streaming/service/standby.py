"""The standby of a supervisor: a process that has everything loaded, and becomes the next worker that is needed.

A new process takes seconds of CPU time before it joins the group: imports, models, kernels. The standby has spent them
ahead. It has no state of any partition, no membership in the group and no connection to the broker. It gets the number
of its worker as a line on its standard input, and is a worker from then on; another standby is started when all workers
are ready.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from cascade.local_parts import OwnedProcess
from streaming.service.serve import configure_log, load, serve
from streaming.service.worker_memory import WorkerMemory
from streaming.service.worker_report import WorkerSlot, settings_in

log = structlog.get_logger()
# A standby that ends by itself is started again, but not at once: no transaction waits for it.
RESTART_PAUSE_S = 30.0
STOP_S = 2.0


class Standby:
    """Starts a standby process, and hands it out. For any thread.

    make: the process, which is not started yet. memory: has the id of the standby that is ready.
    """

    def __init__(self, make: Callable[[], OwnedProcess], memory: WorkerMemory) -> None:
        self._make, self._memory = make, memory
        self._lock = threading.Lock()
        self._process: OwnedProcess | None = None
        self._started_s = -RESTART_PAUSE_S

    @property
    def ready(self) -> bool:
        """Whether a standby has loaded everything and waits."""
        with self._lock:
            pid = None if self._process is None else self._process.pid
            return pid is not None and self._memory.read() == _message(pid)

    def start(self) -> None:
        """Starts a standby, if there is none; raises LocalPartError."""
        with self._lock:
            if self._process is not None and self._process.running:
                return
            now_s = time.monotonic()
            if self._process is not None:
                if now_s - self._started_s < RESTART_PAUSE_S:
                    return
                log.warning("the standby ended: starting another", status=self._process.exit_status)
            self._process, self._started_s = self._make(), now_s
            self._process.start()

    def take(self, number: int) -> OwnedProcess | None:
        """Returns the standby, which is worker `number` from now on; None if none runs.

        It may still be loading: it is ahead of a new process in any case.
        """
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        try:
            process.write_line(str(number))
        except OSError:
            process.stop(STOP_S)
            return None
        return process

    def stop(self) -> None:
        """Ends the standby."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.stop(STOP_S)


def stand_by(memory: WorkerMemory, of_workers: Sequence[WorkerMemory]) -> None:
    """The standby's process: loads everything, waits for its number, and runs the worker until SIGTERM.

    memory: for its own id. of_workers: the memory of each worker, by its number. Returns if the supervisor ends before
    it sends a number. Raises CascadeError as `serve` does.
    """
    # what all workers have alike
    config = settings_in(os.environ, 0)
    configure_log(config.log)
    loaded = load(config)
    memory.write(_message(os.getpid()))
    line = sys.stdin.readline()
    if line:
        number = int(line)
        serve(settings_in(os.environ, number), slot=WorkerSlot(number, of_workers[number]), loaded=loaded)


def _message(pid: int) -> bytes:
    return str(pid).encode()
