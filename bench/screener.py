"""What a score costs by method: the methods take turns in one thread, on the same models and rows.

LightGBM's `predict` is the reference. The others are the compiled screener, LightGBM's single-row fast call (its C
API), ONNX Runtime's tree ensemble, and tl2cgen and lleaves where they are installed; the report names what is missing.
The scores of every method are compared with the reference before the methods are timed.
"""

from __future__ import annotations

import ctypes
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightgbm
import msgspec
import numpy as np
from rich.console import Console

from bench.tables import figure_table, print_table
from bench.turns import Spread, by_turns, seconds_of
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Float32, Float64, Int64
from cascade.errors import CascadeError
from cascade.ledger.machine import Machine, describe_machine
from stages.screener.compiled import CompiledScreener
from stages.screener.forest import ColumnKind, UnsupportedForestError, read_forest
from stages.screener.layouts import walk_tables

Score = Callable[[Float32], Any]
BATCHES = (1, 32, 256, 4096)
# Trees, leaves and depth (-1: any) of the models beside the shipped model, trained on 30 random features.
SIZES = ((64, 16, 5), (100, 31, 6), (100, 31, -1), (300, 63, -1))
FEATURES, TRAINING_ROWS = 30, 20_000
# A turn has this number of rows at any batch size. Each call gets other rows: with the same rows, the processor would
# predict every branch.
ROWS_A_TURN = 8_192
SINGLE_CALLS_A_TURN = 512
DIFFERENCE_MAX, FLOAT32_DIFFERENCE_MAX = 1e-9, 1e-3


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """A method's wall time, median over the rounds; `spread`: the least and the largest ratio."""

    model: str
    method: str
    batch: int
    us_per_row: float
    ratio_to_lightgbm: float
    spread: tuple[float, float]


class ScreenerReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench screener`.

    `load_s`: seconds to read each model and lay it out. `compile_s`: until the kernels were ready, once a process, from
    numba's cache or compiled. `missing`: methods that are not installed, or that do not run with the installed
    libraries. `vectors`: the processor's vector instructions.
    """

    timings: list[Timing]
    load_s: dict[str, float]
    compile_s: float
    missing: list[str]
    vectors: str
    rounds: int
    seed: int
    machine: Machine


def run_screener(rounds: int, seed: int) -> ScreenerReport:
    """Measures every method; raises CascadeError where its scores are not LightGBM's. `seed`: of rows and models."""
    chance = np.random.default_rng(seed)
    models = dict(_models(chance, seed))
    compile_s = seconds_of(CompiledScreener(next(iter(models.values())).encode()).warm_up)
    timings, load_s, missing = [], {}, set()
    for name, text in models.items():
        started_s = time.perf_counter()
        compiled = CompiledScreener(text.encode())
        load_s[name] = time.perf_counter() - started_s
        rows = chance.normal(size=(ROWS_A_TURN, compiled.width)).astype(np.float32)
        with _methods(text, compiled) as (methods, absent):
            missing |= absent
            _check_equal(name, methods, rows)
            for batch in BATCHES:
                timings += _timed(name, methods, rows, batch, rounds)
    return ScreenerReport(
        timings=timings,
        load_s=load_s,
        compile_s=compile_s,
        missing=sorted(missing),
        vectors=_vectors(),
        rounds=rounds,
        seed=seed,
        machine=describe_machine(),
    )


def _models(chance: np.random.Generator, seed: int) -> Iterator[tuple[str, str]]:
    yield "shipped", load_bundle(SHIPPED_BUNDLE).content["screener.txt"].decode()
    rows = chance.normal(size=(TRAINING_ROWS, FEATURES)).astype(np.float32)
    positive = (rows[:, :5].sum(axis=1) + chance.normal(size=TRAINING_ROWS) > 1).astype(int)
    for trees, leaves, depth in SIZES:
        parameters = {"objective": "binary", "feature_fraction": 0.7, "seed": seed, "verbose": -1}
        parameters |= {"num_leaves": leaves, "max_depth": depth}
        booster = lightgbm.train(parameters, lightgbm.Dataset(rows, positive), trees)
        yield f"{trees} × {leaves}" + (f", depth {depth}" if depth > 0 else ""), booster.model_to_string()


# --- methods ----------------------------------------------------------------------------------------------------------


@contextmanager
def _methods(text: str, compiled: CompiledScreener) -> Iterator[tuple[dict[str, Score], set[str]]]:
    """The methods that run here for a model, LightGBM's predict first, and the names of those that do not."""
    booster = lightgbm.Booster(model_str=text)
    methods: dict[str, Score] = {
        "lightgbm": lambda rows: booster.predict(rows, raw_score=True, num_threads=1),
        "compiled": compiled.score,
    }
    missing = set()
    others: dict[str, Callable[[], Score]] = {
        "onnxruntime": lambda: _onnxruntime(text),
        "tl2cgen": lambda: _tl2cgen(text, Path(directory)),
        "lleaves": lambda: _lleaves(text, Path(directory)),
    }
    with tempfile.TemporaryDirectory() as directory, _single_row_fast(booster) as single:
        methods["lightgbm, one row"] = single
        for name, make in others.items():
            try:
                methods[name] = make()
            except ImportError:
                missing.add(name)
            except UnsupportedForestError as error:
                missing.add(f"{name} ({error})")
            except AttributeError as error:
                # lleaves calls functions that the llvmlite releases which numba needs no longer have
                missing.add(f"{name} ({error})")
        yield methods, missing


@contextmanager
def _single_row_fast(booster: lightgbm.Booster) -> Iterator[Score]:
    """LightGBM's call for a single row, prepared once: the cheapest call that its C API offers."""
    library, width = lightgbm.basic._LIB, booster.num_feature()
    handle, length = ctypes.c_void_p(), ctypes.c_int64()
    raw_scores, float32 = 1, 0
    first_iteration, all_iterations = 0, -1
    settings = map(ctypes.c_int, (raw_scores, first_iteration, all_iterations, float32, width))
    library.LGBM_BoosterPredictForMatSingleRowFastInit(
        booster._handle, *settings, ctypes.c_char_p(b"num_threads=1"), ctypes.byref(handle)
    )
    out = (ctypes.c_double * 1)()
    call, written = library.LGBM_BoosterPredictForMatSingleRowFast, ctypes.byref(length)

    def score(rows: Float32) -> Float64:
        scores: Float64 = np.empty(len(rows))
        first, step = rows.ctypes.data, rows.strides[0]
        for position in range(len(rows)):
            call(handle, ctypes.c_void_p(first + position * step), written, out)
            scores[position] = out[0]
        return scores

    try:
        yield score
    finally:
        library.LGBM_FastConfigFree(handle)


def _onnxruntime(text: str) -> Score:
    """ONNX Runtime on the trees as an ONNX tree ensemble, one thread."""
    import onnxruntime
    from onnx import TensorProto, helper

    forest = read_forest(text.encode())
    if (forest.columns.table[:, 1] == ColumnKind.CATEGORY).any():
        raise UnsupportedForestError("an ensemble has no splits by category")
    nodes = walk_tables(forest, group=1)
    node: Int64 = np.arange(len(nodes.column), dtype=np.int64)
    tree = np.searchsorted(nodes.root, node, side="right") - 1
    first = nodes.root[tree]
    left, right = nodes.child[::2], nodes.child[1::2]
    is_leaf = left == node
    ensemble = helper.make_node(
        "TreeEnsembleRegressor",
        ["rows"],
        ["scores"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=tree,
        nodes_nodeids=node - first,
        nodes_featureids=forest.columns.feature[nodes.column],
        nodes_values=np.where(is_leaf, np.float32(0), nodes.threshold),
        nodes_modes=["LEAF" if leaf else "BRANCH_LEQ" for leaf in is_leaf],
        nodes_truenodeids=left - first,
        nodes_falsenodeids=right - first,
        target_treeids=tree[is_leaf],
        target_nodeids=(node - first)[is_leaf],
        target_ids=np.zeros(int(is_leaf.sum()), np.int64),
        target_weights=nodes.value[is_leaf],
    )
    inputs = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [None, forest.width])
    outputs = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 1])
    graph = helper.make_graph([ensemble], "trees", [inputs], [outputs])
    operators = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=operators, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"rows": rows})[0][:, 0]


def _tl2cgen(text: str, directory: Path) -> Score:
    """tl2cgen: the trees as C code, compiled by gcc."""
    import tl2cgen
    import treelite

    (directory / "model.txt").write_text(text)
    model = treelite.frontend.load_lightgbm_model(directory / "model.txt")
    tl2cgen.export_lib(model, toolchain="gcc", libpath=directory / "model.so", params={"parallel_comp": 4})
    predictor = tl2cgen.Predictor(directory / "model.so", nthread=1)
    return lambda rows: predictor.predict(tl2cgen.DMatrix(rows), pred_margin=True).reshape(-1)


def _lleaves(text: str, directory: Path) -> Score:
    """lleaves: the trees as LLVM code, compiled."""
    import lleaves

    (directory / "model.txt").write_text(text)
    model = lleaves.Model(model_file=directory / "model.txt")
    model.compile(raw_score=True)
    return lambda rows: model.predict(rows, n_jobs=1)


# --- measuring --------------------------------------------------------------------------------------------------------


def _check_equal(model: str, methods: dict[str, Score], rows: Float32) -> None:
    expected = methods["lightgbm"](rows)
    for name, score in methods.items():
        allowed = DIFFERENCE_MAX if name in {"compiled", "lightgbm, one row"} else FLOAT32_DIFFERENCE_MAX
        difference = float(np.abs(score(rows) - expected).max())
        if difference > allowed:
            raise CascadeError(f"{name} on {model}: scores differ from LightGBM's by up to {difference:.3g}")


def _timed(model: str, methods: dict[str, Score], rows: Float32, batch: int, rounds: int) -> list[Timing]:
    calls = min(ROWS_A_TURN // batch, SINGLE_CALLS_A_TURN)
    parts = [rows[call * batch : (call + 1) * batch] for call in range(calls)]
    timed = {name: score for name, score in methods.items() if batch == 1 or name != "lightgbm, one row"}

    def us_per_row(score: Score) -> float:
        return 1e6 * seconds_of(lambda: [score(part) for part in parts]) / (calls * batch)

    costs_us = by_turns({name: partial(us_per_row, score) for name, score in timed.items()}, rounds)
    timings = []
    for name, costs in costs_us.items():
        ratio = Spread.of(costs_us["lightgbm"] / costs)
        timings.append(
            Timing(
                model=model,
                method=name,
                batch=batch,
                us_per_row=float(np.median(costs)),
                ratio_to_lightgbm=ratio.median,
                spread=(ratio.least, ratio.largest),
            )
        )
    return timings


def _vectors() -> str:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    names = {"avx512f": "AVX-512", "avx2": "AVX2", "neon": "NEON", "sse2": "SSE2"}
    return next((name for feature, name in names.items() if features.get(feature)), "none")


# --- the table --------------------------------------------------------------------------------------------------------


def show(report: ScreenerReport, console: Console) -> None:
    """Prints the report: µs a row, and the ratio to LightGBM's predict in the same round."""
    table = figure_table("µs a row", *(f"batch {batch:,}" for batch in BATCHES))
    methods = list(dict.fromkeys(timing.method for timing in report.timings))
    timings = {(timing.model, timing.method, timing.batch): timing for timing in report.timings}
    for model in dict.fromkeys(timing.model for timing in report.timings):
        table.add_row(f"[bold]{model}")
        for method in methods:
            cells = [_cell(timings.get((model, method, batch))) for batch in BATCHES]
            table.add_row(f" {method}", *cells, end_section=method == methods[-1])
    load = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.load_s.items())
    print_table(
        console,
        table,
        f"× faster than LightGBM's predict; one thread; medians of {report.rounds} rounds",
        f"compiled: model read in {load}; kernels ready after {report.compile_s:.1f} s",
        f"not installed: {', '.join(report.missing) or 'none'}",
        f"{report.vectors}; {report.machine.text}; seed {report.seed}",
    )


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    digits = max(2 - math.floor(math.log10(timing.us_per_row)), 0)
    return f"{timing.us_per_row:.{digits}f} {timing.ratio_to_lightgbm:5.1f}×"
