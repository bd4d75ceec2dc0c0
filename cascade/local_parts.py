"""What the embedded parts share: their directory, free ports, and processes that never outlive their owner.

An embedded part is a server that runs on the same machine as the service, for the demo, tests and development: the
local Kafka broker or the local Triton.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import json
import os
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

from cascade.errors import CascadeError, LocalPartError

MARKER = "installed.json"
# Below Linux's ephemeral range (32768 and up). A client that retries a dead server's port in that range may get the
# same port as its own; it then connects to itself, and the server cannot bind the port again.
PORT_FIRST, PORT_LAST = 20_000, 32_000
# Processes begin apart in the range, so that none draws a port which another has drawn, and whose server starts later.
_PORTS_OF_A_PROCESS = 100
_drawn = itertools.count()
_TAIL_LINES, _TAIL_LINE_CHARACTERS = 3, 240
_FAILURE = re.compile(r"error|exception|fatal|failed", re.IGNORECASE)
_POLL_S = 0.05
_LAUNCH_TIMEOUT_S = 30.0
_STDERR = 2
_UV_TIMEOUT_S = 900.0
_UV_SETTINGS_LEFT_OUT = ("UV_CONSTRAINT", "UV_OVERRIDE", "VIRTUAL_ENV")

# The child runs this script, which replaces itself with the part's program. Exec preserves the death signal: the kernel
# kills the part when its owner dies, even by SIGKILL, which no handler of the owner can catch. A preexec_fn would need
# fewer lines, but would run Python between fork and exec, in a process whose other threads may hold locks. If the owner
# died before prctl, the child has another parent, and exits.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def local_parts_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Directory of the embedded parts: `$CASCADE_LOCAL_DIR`, by default `share/cascade` of the Python environment."""
    chosen = environment.get("CASCADE_LOCAL_DIR", "")
    return Path(chosen) if chosen else Path(sys.prefix) / "share" / "cascade"


def free_ports(count: int) -> list[int]:
    """`count` different free TCP ports of 127.0.0.1. Raises LocalPartError if there are not that many."""
    ports: list[int] = []
    first = os.getpid() * _PORTS_OF_A_PROCESS
    with ExitStack() as listeners:
        for _ in range(PORT_LAST - PORT_FIRST):
            if len(ports) == count:
                return ports
            port = PORT_FIRST + (first + next(_drawn)) % (PORT_LAST - PORT_FIRST)
            listener = listeners.enter_context(socket.socket())
            # as the servers do: a port with nothing but closed connections counts as free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen()
            except OSError:
                continue
            ports.append(port)
    raise LocalPartError(f"no {count} free ports between {PORT_FIRST} and {PORT_LAST}; stop other servers")


