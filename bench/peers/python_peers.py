"""The peers in Python: the plain loop in the service's own environment, quix-streams in a separate environment."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from bench.peers.process import PeerProcess, Work, peer_directory
from cascade.errors import LocalPartError
from cascade.local_parts import install_part, read_marker, run_uv

_HERE = Path(__file__).parent
_REQUIREMENTS = _HERE / "quix_requirements.txt"


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
        if read_marker(peer_directory(self.name)) == _marker():
            return None
        return f"quix-streams is not installed in {peer_directory(self.name)}; run `python -m bench.peers {self.name}`"

    def install(self, report: Callable[[str], None]) -> None:
        """Makes a virtual environment with the packages of `quix_requirements.txt`."""

        def fill(staged: Path) -> dict[str, object]:
            report(f"{self.name}: downloading its packages (0.2 GB)")
            python = f"{staged}/python"
            run_uv(self.name, "venv", "--python", sys.executable, python)
            packages = ("--python", python, "-r", f"{_REQUIREMENTS}")
            run_uv(self.name, "pip", "install", "--compile-bytecode", *packages)
            return _marker()

        install_part(self.name, peer_directory(self.name), lambda: self.missing() is None, fill, report)

    def run(self, work: Work) -> PeerProcess:
        """See Peer."""
        if (problem := self.missing()) is not None:
            raise LocalPartError(problem)
        python = peer_directory(self.name) / "python" / "bin" / "python"
        # without the service's packages; Python finds the modules beside the script
        environment = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
        return PeerProcess(self.name, [str(python), str(_HERE / "quix_app.py")], environment, work)


def _marker() -> dict[str, object]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": version, "requirements": hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()}
