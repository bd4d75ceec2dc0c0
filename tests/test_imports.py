"""The house rule: imports point down bench → streaming → stages → cascade, never up, and there is no circle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the ground up: each may import itself and what stands before it
FLOORS = ("cascade", "stages", "streaming", "bench")
OUT_OF_THE_GROUND = {"kafka", "tritonclient", "lightgbm", "onnxruntime", "torch", "sklearn", "onnx", "grpc", "jgo"}
TORCH_HOMES = {"stages.deep.model", "stages.deep.train", "stages.training"}
HEAVY = {
    "numpy",
    "polars",
    "rich",
    "typer",
    "msgspec",
    "numba",
    "kafka",
    "lightgbm",
    "onnxruntime",
    "structlog",
    "torch",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HELP_SECONDS_MAX = 2.0


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> dict[str, ast.Module]:
    files = [file for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]
    return {module_name(file): ast.parse(file.read_text(), str(file)) for file in files}


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """The names of all modules that a tree imports, wherever in it; of `from x import y` both, but a package is no
    dependency of its own modules.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides its direction"
            assert node.module is not None
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all(part in trees() for part in parts):
                yield node.module
            yield from parts


def at_import(tree: ast.Module) -> ast.Module:
    """The part of a module that runs when it is imported: no function bodies, nothing for type checkers only."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            """Leave it out."""

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            """Leave it out."""

        def visit_If(self, node: ast.If) -> ast.AST | None:
            """Leave `if TYPE_CHECKING` out."""
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Pruned().visit(ast.parse(ast.unparse(tree)))


def names_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(trees()[module], module)}


def test_every_floor_is_looked_at() -> None:
    counts = {floor: sum(name.split(".")[0] == floor for name in trees()) for floor in FLOORS}
    assert min(counts.values()) >= 4, counts


def test_no_import_points_up() -> None:
    upward = [
        f"{module} imports {name}"
        for module in trees()
        for name in names_of(module)
        if name in FLOORS and FLOORS.index(name) > FLOORS.index(module.split(".")[0])
    ]
    assert upward == []


def test_no_module_imports_the_tests_or_the_model_repository() -> None:
    assert [module for module in trees() if names_of(module) & {"tests", "triton_models"}] == []


def test_there_is_no_circle_of_modules() -> None:
    known = set(trees())
    edges = {module: set(imported(at_import(tree), module)) & known - {module} for module, tree in trees().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle: " + " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    assert len(done) == len(known)


def test_the_ground_knows_no_kafka_no_triton_and_no_model_library() -> None:
    found = {module: names_of(module) & OUT_OF_THE_GROUND for module in trees() if module.split(".")[0] == "cascade"}
    assert {module: names for module, names in found.items() if names} == {}


def test_kafka_stays_at_the_edge() -> None:
    # the peers are other people's services
    homes = ("streaming.clients", "streaming.local_broker", "streaming.doctor", "bench.peers")
    strays = [module for module in trees() if "kafka" in names_of(module) and not module.startswith(homes)]
    assert strays == []


def test_torch_is_imported_by_the_training_of_the_deep_model_only() -> None:
    users = {module for module in trees() if "torch" in names_of(module)}
    assert users <= TORCH_HOMES
    at_start = {
        module
        for module in users
        if any(n.split(".")[0] == "torch" for n in imported(at_import(trees()[module]), module))
    }
    assert at_start == {"stages.deep.model", "stages.deep.train"}


def test_serving_and_demo_load_without_torch() -> None:
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'onnx'): raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import streaming.service, streaming.commands, streaming.doctor, bench.demo, stages.commands, stages.training\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(trees()))
def test_nothing_unpickles_or_evaluates(module: str) -> None:
    tree = trees()[module]
    assert not names_of(module) & FORBIDDEN_MODULES
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec", "__import__"}


def test_importing_the_command_table_loads_nothing_heavy() -> None:
    script = "import cascade.cli, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert loaded & HEAVY == set()


def test_help_answers_in_a_blink() -> None:
    def seconds() -> float:
        started_s = time.monotonic()
        subprocess.run([sys.executable, "-m", "cascade", "--help"], cwd=ROOT, capture_output=True, check=True)
        return time.monotonic() - started_s

    # the best of three: a machine under load is slow once, a table that imports numpy is slow each time
    assert min(seconds() for _ in range(3)) < HELP_SECONDS_MAX
