"""The peers in Python: the plain loop in the service's own environment, quix-streams in a separate environment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.peers.process import PeerProcess, Work
from cascade.errors import LocalPartError
from cascade.local_parts import MARKER, install_lock, local_parts_dir, read_marker, staged_directory

_HERE = Path(__file__).parent
_REQUIREMENTS = _HERE / "quix_requirements.txt"
_INSTALL_TIMEOUT_S = 900.0
_UV_SETTINGS_LEFT_OUT = ("UV_CONSTRAINT", "UV_OVERRIDE", "VIRTUAL_ENV")


class PlainLoop:
    """`bench.peers.plain_loop`, with the packages of the service."""

    name = "plain-loop"

    def missing(self) -> str | None:
        """None: it can always run."""
        return None

    def install(self, report: Callable[[str], None]) -> None:
        """Does nothing: the peer needs no installation."""
        report(f"{self.name}: present")

    def run(self, work: Work) -> PeerProcess:
        """See Peer."""
        return PeerProcess(self.name, [sys.executable, "-m", "bench.peers.plain_loop"], {}, work)


class QuixStreams:
    """`quix_app.py`, in a separate environment: quix-streams pins an older confluent-kafka than the service has."""

    name = "quix-streams"

    def missing(self) -> str | None:
        """See Peer."""
        if read_marker(self._directory()) == _marker():
            return None
        return f"quix-streams is not installed in {self._directory()}; run `python -m bench.peers {self.name}`"

    def install(self, report: Callable[[str], None]) -> None:
        """Makes a virtual environment with the packages of `quix_requirements.txt`."""
        target = self._directory()
        with install_lock(target):
            if self.missing() is None:
                report(f"{self.name}: present in {target}")
                return
            started_s = time.monotonic()
            report(f"{self.name}: downloading its packages (0.2 GB)")
            with staged_directory(target) as staged:
                _uv("venv", "--python", sys.executable, f"{staged}/python")
                _uv("pip", "install", "--compile-bytecode", "--python", f"{staged}/python", "-r", f"{_REQUIREMENTS}")
                (staged / MARKER).write_text(json.dumps(_marker()) + "\n")
            report(f"{self.name}: installed in {target} ({time.monotonic() - started_s:.0f} s)")

    def run(self, work: Work) -> PeerProcess:
        """See Peer."""
        if (problem := self.missing()) is not None:
            raise LocalPartError(problem)
        python = self._directory() / "python" / "bin" / "python"
        # without the service's packages; Python finds the modules beside the script
        environment = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
        return PeerProcess(self.name, [str(python), str(_HERE / "quix_app.py")], environment, work)

    def _directory(self) -> Path:
        return local_parts_dir().absolute() / "peers" / self.name


def _marker() -> dict[str, object]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": version, "requirements": hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()}


def _uv(*arguments: str) -> None:
    # The user's package mirrors apply, but not a project's constraints, which name another confluent-kafka.
    environment = {name: value for name, value in os.environ.items() if name not in _UV_SETTINGS_LEFT_OUT}
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, env=environment, cwd="/", check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LocalPartError(f"downloading quix-streams took more than {_INSTALL_TIMEOUT_S:g} s; try again") from error
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-400:]
        raise LocalPartError(f"quix-streams cannot be installed: {reason}; it needs uv (extra `local`) and the network")
