"""What a call to the deep model costs, as it was measured on one machine with one model; `cascade bench deep-calls`.

Nothing here is taken from a data sheet. A call of `rows` transactions that was not measured costs what lies between its
two measured neighbours, on a straight line: a call is a fixed part and a part a row. Beyond the smallest and the
largest nothing is told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec
import numpy as np

from cascade.errors import DataError
from cascade.ledger.machine import Machine
from cascade.protocols import EnergyKind

DEEP_COST_FORMAT: Final = 1
CONFIDENCE: Final = 0.95
RESAMPLES: Final = 10_000
# The same rounds always have the same interval.
_SEED: Final = 1

Backend = Literal["triton", "onnxruntime"]
Precision = Literal["fp32", "fp16"]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A figure and its interval, in the unit of the field that holds it."""

    value: float
    low: float
    high: float


def median_estimate(values: Sequence[float]) -> Estimate:
    """The median of rounds, and its 95 % interval by the percentile bootstrap over them.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Raises ValueError where there is no
    value.

    >>> median_estimate([2.0, 2.0, 2.0])
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    found = np.asarray(values, np.float64)
    if not found.size:
        raise ValueError("no rounds to take the median of")
    drawn = np.random.default_rng(_SEED).integers(0, found.size, (RESAMPLES, found.size))
    medians = np.median(found[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.median(found))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


class CostMeter(msgspec.Struct, frozen=True, kw_only=True):
    """A meter that was read: its name and source as in the ledger. `idle_w`: watts by it while there were no calls."""

    meter: str
    kind: EnergyKind
    source: str
    idle_w: Estimate


class CallCost(msgspec.Struct, frozen=True, kw_only=True):
    """One call of `rows` transactions; `calls` were made in all. Idle is taken off everything but `wall_ms`.

    `client_cpu_ms`: CPU of the process that calls, which with ONNX Runtime runs the model too. `server_cpu_ms`: of the
    model server and its descendants; None where there is none. `energy_mj`: by meter.
    """

    rows: Annotated[int, msgspec.Meta(ge=1)]
    calls: Annotated[int, msgspec.Meta(ge=1)]
    wall_ms: Estimate
    client_cpu_ms: Estimate
    server_cpu_ms: Estimate | None
    energy_mj: dict[str, Estimate]


class DeepCost(msgspec.Struct, frozen=True, kw_only=True):
    """The table of calls, `rows` rising, and all that it holds for.

    `model_sha256`: of deep.onnx, or of what `precision` made of it. `server`: what answered, in words. `scores_apart`:
    largest difference from the FP32 model on the CPU, as log-odds. `watts_per_core`: behind modelled joules.
    `round_s`: seconds that each number of rows had in each of `rounds`. `method`: how the figures were made.
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
        if any(one >= other for one, other in pairwise(rows)):
            raise ValueError(f"calls: rows must rise, got {list(rows)}")
        names = {meter.meter for meter in self.meters}
        if len(names) < len(self.meters) or any(set(call.energy_mj) != names for call in self.calls):
            raise ValueError("calls: each must have joules by each meter, once")

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of rows that were measured."""
        return tuple(call.rows for call in self.calls)

    def weights(self, rows: float) -> dict[int, float] | None:
        """A call of `rows` as a sum of measured ones: position in `calls` to weight; None where it lies beyond them."""
        measured = self.rows
        if not measured[0] <= rows <= measured[-1]:
            return None
        place = bisect_left(measured, rows)
        if measured[place] == rows:
            return {place: 1.0}
        share = (rows - measured[place - 1]) / (measured[place] - measured[place - 1])
        return {place - 1: 1.0 - share, place: share}

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `cascade bench deep-calls` wrote; raises DataError, one line, for anything else."""
        try:
            cost = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); `cascade bench deep-calls` writes it"
            ) from error
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}: not written by `cascade bench deep-calls` of this release ({error})") from error
        if cost.format != DEEP_COST_FORMAT:
            raise DataError(f"{path}: format {cost.format}, this release reads {DEEP_COST_FORMAT}; measure again")
        return cost
