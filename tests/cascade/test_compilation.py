from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numba
import pytest

from cascade import compilation
from cascade.compilation import DIRECTORIES_MAX, cache_directory, kernel_sources
from tests.test_imports import ROOT, names_of, trees

SOURCES = sorted(kernel_sources(ROOT))
# Imports all kernel sources and runs a small kernel, which has `home` of another file compiled into it.
PROGRAM = f"""
import importlib, json
import numba, numpy as np
for name in {SOURCES}:
    importlib.import_module(name)
from cascade.compilation import cache_directory, compilations
from cascade.features.kernels import _is_new_tag
seen = np.zeros((1, 64, 2), np.int64)
_is_new_tag(seen, 0, 5, 1)
hits = sum(_is_new_tag.stats.cache_hits.values())
place = int(seen[0, :, 1].argmax())
print(json.dumps([place, hits, compilations(), str(cache_directory()), numba.config.CACHE_DIR]))
"""
# Root writes what no mode allows, unless it gives up that capability.
BOUND_BY_MODES = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []


@dataclass(frozen=True)
class Outcome:
    place: int
    cache_hits: int
    compilations: int
    directory: Path
    setting_of_numba: str


def path_of(root: Path, module: str) -> Path:
    return root.joinpath(*module.split(".")).with_suffix(".py")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def run_together(copy: Path, processes: int, **environment: str) -> list[Outcome]:
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    running = [
        subprocess.Popen(
            [*BOUND_BY_MODES, sys.executable, "-c", PROGRAM],
            cwd=copy,
            env=inherited | {"PYTHONPATH": str(copy)} | environment,
            stdout=subprocess.PIPE,
        )
        for _ in range(processes)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [
        Outcome(place, hits, compiled, Path(used), setting)
        for place, hits, compiled, used, setting in map(json.loads, outputs)
    ]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with the kernel sources, in packages that are empty but for them."""
    for module in SOURCES:
        path = path_of(tmp_path, module)
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(tmp_path).parents[:-1]:
            (tmp_path / package / "__init__.py").touch()
        path.write_bytes(path_of(ROOT, module).read_bytes())
    return tmp_path


@pytest.fixture
def in_copy(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy; `cache_directory.__wrapped__` works on it, and not on this process's directory."""
    monkeypatch.setattr(compilation, "__file__", str(path_of(copy, "cascade.compilation")))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return copy


def test_an_edited_kernel_is_compiled_again_into_the_kernels_of_other_files(copy: Path) -> None:
    first, second = run_together(copy, 2)
    assert first.place == second.place != 0
    assert first.directory == second.directory
    assert first.directory.parent == copy / "cascade" / "__pycache__"
    [again] = run_together(copy, 1)
    assert (again.place, again.cache_hits) == (first.place, 1)
    edit(path_of(copy, "cascade.features.chains"), "& np.uint64(mask)", "& np.uint64(0)")
    [edited] = run_together(copy, 1)
    assert (edited.place, edited.cache_hits) == (0, 0)
    assert edited.directory != first.directory
    assert edited.setting_of_numba == ""


def test_an_edit_of_any_kernel_source_changes_the_directory_and_other_edits_do_not(in_copy: Path) -> None:
    directories = {cache_directory.__wrapped__()}
    for module in SOURCES:
        with path_of(in_copy, module).open("a") as file:
            file.write("# edited\n")
        directories.add(cache_directory.__wrapped__())
    assert len(directories) == 1 + len(SOURCES)
    path_of(in_copy, "cascade.config").write_text("from cascade.features import layout\n")
    assert cache_directory.__wrapped__() in directories


def test_directories_of_former_sources_are_removed_but_the_latest(in_copy: Path) -> None:
    place = in_copy / "cascade" / "__pycache__"
    former = [place / f"cascade-kernels-{number}" for number in range(DIRECTORIES_MAX + 1)]
    for time_s, directory in enumerate(former):
        (directory / "features").mkdir(parents=True)
        os.utime(directory, (time_s, time_s))
    other = place / "kernels.cpython-311.pyc"
    other.touch()
    used = cache_directory.__wrapped__()
    assert set(place.iterdir()) == {used, other, *former[2:]}


def test_the_directory_in_use_stays_where_the_others_have_later_times(in_copy: Path) -> None:
    used = cache_directory.__wrapped__()
    assert used is not None
    for number in range(DIRECTORIES_MAX):
        directory = used.parent / f"cascade-kernels-{number}"
        directory.mkdir()
        os.utime(directory, (2**33, 2**33))
    assert cache_directory.__wrapped__() == used
    assert used.is_dir()


def test_a_read_only_installation_caches_in_the_users_directory_unless_numba_has_another(
    in_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_copy / "cascade" / "__pycache__").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for setting, place in (("", tmp_path / "home" / "cascade-fraud"), (str(tmp_path / "chosen"), tmp_path / "chosen")):
        monkeypatch.setattr(numba.config, "CACHE_DIR", setting)
        used = cache_directory.__wrapped__()
        assert used is not None
        assert used.parent == place


def test_kernels_run_where_no_directory_can_be_written(copy: Path) -> None:
    (copy / "cascade" / "__pycache__").touch()
    [outcome] = run_together(copy, 1, XDG_CACHE_HOME=str(copy / "cascade" / "__pycache__"))
    assert outcome.place != 0
    assert outcome.directory == Path("None")


@pytest.fixture
def read_only(copy: Path) -> Iterator[Path]:
    """The copy with compiled kernels, as in an image: nothing in it can be written any more."""
    [built] = run_together(copy, 1)
    assert built.compilations > 0
    directories = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
    for directory in directories:
        directory.chmod(0o555)
    yield copy
    for directory in directories:
        directory.chmod(0o755)


@pytest.mark.parametrize("setting", [False, True], ids=["beside the code", "NUMBA_CACHE_DIR"])
def test_compiled_kernels_that_cannot_be_written_are_copied_and_nothing_is_compiled(
    read_only: Path, tmp_path_factory: pytest.TempPathFactory, setting: bool
) -> None:
    home = tmp_path_factory.mktemp("home")
    environment = {"XDG_CACHE_HOME": str(home)}
    if setting:
        environment["NUMBA_CACHE_DIR"] = str(read_only / "cascade" / "__pycache__")
    for outcome in run_together(read_only, 2, **environment):
        assert (outcome.cache_hits, outcome.compilations) == (1, 0)
        assert outcome.directory.parent == home / "cascade-fraud"
    assert [path.name for path in (home / "cascade-fraud").iterdir()] == [outcome.directory.name]


def test_a_copy_that_fails_leaves_a_directory_to_compile_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path, **_: object) -> None:
        target.mkdir()
        raise OSError(28, "No space left on device")

    places = [tmp_path / "old"]
    monkeypatch.setattr(compilation, "_places", lambda: places)
    old = compilation.cache_directory.__wrapped__()
    assert old is not None
    places.insert(0, tmp_path / "new")
    monkeypatch.setattr(compilation.shutil, "copytree", full)
    assert compilation.cache_directory.__wrapped__() == tmp_path / "new" / old.name
    assert [path.name for path in (tmp_path / "new").iterdir()] == [old.name]


def test_kernels_of_another_processor_are_compiled_again_beside_the_copied_ones(
    read_only: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("home")), "NUMBA_CPU_NAME": "generic"}
    [first] = run_together(read_only, 1, **environment)
    assert first.place != 0
    assert first.compilations > 0
    [second] = run_together(read_only, 1, **environment)
    assert (second.place, second.cache_hits, second.compilations) == (first.place, 1, 0)


def test_all_compiled_code_is_a_kernel_source_and_numba_compiles_nothing_by_itself() -> None:
    assert {module for module in trees() if "numba" in names_of(module)} <= set(SOURCES)
    for module in SOURCES:
        text = path_of(ROOT, module).read_text()
        assert "jit" not in text or module == "cascade.compilation", f"{module}: use cascade.compilation.kernel"
    assert not {"cascade.config", "cascade.schema", "cascade.features.spec", "streaming.worker.loop"} & set(SOURCES)
