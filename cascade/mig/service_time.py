"""Seconds and joules of a batch of the deep model by its rows, on a slice, on a part of a GPU, or on a whole one.

Where they come from is part of the figure (`Basis`):

- measured: `cascade bench deep-calls` ran on this very slice.
- modelled: measured on another slice or GPU, and scaled.
- assumed: nothing was measured for this plan. The built-in figures are scaled: those of the shipped model on a whole
  H200, called in process by ONNX Runtime (docs/energy.md). They show how a planner's output looks, and no more.

The model of scaling: a slice with 1/k of the throughput takes as long for r rows as the measured one for k · r.

    seconds(r, slice) = seconds measured(r · k),   k = max(FP32 throughput, memory bandwidth), measured ÷ slice

Throughput is in proportion to SMs, bandwidth to memory slices. So what does not depend on rows (gRPC, launching, one
row's latency) costs the same on every slice, and a slice reaches its rising part sooner. Between measured rows the time
is interpolated linearly; beyond them it goes on with the last slope. The law misses kernels that one row already makes
wider than the slice, caches (L2 is divided too), clocks that differ under load, and everything that is not FP32.

Joules above idle belong to the work: a batch takes the same on each slice of a GPU, and on another GPU in proportion to
watts above idle ÷ FP32 throughput at its maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np

from cascade.errors import DataError
from cascade.ledger.deep_cost import DeepCost
from cascade.mig.gpus import GPUS, MEMORY_SLICES, Gpu, Profile, find_gpu

Basis = Literal["measured", "modelled", "assumed"]
_ORDER: Final[tuple[Basis, ...]] = ("measured", "modelled", "assumed")


class Throughput(NamedTuple):
    """Of a whole GPU, by its maker: FP32 without tensor cores in TFLOPS, memory in GB/s."""

    tflops: float
    gb_per_s: float


# NVIDIA's data sheets: A100 (SXM4; 80 GB: 2,039 GB/s), H100 SXM5, H200 SXM.
THROUGHPUT: Final[dict[str, Throughput]] = {
    "a100-40gb": Throughput(19.5, 1_555.0),
    "a100-80gb": Throughput(19.5, 2_039.0),
    "h100-80gb": Throughput(67.0, 3_350.0),
    "h200-141gb": Throughput(67.0, 4_800.0),
}


class Curve(msgspec.Struct, frozen=True):
    """A figure by rows: linear between the points, constant before the first, and with the last slope beyond."""

    rows: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rows) < 2 or len(self.rows) != len(self.values) or any(a >= b for a, b in pairwise(self.rows)):
            raise ValueError("a curve needs two points or more, with increasing rows")

    def at(self, rows: float) -> float:
        """The figure for so many rows.

        >>> Curve((1.0, 3.0), (10.0, 20.0)).at(4.0)
        25.0
        """
        if rows > self.rows[-1]:
            slope = (self.values[-1] - self.values[-2]) / (self.rows[-1] - self.rows[-2])
            return self.values[-1] + slope * (rows - self.rows[-1])
        return float(np.interp(rows, self.rows, self.values))


# The shipped model on a whole H200, FP32, called in process (docs/energy.md, 2026-11-26; the counter's joules).
_ASSUMED_GPU: Final = "h200-141gb"
_ASSUMED_S: Final = Curve((1.0, 8.0, 64.0), (1.03e-3, 1.04e-3, 1.22e-3))
_ASSUMED_J: Final = Curve((1.0, 8.0, 64.0), (0.41e-3, 0.47e-3, 2.60e-3))


class Part(msgspec.Struct, frozen=True):
    """A part of a GPU: SMs, and memory slices as a measure of its bandwidth; both may be fractions under MPS."""

    gpu: str
    sms: float
    memory_slices: float

    @classmethod
    def of(cls, gpu: Gpu, profile: Profile) -> Part:
        """A MIG slice."""
        return cls(gpu.key, profile.sms, profile.memory_slices)

    @classmethod
    def share(cls, gpu: Gpu, parts: int = 1) -> Part:
        """An equal part of the GPU without MIG, or all of it."""
        return cls(gpu.key, gpu.sms / parts, MEMORY_SLICES / parts)

    def factor_to(self, other: Part) -> float:
        """By how many times this part has more of what `other` has least of: throughput or bandwidth."""
        here, there = THROUGHPUT[self.gpu], THROUGHPUT[other.gpu]
        tflops = here.tflops * self.sms / GPUS[self.gpu].sms / (there.tflops * other.sms / GPUS[other.gpu].sms)
        gb_per_s = here.gb_per_s * self.memory_slices / (there.gb_per_s * other.memory_slices)
        return max(tflops, gb_per_s)


class ServiceTime(msgspec.Struct, frozen=True, kw_only=True):
    """A batch on one part of a GPU.

    seconds_by_rows, joules_by_rows: as measured or assumed. rows_factor, joules_factor: scale them to this part.
    basis, energy_basis: of the seconds and of the joules. source: in words.
    """

    seconds_by_rows: Curve
    joules_by_rows: Curve
    rows_factor: float
    joules_factor: float
    basis: Basis
    energy_basis: Basis
    source: str

    def seconds(self, rows: float) -> float:
        """Seconds of a batch of so many rows."""
        return self.seconds_by_rows.at(rows * self.rows_factor)

    def joules(self, rows: float) -> float:
        """Joules above idle of a batch of so many rows."""
        return self.joules_by_rows.at(rows) * self.joules_factor


class _Reference(msgspec.Struct, frozen=True):
    part: Part
    seconds: Curve
    joules: Curve | None
    source: str


class ServiceTimes:
    """The times of batches on the parts of one model of GPU.

    measured: costs of deep calls by where they were measured: a profile of `gpu`, or the key of a GPU as a whole with
    MIG off. Without any, the built-in assumption is scaled.

    Raises DataError for another name and for a file with fewer than two sizes.
    """

    def __init__(self, gpu: Gpu, measured: Mapping[str, DeepCost] | None = None) -> None:
        self._gpu = gpu
        self._references = [_reference(gpu, name, cost) for name, cost in (measured or {}).items()]

    def of(self, part: Part) -> ServiceTime:
        """The times on a part: measured there, or else scaled from the measured part that is nearest in SMs."""
        energy = [reference for reference in self._references if reference.joules is not None]
        seconds = self._nearest(part, self._references)
        joules = self._nearest(part, energy)
        from_s = seconds.part if seconds else Part.share(GPUS[_ASSUMED_GPU])
        from_j = joules.part if joules else Part.share(GPUS[_ASSUMED_GPU])
        return ServiceTime(
            seconds_by_rows=seconds.seconds if seconds else _ASSUMED_S,
            joules_by_rows=joules.joules if joules and joules.joules else _ASSUMED_J,
            rows_factor=1.0 if part == from_s else from_s.factor_to(part),
            joules_factor=_watts_per_tflops(part.gpu) / _watts_per_tflops(from_j.gpu),
            basis=_basis(seconds, part),
            energy_basis=_basis(joules, part),
            source=seconds.source if seconds else "built-in assumption: the shipped model on a whole H200, in process",
        )

    @staticmethod
    def _nearest(part: Part, references: list[_Reference]) -> _Reference | None:
        def distance(reference: _Reference) -> tuple[bool, float]:
            return reference.part.gpu != part.gpu, abs(np.log(reference.part.sms / part.sms))

        return min(references, key=distance, default=None)


def least_certain(bases: Iterable[Basis]) -> Basis:
    """The basis of a figure that is computed from several."""
    return max(bases, key=_ORDER.index)


def _basis(reference: _Reference | None, part: Part) -> Basis:
    if reference is None:
        return "assumed"
    return "measured" if reference.part == part else "modelled"


def _watts_per_tflops(key: str) -> float:
    return (GPUS[key].power_w_max - GPUS[key].idle_w) / THROUGHPUT[key].tflops


def _reference(gpu: Gpu, name: str, cost: DeepCost) -> _Reference:
    part = Part.share(find_gpu(name)) if name in GPUS else Part.of(gpu, gpu.profile(name))
    if len(cost.calls) < 2:
        raise DataError(f"measured {name}: it has calls of one size only; measure with two or more `--rows`")
    rows = tuple(float(call.rows) for call in cost.calls)
    # a larger batch is not faster: where it was measured so, that is noise
    seconds = np.maximum.accumulate([call.wall_ms.value / 1e3 for call in cost.calls])
    meter = next((meter.meter for meter in cost.meters if meter.meter.startswith("gpu")), None)
    joules = None
    if meter is not None:
        joules = Curve(rows, tuple(max(call.energy_mj[meter].value, 0.0) / 1e3 for call in cost.calls))
    return _Reference(part, Curve(rows, tuple(seconds.tolist())), joules, f"{name}: {cost.server}, {cost.precision}")


def read_measured(options: Sequence[str]) -> dict[str, DeepCost]:
    """The files of options NAME=FILE, by name. Raises DataError for another form, a name given twice, a wrong file."""
    found: dict[str, DeepCost] = {}
    for option in options:
        name, separator, file = option.partition("=")
        if not separator or not name or not file:
            raise DataError(f"--measured {option}: write it as PROFILE=FILE, or GPU=FILE for a whole GPU")
        if name in found:
            raise DataError(f"--measured {option}: {name} occurs twice; give one file")
        found[name] = DeepCost.read(Path(file))
    return found
