"""An embedded Triton Inference Server (CPU only) for the demo, tests and development.

The server comes from the wheel `nvidia-pytriton`, whose Python backend is compiled against numpy 1. With numpy 2 it
starts, reports ready, and answers with empty tensors. So it is installed in a directory of its own (`server`), and its
models run in a virtual environment of their own (`python`) with numpy 1 and ONNX Runtime.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cascade.errors import LocalPartError
from cascade.local_parts import (
    OwnedProcess,
    free_ports,
    install_part,
    local_parts_dir,
    read_marker,
    run_uv,
)

TRITON_VERSION = "2.51"
_SERVER = ("nvidia-pytriton==0.7.0",)
# numpy 1 for the reason above, ONNX Runtime, and what it needs
_PACKAGES = (
    "flatbuffers==25.12.19",
    "numpy==1.26.4",
    "onnxruntime==1.26.0",
    "packaging==26.3",
    "protobuf==7.36.2",
)
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# The wheel has stubs for more versions, but numpy 1 supports none of them.
_PYTHONS = ("3.11", "3.12")
_LIBPYTHON = f"libpython{_PYTHON}.so.1.0"
READY_TIMEOUT_S = 60.0
_METRICS_PATH = "/metrics"
_STOP_GRACE_S = 15.0


def install(directory: Path, report: Callable[[str], None]) -> None:
    """Download Triton to `directory`/triton, unless it is there. `report` receives lines for the user.

    Raises LocalPartError if this machine cannot run Triton, or if a download fails.
    """
    directory = directory.absolute()
    _check_machine()

    def fill(staged: Path) -> dict[str, object]:
        report(f"{name}: downloading the server and its own Python packages (0.2 GB)")
        own_python = f"{staged}/python/bin/python"
        server = ("--python", sys.executable, "--target", f"{staged}/server", *_SERVER)
        run_uv("Triton", "pip", "install", "--no-deps", *server)
        run_uv("Triton", "venv", "--python", sys.executable, f"{staged}/python")
        run_uv("Triton", "pip", "install", "--no-deps", "--compile-bytecode", "--python", own_python, *_PACKAGES)
        _remove_all_but_the_server(staged / "server")
        return _marker()

    name = f"Triton {TRITON_VERSION}"
    install_part(name, directory / "triton", lambda: _is_installed(directory), fill, report)


def _marker() -> dict[str, object]:
    return {"version": TRITON_VERSION, "python": _PYTHON, "packages": [*_SERVER, *_PACKAGES]}


def _is_installed(parts_dir: Path) -> bool:
    return read_marker(parts_dir / "triton") == _marker() and _binary(parts_dir).is_file()


def _binary(parts_dir: Path) -> Path:
    return parts_dir / "triton" / "server" / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def _check_machine() -> None:
    machine = os.uname()
    if machine.sysname != "Linux" or machine.machine not in ("x86_64", "aarch64"):
        raise LocalPartError(
            f"the local Triton runs on Linux (x86-64, ARM64) only, this is {machine.sysname} {machine.machine}; "
            'set deep.backend = "onnxruntime"'
        )
    if _PYTHON not in _PYTHONS:
        raise LocalPartError(
            f"the local Triton needs Python {' or '.join(_PYTHONS)}, this is {_PYTHON}; use one of those, or set "
            'deep.backend = "onnxruntime"'
        )


def _remove_all_but_the_server(server: Path) -> None:
    """Copy this Python's stub to where the Python backend looks for it, and remove the rest of the wheel."""
    package = server / "pytriton"
    triton = package / "tritonserver"
    stub = triton / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        raise LocalPartError(f"{_SERVER[0]} has no part for Python {_PYTHON}; use Python {' or '.join(_PYTHONS)}")
    shutil.copy2(stub, triton / "backends" / "python" / stub.name)
    shutil.rmtree(triton / "python_backend_stubs")
    for entry in package.iterdir():
        if entry != triton:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def missing_libpython() -> str | None:
    """None if the loader finds the shared library of Python, else one line with the problem and the remedy."""
    attempt = [sys.executable, "-I", "-S", "-c", f"import ctypes; ctypes.CDLL('{_LIBPYTHON}')"]
    found = subprocess.run(attempt, env=_library_path(), capture_output=True, timeout=30, check=False)
    if found.returncode == 0:
        return None
    return (
        f"{_LIBPYTHON}, which the local Triton needs, is not on this machine; install it (Debian, Ubuntu: "
        f"apt-get install libpython{_PYTHON})"
    )


def missing_parts(parts_dir: Path | None = None) -> str | None:
    """None if the local Triton can start, else one line with the problem and the remedy."""
    try:
        _check_machine()
    except LocalPartError as error:
        return str(error)
    directory = parts_dir or local_parts_dir()
    if not _is_installed(directory):
        return f"Triton {TRITON_VERSION} is not installed in {directory / 'triton'}; run `cascade local install`"
    return missing_libpython()


def _library_path() -> dict[str, str]:
    own = sysconfig.get_config_var("LIBDIR")
    return {"LD_LIBRARY_PATH": str(own)} if own and (Path(own) / _LIBPYTHON).exists() else {}


