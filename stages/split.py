"""Divides the data by time: a warm-up, the training rows, and the validation rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cascade.columns import Bool, Int64
from cascade.errors import DataError
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData
from cascade.schema import Schema
from stages.calibration import FRAUDS_MIN
from stages.settings import TrainingFile

# A shorter validation would miss the rhythm of the week.
VALIDATION_DAYS_MIN = 7
VALIDATION_SHARE_MAX = 1 / 3


@dataclass(frozen=True, slots=True)
class Split:
    """Masks bool [rows] of the training and the validation rows; all others only fill the feature state.

    `note`: what makes the validation figures uncertain; empty if nothing does.
    """

    training: Bool
    validation: Bool
    note: str


def split(data: LabelledData, schema: Schema, settings: TrainingFile, until_ms: int | None, origin: str) -> Split:
    """Divides the rows before `until_ms` (ms since the epoch; None: all), which are in order of time.

    Raises DataError if a part has fewer than FRAUDS_MIN frauds or genuine rows. `origin`: the data's name in messages.
    """
    times = data.batch[schema.roles.event_time]
    until = until_ms if until_ms is not None else int(times[-1]) + 1 if len(times) else 0
    start = int(times[0]) + settings.warm_up_ms if len(times) else 0
    frauds_min = settings.data.validation_frauds_min
    length_ms = settings.validation_ms
    if length_ms is None:
        length_ms = _length_ms(times[data.fraud == 1], start, until, frauds_min)
    middle = until - length_ms
    in_training: Bool = (times >= start) & (times < middle)
    in_validation: Bool = (times >= max(start, middle)) & (times < until)
    for name, rows in (("training", in_training), ("validation", in_validation)):
        frauds = int(data.fraud[rows].sum())
        if min(frauds, int(rows.sum()) - frauds) < FRAUDS_MIN:
            raise DataError(
                f"{origin}: {frauds} frauds among {int(rows.sum())} {name} transactions, at least {FRAUDS_MIN} of each"
                f" kind are needed; the data spans {(times[-1] - times[0]) / DAY_MS if len(times) else 0:.1f} days:"
                " shorten data.warm_up or data.validation in the training file, or use more data"
            )
    frauds = int(data.fraud[in_validation].sum())
    few = f"{frauds} frauds in the validation data, fewer than {frauds_min}: the intervals are wide"
    return Split(in_training, in_validation, few if frauds < frauds_min else "")


def _length_ms(fraud_times: Int64, start: int, until: int, frauds_min: int) -> int:
    """The length of the fewest whole days before `until` with `frauds_min` frauds, within the bounds above; ms.

    `fraud_times` int64 [frauds], `start` (of the training rows) and `until`: ms since the epoch.
    """
    days_max = max(VALIDATION_DAYS_MIN, int(VALIDATION_SHARE_MAX * (until - start) / DAY_MS))
    before = np.sort(until - fraud_times[fraud_times < until])
    enough = math.ceil(before[frauds_min - 1] / DAY_MS) if len(before) >= frauds_min else days_max
    return min(max(enough, VALIDATION_DAYS_MIN), days_max) * DAY_MS
