"""What the embedded parts share: their directory, free ports, and processes that never outlive their owner.

An embedded part is a server that runs beside the service on one machine, for the demo, for tests and for work on a
laptop: the local Kafka broker and the local Triton.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Self

from cascade.errors import LocalPartError

MARKER = "installed.json"
# Below Linux's ephemeral range (32768 and up): there, a client that retries a dead local port may be given that very
# port for its own end, connects to itself, and keeps the server from coming back.
PORT_FIRST, PORT_LAST = 20_000, 32_000
_PORT_TRIES_MAX = 10_000
_TAIL_LINES, _TAIL_LINE_CHARACTERS = 3, 240
_TELLING = re.compile(r"error|exception|fatal|failed", re.IGNORECASE)
_POLL_S = 0.05
_LAUNCH_TIMEOUT_S = 30.0
_STDERR = 2

# Runs in the child, then becomes the part itself by exec, which keeps the death signal: the kernel kills the part
# when its owner dies, however it dies (SIGKILL included, where no handler of ours could run). A preexec_fn would do
# the same in fewer lines, but it runs Python between fork and exec in a process whose other threads hold locks.
# An owner that died before prctl is noticed by the changed parent.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def local_parts_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Where embedded parts are installed: `$CASCADE_LOCAL_DIR`, else `share/cascade` of the Python environment."""
    chosen = environment.get("CASCADE_LOCAL_DIR", "")
    return Path(chosen) if chosen else Path(sys.prefix) / "share" / "cascade"


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that nothing listens on; raises LocalPartError where none is left."""
    ports: list[int] = []
    chooser = random.SystemRandom()
    with ExitStack() as held:
        for _ in range(_PORT_TRIES_MAX):
            if len(ports) == count:
                return ports
            port = chooser.randrange(PORT_FIRST, PORT_LAST)
            listener = held.enter_context(socket.socket())
            # As the servers bind: a port of which only closed connections are left counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen()
            except OSError:
                continue
            ports.append(port)
    raise LocalPartError(f"no {count} free ports between {PORT_FIRST} and {PORT_LAST}; stop other servers")


def read_marker(directory: Path) -> dict[str, object] | None:
    """The record that an installation left in `directory`; None where there is none or it cannot be read."""
    try:
        content = json.loads((directory / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory beside `directory`, which it replaces when the block ends without an error.

    What is written is thus there as a whole or not at all.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield staged
        staged.chmod(0o755)
        old = staged.with_name(staged.name + "-old")
        if directory.exists():
            directory.rename(old)
        staged.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def install_lock(directory: Path) -> Iterator[None]:
    """Hold the lock on installing `directory`, so that two processes that install at once do it one by one."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class OwnedProcess:
    """One process of ours: its output in a log file, its life bounded by its owner's.

    It ends with `stop()` or `kill()`, when the interpreter exits, and when the owner is killed (Linux).

    `name` is for messages; `command[0]` is an absolute path; `environment` is the whole environment of the child.
    `log` None: its output goes to our standard error.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path | None, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._log_start = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process; raises LocalPartError where it cannot be started."""
        if self.running:
            return
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._log_start = self.log.stat().st_size if self.log.exists() else 0
        launched = threading.Event()
        failure: list[OSError] = []

        def keep() -> None:
            # The death signal of Linux follows the thread that started the child, not the process: this thread
            # lives as long as the child, whichever thread of ours called start().
            try:
                self._process = self._launch()
            except OSError as error:
                failure.append(error)
                return
            finally:
                launched.set()
            self._process.wait()

        self._keeper = threading.Thread(target=keep, name=f"keeper of {self.name}", daemon=True)
        self._keeper.start()
        launched.wait(_LAUNCH_TIMEOUT_S)
        if failure:
            raise LocalPartError(f"{self.name} cannot be started: {failure[0]}")
        atexit.register(self._stop_at_exit, os.getpid())

    def _launch(self) -> subprocess.Popen[bytes]:
        with nullcontext(_STDERR) if self.log is None else self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # A session of its own: Ctrl-C in the terminal is the owner's to act on, and a kill reaches helpers.
                start_new_session=True,
            )

    @property
    def exit_status(self) -> int | None:
        """How it ended, negative for a signal; None while it runs, and before it was started."""
        return None if self._process is None else self._process.poll()

    def stop(self, grace_s: float = 15.0) -> bool:
        """Ask the process to end, and kill it and its helpers after `grace_s` seconds: then False."""
        process, in_time = self._process, True
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                in_time = False
                self.kill()
        self._release()
        return in_time

    def kill(self) -> None:
        """End the process and its helpers at once (SIGKILL)."""
        process = self._process
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._release()

    def freeze(self) -> None:
        """Let the process and its helpers stand still (SIGSTOP), as a hung machine would; harmless where it has ended.

        On return no thread of the process runs: the signal itself is acted on only when one of them is scheduled, and
        until then a server still answers.
        """
        pid = self.pid
        if pid is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.killpg(pid, signal.SIGSTOP)
                os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let a frozen process go on; harmless where it is not frozen or not running."""
        pid = self.pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGCONT)

    def _release(self) -> None:
        atexit.unregister(self._stop_at_exit)
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None

    def _stop_at_exit(self, owner_pid: int) -> None:
        # A fork of the owner inherits this handler but not the process.
        if os.getpid() == owner_pid:
            self.stop()

    def log_tail(self) -> str:
        """What this run has logged last about a failure, else last of all, as one line."""
        if self.log is None:
            return "see above"
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                text = log.read().decode(errors="replace")
        except OSError:
            return "no log"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in lines if _TELLING.search(line)] or lines
        return " | ".join(line[:_TAIL_LINE_CHARACTERS] for line in lines[-_TAIL_LINES:]) or "the log is empty"

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once `ready()` holds; raises LocalPartError where the process ends or `timeout_s` seconds pass."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.running:
                raise LocalPartError(f"{self.name} ended while starting; its log {self.log} ends: {self.log_tail()}")
            if time.monotonic() >= deadline:
                raise LocalPartError(
                    f"{self.name} was not ready within {timeout_s:g} s; its log {self.log} ends: {self.log_tail()}"
                )
            time.sleep(_POLL_S)