@dataclass(frozen=True, slots=True)
class ServerTls:
    """TLS of Triton's gRPC, as PEM files.

    - `certificate`, `key`: those of the server.
    - `clients`: the authority that signs the clients' certificates; the server then refuses other clients (mutual TLS).
    """

    certificate: Path
    key: Path
    clients: Path | None = None

    def arguments(self) -> list[str]:
        """The settings as arguments for Triton."""
        mutual = ["--grpc-use-ssl-mutual=1", f"--grpc-root-cert={self.clients}"] if self.clients else []
        return ["--grpc-use-ssl=1", f"--grpc-server-cert={self.certificate}", f"--grpc-server-key={self.key}", *mutual]


class LocalTriton:
    """A Triton on 127.0.0.1 that serves every model of a repository, as a context manager.

    - `parts_dir`: directory of the embedded parts, by default `local_parts_dir()`.
    - `log_dir`: directory for `triton.log`, by default that which contains the repository.
    - `grpc_port`: by default a free port.
    - `tls`: for gRPC; HTTP and metrics are not encrypted.
    """

    def __init__(
        self,
        repository: Path,
        parts_dir: Path | None = None,
        log_dir: Path | None = None,
        grpc_port: int | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self.repository = Path(repository).absolute()
        self._parts_dir = (parts_dir or local_parts_dir()).absolute()
        self._log_dir = log_dir or self.repository.parent
        self._grpc_port = grpc_port
        self._tls = tls
        self._ports: list[int] = []
        self._process: OwnedProcess | None = None
        self._region_prefix = f"cascade-{uuid.uuid4().hex[:12]}-"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def grpc_url(self) -> str:
        """Address of gRPC, `127.0.0.1:port`."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP interface, `http://127.0.0.1:port`."""
        return f"http://127.0.0.1:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        """URL of the metrics in Prometheus' format."""
        return f"http://127.0.0.1:{self._ports[2]}{_METRICS_PATH}"

    @property
    def pid(self) -> int | None:
        """Process id; None while Triton does not run."""
        return self._process.pid if self._process is not None else None

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Start Triton and wait until all its models are ready. Raises LocalPartError if they are not in time."""
        if self.pid is not None:
            return
        missing = missing_parts(self._parts_dir)
        if missing is not None:
            raise LocalPartError(missing)
        models = [entry.parent.name for entry in sorted(self.repository.glob("*/config.pbtxt"))]
        if not models:
            raise LocalPartError(
                f"{self.repository} has no model (NAME/config.pbtxt); write a repository with `cascade repository`"
            )
        # the same ports at each start, so that clients find a restarted server
        if not self._ports:
            grpc_port, *others = free_ports(3)
            self._ports = [self._grpc_port or grpc_port, *others]
        process = OwnedProcess("the local Triton", self._command(), self._log_dir / "triton.log", self._environment())
        self._process = process
        try:
            process.start()
            process.wait_until(lambda: all(self._answers(path) for path in _ready_paths(models)), timeout_s)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop Triton and the processes of its models."""
        if self._process is not None:
            self._process.stop(_STOP_GRACE_S)
            self._remove_regions()

    def kill(self) -> None:
        """Kill Triton and the processes of its models, as if the machine failed."""
        if self._process is not None:
            self._process.kill()
            self._remove_regions()

    def freeze(self) -> None:
        """Suspend Triton and its models (SIGSTOP): its connections stay open, but it answers nothing."""
        if self._process is not None:
            self._process.freeze()

    def thaw(self) -> None:
        """Resume a frozen Triton. Does nothing if it is not frozen or does not run."""
        if self._process is not None:
            self._process.thaw()

    def _remove_regions(self) -> None:
        # a killed Triton leaves the memory that it shared with its models, a megabyte each
        for region in Path("/dev/shm").glob(f"{self._region_prefix}*"):  # noqa: S108 - the system determines the path
            region.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        binary = _binary(self._parts_dir)
        grpc, http, metrics = self._ports
        return [
            str(binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={binary.parents[1] / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self._region_prefix}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={grpc}",
            "--http-address=127.0.0.1",
            f"--http-port={http}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={metrics}",
            "--allow-gpu-metrics=false",
            "--http-thread-count=2",
            "--exit-timeout-secs=5",
            *(self._tls.arguments() if self._tls is not None else []),
        ]

    def _environment(self) -> dict[str, str]:
        # The model's process ignores all PYTHON variables and uses the first `python3` of PATH with its packages. That
        # must not be the Python of the service, which has numpy 2.
        return _library_path() | {
            "PATH": f"{self._parts_dir / 'triton' / 'python' / 'bin'}:/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    def _answers(self, path: str) -> bool:
        """Whether the HTTP interface, or the metrics port for their path, answers a request with status 200."""
        port = self._ports[2] if path == _METRICS_PATH else self._ports[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _ready_paths(models: list[str]) -> list[str]:
    # the metrics are available last, after Triton reports that it is ready
    return ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models), _METRICS_PATH]
