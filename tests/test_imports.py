"""Imports point down (bench → streaming → stages → cascade) without cycles. Heavy libraries load only where used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package may import itself and those before it.
PACKAGES = ("cascade", "stages", "streaming", "bench")
NOT_IN_CASCADE = {"kafka", "tritonclient", "lightgbm", "onnxruntime", "torch", "sklearn", "onnx", "grpc", "jgo"}
TORCH_HOMES = {"stages.deep.checkpoint", "stages.deep.model", "stages.deep.train", "stages.training"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> dict[str, ast.Module]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {module_name(file): ast.parse(file.read_text(), str(file)) for file in files}


def imported(tree: ast.Module, module: str, at_start: bool = False) -> Iterator[str]:
    """The names of all modules that a tree imports; of `from x import y` both x and x.y, but no package is a dependency
    of its own modules. `at_start`: only those imported together with the module, so neither in functions nor only for
    type checkers.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if at_start and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        ):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides its direction"
            assert node.module is not None
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all(part in trees() for part in parts):
                yield node.module
            yield from parts


@cache
def names_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(trees()[module], module)}


def test_every_package_is_examined() -> None:
    counts = {package: sum(name.split(".")[0] == package for name in trees()) for package in PACKAGES}
    assert min(counts.values()) >= 4, counts


def test_no_import_points_up() -> None:
    upward = [
        f"{module} imports {name}"
        for module in trees()
        for name in names_of(module)
        if name in PACKAGES and PACKAGES.index(name) > PACKAGES.index(module.split(".")[0])
    ]
    assert upward == []


def test_no_module_imports_the_tests_or_the_model_repository() -> None:
    assert [module for module in trees() if names_of(module) & {"tests", "triton_models"}] == []


def test_there_is_no_cycle_of_modules() -> None:
    modules = set(trees())
    edges = {
        module: set(imported(tree, module, at_start=True)) & modules - {module} for module, tree in trees().items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "cycle: " + " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    assert done == modules


def test_cascade_imports_no_kafka_no_triton_and_no_model_library() -> None:
    found = {module: names_of(module) & NOT_IN_CASCADE for module in trees() if module.split(".")[0] == "cascade"}
    assert {module: names for module, names in found.items() if names} == {}


def test_kafka_stays_at_the_edge() -> None:
    # the peers are services of other projects
    homes = ("streaming.kafka", "streaming.kafka.local_broker", "streaming.service.doctor", "bench.peers")
    strays = [module for module in trees() if "kafka" in names_of(module) and not module.startswith(homes)]
    assert strays == []


def test_torch_is_imported_by_the_training_of_the_deep_model_only() -> None:
    users = {module for module in trees() if "torch" in names_of(module)}
    assert users <= TORCH_HOMES
    at_start = {
        module
        for module in users
        if any(name.split(".")[0] == "torch" for name in imported(trees()[module], module, at_start=True))
    }
    assert at_start == {"stages.deep.checkpoint", "stages.deep.model", "stages.deep.train"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "streaming.data_commands, streaming.commands, streaming.service.doctor, bench.demo, stages.commands,"
            " stages.training",
            ("torch", "onnx"),
        ),
        # half of a worker's start: `cascade run` imports no other module than this one
        ("streaming.commands", ("kafka", "lightgbm", "polars", "scipy", "sklearn")),
    ],
)
def test_modules_load_without_what_only_training_needs(modules: str, absent: tuple[str, ...]) -> None:
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {absent}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import {modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(trees()))
def test_nothing_unpickles_or_evaluates(module: str) -> None:
    tree = trees()[module]
    assert not names_of(module) & FORBIDDEN_MODULES
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec", "__import__"}


def test_help_needs_the_standard_library_only() -> None:
    # without the site packages (-S) any other import would fail
    done = subprocess.run([sys.executable, "-S", "-m", "cascade", "--help"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
