"""What a call to the deep model costs, by the number of its rows: the measurement behind the counterfactual.

The client sends the next call when the last answer arrives. In every round, each number of rows in each precision gets
a turn of some seconds, and so does the idle server. The idle joules of a round are subtracted from its other turns. The
order rotates by one turn each round, so that no turn always follows the same neighbour.

The inputs are random: a recurrent network does the same work for any values. FP16 is measured on a GPU in this process;
the Triton repository does not offer it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from rich.console import Console

from bench.gpu_trace import GpuTrace, RecordedGpu, power_j
from bench.half_precision import write_half
from bench.tables import figure_table, print_table
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
from cascade.progress import StepProgress
from cascade.protocols import DeepInputs, DeepStage, EnergyMeter, EnergyReading
from stages.assembly import deep_signature, make_deep_stage
from stages.deep.in_process import OnnxDeepStage
from stages.deep.local_triton import TRITON_VERSION, LocalTriton
from stages.deep.repository import write_repository
from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature
from streaming.service.serve import energy_pids, service_meters

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS_MIN: Final = 5
ROUND_S: Final = 2.0
# NVML's counter steps about every 0.1 s; a longer turn makes the step a small share of its joules.
ROUND_S_GPU: Final = 5.0
STEP: Final = "cost of a deep call"
# Different inputs of each size, so that no cache of the server can answer.
_INPUTS: Final = 8
_WARM_UP_CALLS: Final = 20
_TIMEOUT_S: Final = 30.0
_READY_S: Final = 60.0
# Log-odds by which the server may differ from ONNX Runtime on the CPU.
_DIFFERENCE_MAX: Final[dict[Precision, float]] = {"fp32": 1e-3, "fp16": 0.1}
_SAMPLE_S: Final = 0.1


class Load(NamedTuple):
    """The calls of a turn: `rows` transactions each, in a precision."""

    precision: Precision
    rows: int


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn of `load` (None: idle) from `start_s` on: `calls` in `wall_s`, and the joules of each meter."""

    load: Load | None
    start_s: float
    calls: int
    wall_s: float
    energy_j: dict[str, float]


class DeepCallsReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench deep-calls`: a cost for each precision.

    `trace`: the counters of every GPU over the run; empty without a GPU. `turns` use the same clock.
    """

    costs: tuple[DeepCost, ...]
    turns: tuple[Turn, ...]
    trace: tuple[RecordedGpu, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A deep model to measure: its file by precision, and `server`, what answers the calls, in words."""

    config: Config
    bundle: Bundle
    server: str
    models: dict[Precision, Path]


@contextmanager
def embedded(
    bundle_path: Path, deep: DeepSettings, precisions: Sequence[Precision], watts: float, directory: Path
) -> Iterator[Served]:
    """Serves a bundle's model while the context lasts: on an embedded Triton, or in this process with `onnxruntime`.

    Raises CascadeError where `deep` and `precisions` do not fit: FP16 needs a GPU in this process.

    bundle_path: the bundle's directory.
    deep: backend and device.
    precisions: those to measure.
    watts: of a busy core, for modelled joules.
    directory: for the FP16 model, Triton's repository and its log.
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
        half = directory / "half.onnx"
        models = {precision: onnx if precision == "fp32" else write_half(onnx, half) for precision in precisions}
        yield Served(settings, bundle, _in_process(settings), models)
        return
    repository = write_repository(onnx, deep_signature(bundle), directory / "models", "cpu")
    with LocalTriton(repository, log_dir=directory) as triton:
        settings = msgspec.structs.replace(settings, deep=DeepSettings(url=triton.grpc_url))
        yield Served(settings, bundle, f"the embedded Triton {TRITON_VERSION}, CPU", {"fp32": onnx})


def configured(config: Config) -> Served:
    """The deep model that a configuration names; raises ModelServerError where it runs on another machine."""
    bundle = load_bundle(Path(config.bundle.path))
    models: dict[Precision, Path] = {"fp32": bundle.directory / "deep.onnx"}
    if config.deep.backend == "onnxruntime":
        return Served(config, bundle, _in_process(config), models)
    if energy_pids(config) == [os.getpid()]:
        raise ModelServerError(
            f"deep.url = {config.deep.url}: no process of this machine listens there, so its joules cannot be read;"
            " run this command on the model server's machine"
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
    served: Served,
    rows: Sequence[int],
    rounds: int,
    round_s: float | None,
    seed: int,
    progress: StepProgress,
) -> DeepCallsReport:
    """Measures the cost of a call for each number of rows.

    Raises CascadeError for settings out of range, or where the scores are not those of the bundle's model.

    served: the model.
    rows: transactions of a call; the smallest must be 1.
    rounds: at least ROUNDS_MIN.
    round_s: seconds of a turn; None: 2, with a GPU 5.
    seed: of the inputs.
    progress: gets the step and its share.
    """
    sizes = checked_sizes(rows, rounds)
    signature = deep_signature(served.bundle)
    inputs = {size: [_inputs(signature, size, seed + number) for number in range(_INPUTS)] for size in sizes}
    with ExitStack() as stack:
        stages = {precision: stack.enter_context(closing(_stage(served, precision))) for precision in served.models}
        differences = {}
        for precision, stage in stages.items():
            stage.wait_ready(_READY_S)
            differences[precision] = _score_difference(stage, served.bundle, inputs[sizes[-1]][0], precision)
        meters = [meter for meter in service_meters(served.config) if meter.name != IDLE_METER]
        trace = GpuTrace(nvml_library())
        turn_s = round_s or (ROUND_S_GPU if trace.gpus else ROUND_S)
        if trace.gpus and turn_s < ROUND_S_GPU:
            raise CascadeError(
                f"--seconds {turn_s:g}: a GPU's energy counter steps every 0.1 s; use {ROUND_S_GPU:g} or more"
            )
        turns = _Bench(stages, meters, inputs, turn_s, trace).run(rounds, progress)
        readings = {meter.name: meter.read() for meter in meters}
    costs = tuple(
        _cost(served, precision, turns, readings, rounds, turn_s, difference)
        for precision, difference in differences.items()
    )
    return DeepCallsReport(costs=costs, turns=tuple(turns), trace=trace.recorded())


def checked_sizes(rows: Sequence[int], rounds: int) -> tuple[int, ...]:
    """The different sizes in ascending order; raises CascadeError where they or the rounds are out of range."""
    sizes = tuple(sorted(set(rows)))
    wrong = [size for size in sizes if not 1 <= size <= BATCH_ROWS_MAX]
    if wrong or not sizes:
        raise CascadeError(f"--rows {', '.join(map(str, wrong)) or 'none'}: use sizes of 1 to {BATCH_ROWS_MAX}")
    if sizes[0] != 1:
        raise CascadeError(f"--rows {sizes[0]} is the smallest: add --rows 1, the size of most calls of a quiet stream")
    if rounds < ROUNDS_MIN:
        raise CascadeError(f"--rounds {rounds}: an interval needs {ROUNDS_MIN} or more")
    return sizes


def _inputs(signature: DeepSignature, rows: int, seed: int) -> DeepInputs:
    chance = np.random.default_rng(seed)
    sequences = {
        name: chance.standard_normal((rows, *shape), dtype=np.float32) for name, shape in signature.sequences.items()
    }
    return DeepInputs(sequences, chance.standard_normal((rows, signature.features), dtype=np.float32))


def _score_difference(stage: DeepStage, bundle: Bundle, inputs: DeepInputs, precision: Precision) -> float:
    """The largest difference in log-odds from the bundle's model; raises CascadeError where another model answers."""
    with closing(OnnxDeepStage(bundle.directory / "deep.onnx", deep_signature(bundle))) as reference:
        expected = reference.submit(inputs, _TIMEOUT_S).result()
    difference = float(np.abs(stage.submit(inputs, _TIMEOUT_S).result() - expected).max())
    if difference > _DIFFERENCE_MAX[precision]:
        raise CascadeError(
            f"the server's scores differ by up to {difference:.2g} from those of the bundle's model; serve that model"
        )
    return difference


class _Bench:
    """Runs busy and idle turns, and reads every meter before and after each."""

    def __init__(
        self,
        stages: dict[Precision, DeepStage],
        meters: Sequence[EnergyMeter],
        inputs: dict[int, list[DeepInputs]],
        turn_s: float,
        trace: GpuTrace,
    ) -> None:
        self._stages, self._meters, self._inputs, self._turn_s, self._trace = stages, meters, inputs, turn_s, trace
        # Hardware counters step, wrap or are integrated over time, so they are also read during a turn. Other meters
        # are not: reading them takes the client's CPU time.
        self._counters = [meter for meter in meters if meter.read().kind == "measured"]
        self._metering = threading.Lock()

    def run(self, rounds: int, progress: StepProgress) -> list[Turn]:
        """In each round, a turn of every load and an idle turn."""
        loads = [Load(precision, rows) for precision in self._stages for rows in self._inputs]
        for busy in loads:
            self._warm_up(busy)
        order: list[Load | None] = [None, *loads]
        turns: list[Turn] = []
        with EnergySampler(self._sample, _SAMPLE_S) if self._counters else nullcontext():
            for number in range(rounds):
                first = number % len(order)
                for position, load in enumerate([*order[first:], *order[:first]]):
                    progress(STEP, (number + position / len(order)) / rounds)
                    turns.append(self._turn(load))
        progress(STEP, 1.0)
        return turns

    def _warm_up(self, load: Load) -> None:
        """Some calls that do not count, for at most the time of a turn: a call of a large model takes long."""
        end_s = time.monotonic() + self._turn_s
        for number in range(_WARM_UP_CALLS):
            self._call(load, number)
            if time.monotonic() > end_s:
                return

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
        energy_j = {name: after[name] - joules for name, joules in before.items()}
        return Turn(load=load, start_s=started_s - self._trace.start_s, calls=calls, wall_s=wall_s, energy_j=energy_j)

    def _read_j(self) -> dict[str, float]:
        with self._metering:
            return {meter.name: meter.read().energy_j for meter in self._meters}

    def _sample(self) -> None:
        with self._metering:
            for meter in self._counters:
                meter.read()
            self._trace.sample()


def _cost(
    served: Served,
    precision: Precision,
    turns: Sequence[Turn],
    readings: dict[str, EnergyReading],
    rounds: int,
    turn_s: float,
    difference: float,
) -> DeepCost:
    watts = watts_per_core(served.config.energy)
    idle = _of(turns, None)
    idle_w = {name: median_estimate([turn.energy_j[name] / turn.wall_s for turn in idle]) for name in readings}
    meters = tuple(
        CostMeter(meter=name, kind=reading.kind, source=reading.source, idle_w=idle_w[name])
        for name, reading in readings.items()
    )
    return DeepCost(
        measured_at=datetime.now(UTC),
        bundle_version=served.bundle.version,
        model_sha256=hashlib.sha256(served.models[precision].read_bytes()).hexdigest(),
        backend=served.config.deep.backend,
        server=served.server,
        precision=precision,
        scores_apart=difference,
        machine=describe_machine(),
        watts_per_core=watts,
        rounds=rounds,
        round_s=turn_s,
        method=(
            f"one call at a time, turns of {turn_s:g} s in {rounds} rounds, idle of the same round subtracted;"
            f" medians, {CONFIDENCE:.0%} percentile bootstrap over rounds ({RESAMPLES:,} resamples)"
        ),
        meters=meters,
        calls=tuple(call_cost(rows, _of(turns, Load(precision, rows)), idle, watts) for rows in _sizes(turns)),
    )


def _sizes(turns: Sequence[Turn]) -> list[int]:
    return sorted({turn.load.rows for turn in turns if turn.load is not None})


def _of(turns: Sequence[Turn], load: Load | None) -> list[Turn]:
    return [turn for turn in turns if turn.load == load]


def call_cost(rows: int, turns: Sequence[Turn], idle: Sequence[Turn], watts: float) -> CallCost:
    """The cost of a call of `rows` transactions.

    turns: the busy turns of that size, a turn a round.
    idle: the idle turns of the same rounds.
    watts: of a busy core; modelled joules are CPU seconds × watts.
    """
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
    """Joules a call by a meter, less those of the idle server in the same time."""
    return (turn.energy_j[name] - idle.energy_j[name] / idle.wall_s * turn.wall_s) / turn.calls


def by_power(report: DeepCallsReport, precision: Precision) -> dict[str, dict[int, Estimate]]:
    """Joules a call of each GPU, mJ, by rows, from its integrated power: an independent check of the counter.

    Empty for a GPU without power in its trace.
    """
    energy_mj: dict[str, dict[int, Estimate]] = {}
    for number, gpu in enumerate(report.trace):
        name = f"gpu{number}"
        turns = [
            msgspec.structs.replace(turn, energy_j={name: joules})
            for turn in report.turns
            if (joules := power_j(gpu, turn.start_s, turn.start_s + turn.wall_s)) is not None
        ]
        idle = _of(turns, None)
        energy_mj[name] = {rows: _energy_mj(name, _of(turns, Load(precision, rows)), idle) for rows in _sizes(turns)}
    return energy_mj


def show_deep_calls(report: DeepCallsReport, console: Console) -> None:
    """Prints a table for each precision."""
    for cost in report.costs:
        _show_cost(cost, by_power(report, cost.precision), console)


def _show_cost(cost: DeepCost, checks: dict[str, dict[int, Estimate]], console: Console) -> None:
    counters = [meter.meter for meter in cost.meters if meter.kind == "measured"]
    server = any(call.server_cpu_ms is not None for call in cost.calls)
    columns = ("wall ms", *(["server CPU ms"] if server else []), "client CPU ms", "µs/row", "mJ/row*")
    table = figure_table(None, "rows", *columns, *(f"{name} mJ" for name in counters))
    for call in cost.calls:
        cpu_ms = [estimate for estimate in (call.server_cpu_ms, call.client_cpu_ms) if estimate is not None]
        per_row_us = 1e3 * sum(estimate.value for estimate in cpu_ms) / call.rows
        table.add_row(
            f"{call.rows}",
            f"{call.wall_ms.value:.2f}",
            *(_interval(estimate) for estimate in cpu_ms),
            f"{per_row_us:,.3g}" if per_row_us < 100 else f"{per_row_us:,.0f}",
            f"{per_row_us * cost.watts_per_core / 1e3:.3f}",
            *(_interval(call.energy_mj[name]) for name in counters),
        )
    idle = ", ".join(f"{meter.meter} {meter.idle_w.value:.3g} W ({meter.kind})" for meter in cost.meters)
    checked = [
        f"{name} by its power, integrated, mJ: " + ", ".join(f"{rows}: {_interval(mj)}" for rows, mj in by_rows.items())
        for name, by_rows in checks.items()
        if by_rows
    ]
    print_table(
        console,
        table,
        f"{cost.server}; {cost.precision.upper()}; bundle {cost.bundle_version}",
        cost.method,
        f"without calls: {idle}",
        f"* modelled: CPU seconds of client and server × {cost.watts_per_core:g} W per busy core (stated)",
        *checked,
        cost.machine.text,
    )


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"
