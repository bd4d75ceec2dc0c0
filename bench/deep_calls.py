"""What a call to the deep model costs, by the number of its rows: the measurement behind the counterfactual.

Calls are made one at a time, as fast as answers come. In every round each number of rows has its turn of some seconds,
in each precision, and so has idleness: the server stands ready without a call. Of the round's turns the idle joules of
the same round are taken off. The order of the turns moves on by one each round, so that none always follows the same.

The inputs are random: a recurrent network does the same work whatever it is told. FP16 is measured on a GPU in process;
no repository of the server's offers it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.gpu_trace import GpuTrace, power_j
from bench.half_precision import write_half
from cascade.bundle import Bundle, load_bundle
from cascade.config import BundleSettings, Config, DeepSettings, EnergySettings
from cascade.errors import CascadeError, ModelServerError
from cascade.ledger import EnergySampler, watts_per_core
from cascade.ledger.deep_cost import (
    CONFIDENCE,
    RESAMPLES,
    CallCost,
    CostMeter,
    DeepCost,
    Estimate,
    Precision,
    median_estimate,
)
from cascade.ledger.energy import DEEP_METER, IDLE_METER, WORKER_METER, nvml_library
from cascade.ledger.machine import describe_machine
from cascade.ledger.recorded_nvml import RecordedGpu
from cascade.progress import Steps
from cascade.protocols import DeepInputs, DeepStage, EnergyMeter, EnergyReading
from stages.assembly import deep_signature, make_deep_stage
from stages.deep.in_process import OnnxDeepStage
from stages.deep.local_triton import TRITON_VERSION, LocalTriton
from stages.deep.repository import write_repository
from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature
from streaming.service import energy_pids, service_meters

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS_MIN: Final = 5
ROUND_S: Final = 2.0
# NVML's counter steps about every tenth of a second.
ROUND_S_GPU: Final = 5.0
# Different inputs of each size, so that no cache of the server's could answer.
_INPUTS: Final = 8
_WARM_UP_CALLS: Final = 20
_TIMEOUT_S: Final = 30.0
_READY_S: Final = 60.0
# Log-odds by which server and ONNX Runtime on the CPU may differ.
_SCORES_DIFFER_MAX: Final[dict[Precision, float]] = {"fp32": 1e-3, "fp16": 0.1}
_SAMPLE_S: Final = 0.1


class Load(NamedTuple):
    """What a turn does: calls of `rows` in a precision."""

    precision: Precision
    rows: int


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn of `load` (None: idle) from `start_s`: `calls` in `wall_s`, with the joules of each meter in it."""

    load: Load | None
    start_s: float
    calls: int
    wall_s: float
    energy_j: dict[str, float]


class DeepCallsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade bench deep-calls` saw, a cost for each precision.

    `trace`: counters of the GPUs over the run, none where there is no GPU; `turns` are on its clock.
    """

    costs: tuple[DeepCost, ...]
    turns: tuple[Turn, ...]
    trace: tuple[RecordedGpu, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A deep model that answers, by precision the file that it is; `server` is what answers, in words."""

    config: Config
    bundle: Bundle
    server: str
    models: dict[Precision, Path]


@contextmanager
def embedded(
    bundle_path: Path, deep: DeepSettings, precisions: Sequence[Precision], watts: float, directory: Path
) -> Iterator[Served]:
    """A bundle's model on a Triton of its own (in this process for `onnxruntime`), for as long as the context lasts.

    Raises CascadeError where FP16 is wanted anywhere but on a GPU in process.
    """
    if "fp16" in precisions and (deep.backend, deep.device) != ("onnxruntime", "cuda"):
        raise CascadeError("--precision fp16: measured in process on a GPU; add --backend onnxruntime --device cuda")
    if deep.backend == "triton" and deep.device != "cpu":
        raise CascadeError(f"--device {deep.device}: the embedded Triton has no GPU; add --backend onnxruntime")
    bundle = load_bundle(bundle_path)
    settings = Config(
        bundle=BundleSettings(path=str(bundle_path)), deep=deep, energy=EnergySettings(watts_per_core=watts)
    )
    onnx = bundle.directory / "deep.onnx"
    if deep.backend == "onnxruntime":
        models = {one: onnx if one == "fp32" else write_half(onnx, directory / "half.onnx") for one in precisions}
        yield Served(settings, bundle, _in_process(settings), models)
        return
    repository = write_repository(onnx, deep_signature(bundle), directory / "models", "cpu")
    with LocalTriton(repository, log_dir=directory) as triton:
        found = msgspec.structs.replace(settings, deep=DeepSettings(url=triton.grpc_url))
        yield Served(found, bundle, f"the embedded Triton {TRITON_VERSION}, CPU", {"fp32": onnx})


def configured(config: Config) -> Served:
    """The deep model of a configuration, which must run on this machine; raises ModelServerError where it does not."""
    bundle = load_bundle(Path(config.bundle.path))
    models: dict[Precision, Path] = {"fp32": bundle.directory / "deep.onnx"}
    if config.deep.backend == "onnxruntime":
        return Served(config, bundle, _in_process(config), models)
    if energy_pids(config) == [os.getpid()]:
        raise ModelServerError(
            f"deep.url = {config.deep.url}: no process of this machine listens there, so its joules cannot be read; "
            "run this beside the model server"
        )
    return Served(config, bundle, f"the Triton at {config.deep.url}", models)


def _in_process(config: Config) -> str:
    return f"ONNX Runtime in process, {config.deep.device}, threads: {config.deep.threads}"


def _stage(served: Served, precision: Precision) -> DeepStage:
    deep = served.config.deep
    if precision == "fp32":
        return make_deep_stage(served.bundle, deep)
    return OnnxDeepStage(served.models[precision], deep_signature(served.bundle), deep.threads, device=deep.device)


def run_deep_calls(
    served: Served, rows: Sequence[int], rounds: int, round_s: float | None, seed: int
) -> DeepCallsReport:
    """Measure; raises CascadeError for settings out of range, or where the model answers something else than it should.

    `round_s`: seconds of each turn; None: 2, with a GPU 5.
    """
    sizes = checked_sizes(rows, rounds)
    signature = deep_signature(served.bundle)
    inputs = {size: [_inputs(signature, size, seed + number) for number in range(_INPUTS)] for size in sizes}
    with ExitStack() as stack:
        stages = {one: stack.enter_context(closing(_stage(served, one))) for one in served.models}
        apart = {}
        for precision, stage in stages.items():
            stage.wait_ready(_READY_S)
            apart[precision] = _scores_apart(stage, served.bundle, inputs[sizes[-1]][0], precision)
        meters = [one for one in service_meters(served.config) if one.name != IDLE_METER]
        trace = GpuTrace(nvml_library())
        turn_s = round_s or (ROUND_S_GPU if trace.gpus else ROUND_S)
        if trace.gpus and turn_s < ROUND_S_GPU:
            raise CascadeError(
                f"--seconds {turn_s:g}: a GPU's energy counter steps every 0.1 s; use {ROUND_S_GPU:g} or more"
            )
        with Steps() as progress:
            turns = _Bench(stages, meters, inputs, turn_s, trace).run(rounds, progress)
        readings = {meter.name: meter.read() for meter in meters}
    costs = tuple(_cost(served, one, turns, readings, rounds, turn_s, apart[one]) for one in stages)
    return DeepCallsReport(costs=costs, turns=tuple(turns), trace=trace.recorded())


def checked_sizes(rows: Sequence[int], rounds: int) -> tuple[int, ...]:
    """The sizes, rising; raises CascadeError where they or the rounds are out of range."""
    sizes = tuple(sorted(set(rows)))
    wrong = [size for size in sizes if not 1 <= size <= BATCH_ROWS_MAX]
    if wrong or not sizes:
        raise CascadeError(f"--rows {', '.join(map(str, wrong)) or 'none'}: use sizes of 1 to {BATCH_ROWS_MAX}")
    if sizes[0] != 1:
        raise CascadeError(
            f"--rows {sizes[0]} as the smallest: measure 1 as well, most calls of a quiet stream have it"
        )
    if rounds < ROUNDS_MIN:
        raise CascadeError(f"--rounds {rounds}: an interval wants {ROUNDS_MIN} or more")
    return sizes


def _inputs(signature: DeepSignature, rows: int, seed: int) -> DeepInputs:
    chance = np.random.default_rng(seed)
    return DeepInputs(
        sequence=chance.standard_normal(
            (rows, signature.sequence_length, signature.sequence_width), dtype=np.float32
        ),
        features=chance.standard_normal((rows, signature.features), dtype=np.float32),
    )  # fmt: skip


def _scores_apart(stage: DeepStage, bundle: Bundle, inputs: DeepInputs, precision: Precision) -> float:
    """By how much log-odds differ at most from the bundle's model, which is what must be timed."""
    with closing(OnnxDeepStage(bundle.directory / "deep.onnx", deep_signature(bundle))) as reference:
        wanted = reference.submit(inputs, _TIMEOUT_S).result()
    apart = float(np.abs(stage.submit(inputs, _TIMEOUT_S).result() - wanted).max())
    if apart > _SCORES_DIFFER_MAX[precision]:
        raise CascadeError(f"the server's scores differ from the bundle's model by up to {apart:.2g}; serve that model")
    return apart


class _Bench:
    """Turns of calls and of idleness, with every meter read before and after."""

    def __init__(
        self, stages: dict[Precision, DeepStage], meters: Sequence[EnergyMeter], inputs: dict[int, list[DeepInputs]],
        turn_s: float, trace: GpuTrace,
    ) -> None:  # fmt: skip
        self._stages, self._meters, self._inputs, self._turn_s, self._trace = stages, meters, inputs, turn_s, trace
        # Counters that step, wrap or are integrated over time; the others are read at the ends of a turn only, since
        # reading them takes CPU time of the client.
        self._counters = [meter for meter in meters if meter.read().kind == "measured"]
        self._metering = threading.Lock()

    def run(self, rounds: int, progress: Callable[[str, float], None]) -> list[Turn]:
        """Each load and idleness, a turn a round."""
        loads = [Load(precision, rows) for precision in self._stages for rows in self._inputs]
        for number in range(_WARM_UP_CALLS):
            for busy in loads:
                self._call(busy, number)
        order: list[Load | None] = [None, *loads]
        turns: list[Turn] = []
        with EnergySampler(self._sample, _SAMPLE_S) if self._counters else nullcontext():
            for number in range(rounds):
                first = number % len(order)
                for place, load in enumerate([*order[first:], *order[:first]]):
                    progress("measure, by turns", (number + place / len(order)) / rounds)
                    turns.append(self._turn(load))
        progress("measure, by turns", 1.0)
        return turns

    def _call(self, load: Load, number: int) -> None:
        self._stages[load.precision].submit(self._inputs[load.rows][number % _INPUTS], _TIMEOUT_S).result()

    def _turn(self, load: Load | None) -> Turn:
        before = self._read_j()
        started_s = time.monotonic()
        calls = 0
        if load is None:
            time.sleep(self._turn_s)
        else:
            while time.monotonic() - started_s < self._turn_s:
                self._call(load, calls)
                calls += 1
        wall_s = time.monotonic() - started_s
        after = self._read_j()
        return Turn(
            load=load, start_s=started_s - self._trace.start_s, calls=calls, wall_s=wall_s,
            energy_j={name: after[name] - joules for name, joules in before.items()},
        )  # fmt: skip

    def _read_j(self) -> dict[str, float]:
        with self._metering:
            return {meter.name: meter.read().energy_j for meter in self._meters}

    def _sample(self) -> None:
        with self._metering:
            for meter in self._counters:
                meter.read()
            self._trace.sample()


def _cost(
    served: Served, precision: Precision, turns: Sequence[Turn], readings: dict[str, EnergyReading], rounds: int,
    turn_s: float, apart: float,
) -> DeepCost:  # fmt: skip
    watts = watts_per_core(served.config.energy)
    idle = _of(turns, None)
    rows = sorted({turn.load.rows for turn in turns if turn.load is not None})
    return DeepCost(
        measured_at=datetime.now(UTC),
        bundle_version=served.bundle.version,
        model_sha256=hashlib.sha256(served.models[precision].read_bytes()).hexdigest(),
        backend=served.config.deep.backend,
        server=served.server,
        precision=precision,
        scores_apart=apart,
        machine=describe_machine(),
        watts_per_core=watts,
        rounds=rounds,
        round_s=turn_s,
        method=(
            f"one call at a time, by turns of {turn_s:g} s in {rounds} rounds, less the same round's idle; medians, "
            f"{CONFIDENCE:.0%} percentile bootstrap over rounds ({RESAMPLES:,} resamples)"
        ),
        meters=tuple(
            CostMeter(
                meter=name, kind=reading.kind, source=reading.source,
                idle_w=median_estimate([one.energy_j[name] / one.wall_s for one in idle]),
            )
            for name, reading in readings.items()
        ),
        calls=tuple(call_cost(size, _of(turns, Load(precision, size)), idle, watts) for size in rows),
    )  # fmt: skip


def _of(turns: Sequence[Turn], load: Load | None) -> list[Turn]:
    return [turn for turn in turns if turn.load == load]


def call_cost(rows: int, turns: Sequence[Turn], idle: Sequence[Turn], watts: float) -> CallCost:
    """One size's turns, each beside the idle turn of its round; `watts`: of a busy core, behind modelled joules."""
    energy_mj = {name: _energy_mj(name, turns, idle) for name in turns[0].energy_j}

    def cpu_ms(name: str) -> list[float]:
        return [1e3 * _above_idle_j(name, *pair) / watts for pair in zip(turns, idle, strict=True)]

    return CallCost(
        rows=rows,
        calls=sum(turn.calls for turn in turns),
        wall_ms=median_estimate([1e3 * turn.wall_s / turn.calls for turn in turns]),
        client_cpu_ms=median_estimate(cpu_ms(WORKER_METER)),
        server_cpu_ms=median_estimate(cpu_ms(DEEP_METER)) if DEEP_METER in energy_mj else None,
        energy_mj=energy_mj,
    )


def _energy_mj(name: str, turns: Sequence[Turn], idle: Sequence[Turn]) -> Estimate:
    return median_estimate([1e3 * _above_idle_j(name, *pair) for pair in zip(turns, idle, strict=True)])


def _above_idle_j(name: str, turn: Turn, idle: Turn) -> float:
    """Joules a call by a meter, less what it tells in the same time without calls."""
    return (turn.energy_j[name] - idle.energy_j[name] / idle.wall_s * turn.wall_s) / turn.calls


def by_power(report: DeepCallsReport, precision: Precision) -> dict[str, dict[int, Estimate]]:
    """Joules a call of each GPU, mJ, by rows, from its integrated power: a check of the counter, and finer than it.

    Empty for a GPU without power in its trace.
    """
    found: dict[str, dict[int, Estimate]] = {}
    for number, gpu in enumerate(report.trace):
        name = f"gpu{number}"
        turns = [
            msgspec.structs.replace(turn, energy_j={name: joules})
            for turn in report.turns
            if (joules := power_j(gpu, turn.start_s, turn.start_s + turn.wall_s)) is not None
        ]
        found[name] = {
            rows: _energy_mj(name, _of(turns, Load(precision, rows)), _of(turns, None))
            for rows in sorted({turn.load.rows for turn in turns if turn.load is not None})
        }
    return found


def show_deep_calls(report: DeepCallsReport, console: Console) -> None:
    """Print a table for each precision."""
    for cost in report.costs:
        _show_cost(cost, by_power(report, cost.precision), console)


def _show_cost(cost: DeepCost, checks: dict[str, dict[int, Estimate]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    counters = [meter.meter for meter in cost.meters if meter.kind == "measured"]
    server = any(call.server_cpu_ms is not None for call in cost.calls)
    columns = ("rows", "wall ms", *(["server CPU ms"] if server else []), "client CPU ms", "µs/row", "mJ/row*")
    for name in (*columns, *(f"{name} mJ" for name in counters)):
        table.add_column(name, justify="right", no_wrap=True)
    for call in cost.calls:
        cpu_ms = [one for one in (call.server_cpu_ms, call.client_cpu_ms) if one is not None]
        per_row_us = 1e3 * sum(one.value for one in cpu_ms) / call.rows
        table.add_row(
            f"{call.rows}", f"{call.wall_ms.value:.2f}", *(_interval(one) for one in cpu_ms),
            f"{per_row_us:,.3g}" if per_row_us < 100 else f"{per_row_us:,.0f}",
            f"{per_row_us * cost.watts_per_core / 1e3:.3f}",
            *(_interval(call.energy_mj[name]) for name in counters),
        )  # fmt: skip
    idle = ", ".join(f"{one.meter} {one.idle_w.value:.3g} W ({one.kind})" for one in cost.meters)
    console.print()
    console.print(table)
    checked = [
        f"{name} by its power, integrated, mJ: " + ", ".join(f"{rows}: {_interval(mj)}" for rows, mj in by.items())
        for name, by in checks.items()
        if by
    ]
    lines = [
        f"{cost.server}; {cost.precision.upper()}; bundle {cost.bundle_version}",
        cost.method,
        f"without calls: {idle}",
        f"* modelled: CPU seconds of both × {cost.watts_per_core:g} W per busy core (stated)",
        *checked,
        cost.machine.text,
    ]
    console.print("\n" + "\n".join(f" {line}" for line in lines), highlight=False)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"