def read_marker(directory: Path) -> dict[str, object] | None:
    """The record that an installation left in `directory`; None if there is none or it cannot be read."""
    try:
        content = json.loads((directory / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, which replaces `directory` as a whole when the block ends without an error.

    Raises OSError if its parent cannot be written, or if it is a mount point, which cannot be replaced.
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


def not_replaced(directory: Path, error: OSError) -> CascadeError:
    """Returns the line for a user whose `directory` could not be replaced because of `error`."""
    return CascadeError(
        f"{directory}: cannot be written ({error.strerror or error}); it is replaced as a whole, so its parent must be"
        f" writable, and a mount point cannot be replaced: name a directory below it, {directory / 'new'} for example"
    )


def install_part(
    name: str,
    target: Path,
    is_present: Callable[[], bool],
    fill: Callable[[Path], dict[str, object]],
    report: Callable[[str], None],
) -> None:
    """Install a part in `target`, as a whole or not at all. Two processes install it one after the other.

    - `name`: of the part, with its version.
    - `is_present`: whether it is installed already; nothing is done then.
    - `fill`: fills an empty directory, and returns the record that `read_marker` reads.
    - `report`: receives lines for the user.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_present():
            report(f"{name}: present in {target}")
            return
        started_s = time.monotonic()
        with staged_directory(target) as staged:
            (staged / MARKER).write_text(json.dumps(fill(staged), indent=1) + "\n")
        report(f"{name}: installed in {target} ({time.monotonic() - started_s:.0f} s)")


def run_uv(part: str, *arguments: str) -> None:
    """Run uv, which installs Python packages for the named part. Raises LocalPartError if that fails."""
    # The user's settings for mirrors apply, but not the constraints of a project (uv also looks for them in the working
    # directory): they may name other versions than the part needs.
    environment = {name: value for name, value in os.environ.items() if name not in _UV_SETTINGS_LEFT_OUT}
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_UV_TIMEOUT_S, env=environment, cwd="/", check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LocalPartError(f"downloading {part} took more than {_UV_TIMEOUT_S:g} s; try again") from error
    if done.returncode == 0:
        return
    error_text = " ".join(done.stderr.split())[-400:]
    if "No module named uv" in error_text:
        raise LocalPartError("the package uv is missing; install the extra: pip install 'cascade-fraud[local]'")
    raise LocalPartError(f"{part} cannot be installed: {error_text}; check the network and try again")


class OwnedProcess:
    """A child process that ends with its owner: at the owner's exit, and on Linux also when the owner is killed.

    - `name`: for messages.
    - `command`: program (an absolute path) and arguments.
    - `log`: file for the output; None: the owner's standard error.
    - `environment`: the whole environment of the child.
    - `inherited`: file descriptors that the child has too.
    - `reads`: the child reads lines from its standard input, which `write_line` writes. It reads the end of the file
      when its owner has ended.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path | None,
        environment: Mapping[str, str],
        inherited: Sequence[int] = (),
        reads: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._reads = reads
        self._command = list(command)
        self._environment = dict(environment)
        self._inherited = tuple(inherited)
        self._process: subprocess.Popen[bytes] | None = None
        self._waiter: threading.Thread | None = None
        self._log_start = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id; None while the process does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def check_running(self) -> None:
        """Raise LocalPartError if the process has ended."""
        if not self.running:
            raise LocalPartError(f"{self.name} ended: {self.log_tail()}")

    def start(self) -> None:
        """Start the process. Raises LocalPartError if that fails."""
        if self.running:
            return
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._log_start = self.log.stat().st_size if self.log.exists() else 0
        launched = threading.Event()
        failure: list[OSError] = []

        def launch_and_wait() -> None:
            # Linux sends the death signal when the thread that started the child ends, not when the process does.
            # This thread lives as long as the child, whichever thread called start().
            try:
                self._process = self._launch()
            except OSError as error:
                failure.append(error)
                return
            finally:
                launched.set()
            self._process.wait()

        self._waiter = threading.Thread(target=launch_and_wait, name=f"waiter of {self.name}", daemon=True)
        self._waiter.start()
        launched.wait(_LAUNCH_TIMEOUT_S)
        if failure:
            raise LocalPartError(f"{self.name} cannot be started: {failure[0]}")
        atexit.register(self._stop_at_exit, os.getpid())

    def _launch(self) -> subprocess.Popen[bytes]:
        with nullcontext(_STDERR) if self.log is None else self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self._command],
                stdin=subprocess.PIPE if self._reads else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=self._inherited,
                # a session of its own: Ctrl-C in the terminal reaches only the owner, and a kill reaches all helpers
                start_new_session=True,
            )

    def write_line(self, line: str) -> None:
        """Write a line to the standard input of a process that reads it; raises OSError if the process has ended."""
        if self._process is None or self._process.stdin is None:
            raise BrokenPipeError(f"{self.name} reads no input")
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None before the start and while the process runs."""
        return None if self._process is None else self._process.poll()

    def stop(self, grace_s: float = 15.0) -> bool:
        """Terminate the process; kill it and its helpers after `grace_s` seconds. Returns whether it ended in time."""
        in_time = True
        if self._process is not None and self.running:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                in_time = False
                self.kill()
        self._release()
        return in_time

    def kill(self) -> None:
        """Kill the process and its helpers (SIGKILL)."""
        if self._process is not None and self.running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._release()

    def freeze(self) -> None:
        """Suspend the process and its helpers (SIGSTOP), as if the machine hung. Does nothing if it does not run.

        Waits until every thread of the process has stopped, since a server answers until then.
        """
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.killpg(pid, signal.SIGSTOP)
                os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Resume a frozen process. Does nothing if it is not frozen or does not run."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGCONT)

    def _release(self) -> None:
        atexit.unregister(self._stop_at_exit)
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        if self._waiter is not None:
            self._waiter.join()
            self._waiter = None

    def _stop_at_exit(self, owner_pid: int) -> None:
        # a fork of the owner inherits this handler, but does not own the process
        if os.getpid() == owner_pid:
            self.stop()

    def log_tail(self) -> str:
        """The last lines of this run's log that report a failure (the last of all if none does), as one line."""
        if self.log is None:
            return "see above"
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                text = log.read().decode(errors="replace")
        except OSError:
            return "no log"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in lines if _FAILURE.search(line)] or lines
        return " | ".join(line[:_TAIL_LINE_CHARACTERS] for line in lines[-_TAIL_LINES:]) or "the log is empty"

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once `ready()` is true. Raises LocalPartError if the process ends or `timeout_s` seconds pass."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.running or time.monotonic() >= deadline:
                problem = f"was not ready within {timeout_s:g} s" if self.running else "ended while starting"
                raise LocalPartError(f"{self.name} {problem}; its log {self.log} ends: {self.log_tail()}")
            time.sleep(_POLL_S)
