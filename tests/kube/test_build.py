"""The builder of the programs: where a part lies, and what it says without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.errors import LocalPartError
from tests.kube import build


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CASCADE_KUBE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_part_that_is_not_built_is_named_with_the_remedy(cache: Path) -> None:
    with pytest.raises(LocalPartError, match=f"part lab .* is not built .{cache}/lab-.*run `make kube-programs`"):
        build.built("lab")


def test_command_prints_the_folder_or_exits_with_the_reason(cache: Path) -> None:
    command = [sys.executable, build.__file__, "path", "stages"]
    missing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert "run `make kube-programs`" in missing.stderr

    build.folder("stages").mkdir(parents=True)
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == str(build.folder("stages"))


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "main.go"])
def test_each_source_of_a_part_changes_its_folder(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(build.PROGRAMS / "dns", tmp_path / "dns")
    before = build.folder("dns")
    monkeypatch.setattr(build, "PROGRAMS", tmp_path)
    assert build.folder("dns") == before
    with (tmp_path / "dns" / changed).open("a") as source:
        source.write("\n")
    assert build.folder("dns") != before


def test_without_go_the_build_names_the_remedy_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(LocalPartError, match=r"the command go is missing; install Go 1\.26"):
        build.build("dns", lambda _: None)
    assert not build.folder("dns").exists()
