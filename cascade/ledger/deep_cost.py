"""The cost of a call to the deep model, as `cascade bench deep-calls` has measured it on one machine with one model.

No figure comes from a data sheet. The cost of a call with any other number of rows is interpolated linearly between its
measured neighbours, because a call has a fixed cost and a cost per row. There is no extrapolation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec
import numpy as np

from cascade.config import Backend
from cascade.errors import DataError
from cascade.ledger.machine import Machine
from cascade.ledger.rapl import RaplMeter
from cascade.protocols import EnergyKind

DEEP_COST_FORMAT: Final = 1
CONFIDENCE: Final = 0.95
# Meters of the whole machine, in which other processes are included.
UNDIVIDED: Final = (RaplMeter.name,)
RESAMPLES: Final = 10_000
# Fixed, so that the same rounds always give the same interval.
_SEED: Final = 1

Precision = Literal["fp32", "fp16"]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Estimate(msgspec.Struct, frozen=True):
    """A figure and its interval; the name of the field gives the unit."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The figure and its interval through an increasing function."""
        return Estimate(function(self.value), function(self.low), function(self.high))


def median_estimate(values: Sequence[float]) -> Estimate:
    """The median of rounds, with its 95 % interval by the percentile bootstrap.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Raises ValueError without values.

    >>> median_estimate([2.0, 2.0, 2.0])
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    rounds = np.asarray(values, np.float64)
    if not rounds.size:
        raise ValueError("a median needs at least one round")
    drawn = np.random.default_rng(_SEED).integers(0, rounds.size, (RESAMPLES, rounds.size))
    medians = np.median(rounds[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.median(rounds))
    return Estimate(value, min(float(low), value), max(float(high), value))


class CostMeter(msgspec.Struct, frozen=True, kw_only=True):
    """A meter of the measurement, with its name and source as in the ledger. `idle_w`: its watts without calls."""

    meter: str
    kind: EnergyKind
    source: str
    idle_w: Estimate


class CallCost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one call of `rows` transactions, without idle (except in `wall_ms`).

    calls: number of calls that were measured.
    client_cpu_ms: CPU of the calling process; with ONNX Runtime it runs the model too.
    server_cpu_ms: CPU of the model server and its descendants; None without a server.
    energy_mj: mJ by meter.
    """

    rows: Annotated[int, msgspec.Meta(ge=1)]
    calls: Annotated[int, msgspec.Meta(ge=1)]
    wall_ms: Estimate
    client_cpu_ms: Estimate
    server_cpu_ms: Estimate | None
    energy_mj: dict[str, Estimate]

    @property
    def unhindered_ms(self) -> float:
        """The time of a call that never waits for a core, ms: on a busy machine the CPU time, which is then shorter."""
        server_ms = 0.0 if self.server_cpu_ms is None else self.server_cpu_ms.value
        return min(self.wall_ms.value, self.client_cpu_ms.value + server_ms)


class DeepCost(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of calls by increasing `rows`, and the service for which they were measured.

    model_sha256: of deep.onnx, or of the model that `precision` made from it.
    server: the software that answered, in words.
    scores_apart: largest difference from the scores of the FP32 model on the CPU, log-odds; None if not compared.
    watts_per_core: watts that the modelled joules assume.
    round_s: seconds of each number of rows in each of the `rounds`.
    method: how the figures were measured, in words.
    """

    format: int = DEEP_COST_FORMAT
    measured_at: datetime
    bundle_version: str
    model_sha256: str
    backend: Backend
    server: str
    precision: Precision = "fp32"
    scores_apart: float | None = None
    machine: Machine
    watts_per_core: Positive
    rounds: Annotated[int, msgspec.Meta(ge=1)]
    round_s: Positive
    method: str
    meters: Annotated[tuple[CostMeter, ...], msgspec.Meta(min_length=1)]
    calls: Annotated[tuple[CallCost, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        rows = self.rows
        if any(before >= after for before, after in pairwise(rows)):
            raise ValueError(f"calls: rows must increase, got {list(rows)}")
        names = {meter.meter for meter in self.meters}
        if len(names) < len(self.meters) or any(set(call.energy_mj) != names for call in self.calls):
            raise ValueError("calls: each must have one figure of joules for each meter")

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of rows that were measured."""
        return tuple(call.rows for call in self.calls)

    def weights(self, rows: float) -> dict[int, float] | None:
        """A call of `rows` as a weighted sum of measured calls: index in `calls` to weight; None beyond their range."""
        measured = self.rows
        if not measured[0] <= rows <= measured[-1]:
            return None
        index = bisect_left(measured, rows)
        if measured[index] == rows:
            return {index: 1.0}
        share = (rows - measured[index - 1]) / (measured[index] - measured[index - 1])
        return {index - 1: 1.0 - share, index: share}

    @property
    def kinds(self) -> tuple[EnergyKind, ...]:
        """The kinds of the meters' joules, without counters of the whole machine."""
        return tuple(dict.fromkeys(meter.kind for meter in self.meters if meter.meter not in UNDIVIDED))

    def idle_w(self, kind: EnergyKind) -> Estimate:
        """Watts of the meters of a kind without calls, without counters of the whole machine."""
        idle = [meter.idle_w for meter in self.meters if meter.kind == kind and meter.meter not in UNDIVIDED]
        return Estimate(*(sum(getattr(watts, end) for watts in idle) for end in Estimate.__struct_fields__))

    def row_mj(self, rows: float, kind: EnergyKind) -> Estimate:
        """mJ of one row in a call of `rows`, by the meters of a kind; beyond the measured sizes, of the nearest one.

        Counters of the whole machine do not count.
        """
        within = min(max(rows, self.rows[0]), self.rows[-1])
        names = [meter.meter for meter in self.meters if meter.kind == kind and meter.meter not in UNDIVIDED]
        parts = [
            (weight / within, self.calls[index].energy_mj[name])
            for index, weight in (self.weights(within) or {}).items()
            for name in names
        ]
        ends = Estimate.__struct_fields__
        return Estimate(*(sum(weight * getattr(estimate, end) for weight, estimate in parts) for end in ends))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a file of `cascade bench deep-calls`; raises DataError for anything else."""
        try:
            cost = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); create it with `cascade bench deep-calls`"
            raise DataError(f"{path}: {reason}") from error
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}: not a file of `cascade bench deep-calls` of this release ({error})") from error
        if cost.format != DEEP_COST_FORMAT:
            raise DataError(f"{path}: format {cost.format}; this release reads {DEEP_COST_FORMAT}, measure again")
        return cost
