"""Joules of a GPU that is cut into MIG slices, by slice: a slice has no counter of its own.

For each window of the device's counter:

    idle     = idle power of the whole device × time, at most the counter; shared by provisioned SMs
    dynamic  = counter − idle; shared by activity × SMs of each slice
    rows     = idle and dynamic of each slice that is in use; idle of empty slices; of stranded SMs; what no activity
               explains

The rows add up to the counter, whatever the activities say: no model of a slice's power holds across workloads, but
shares of the measured total do. Activity is that of the slice itself, 0 to 1 (DCGM's `DCGM_FI_PROF_GR_ENGINE_ACTIVE`).
Stranded are the SMs that are in no slice: those that the profiles leave over, and those that MIG itself takes.

Beside it stand the two ways that are in use, for comparison (`Method`): "activity" shares the dynamic joules by
activity alone, whatever a slice's size, and leaves idle out, as Kepler does; "occupied" lets only slices in use pay, by
their size, so that nobody pays for an empty one, as CEEMS does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec

from cascade.errors import DataError

EMPTY: Final = "empty slices"
STRANDED: Final = "stranded SMs"
UNEXPLAINED: Final = "not explained by activity"
Method = Literal["activity-size", "activity", "occupied"]
METHODS: Final[tuple[Method, ...]] = ("activity-size", "activity", "occupied")

Joules = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Slice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A MIG device in a window. `activity`: mean over the window; None where nothing runs on it, which is not 0."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    sms: Annotated[int, msgspec.Meta(ge=1, le=1_024)]
    activity: Share | None = None


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was read of one device: `energy_j` by its counter over `seconds`, `check_j` by integrated power.

    `idle_w`: of the whole device, MIG on, nothing running. `sms`: of the whole device.
    """

    device: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    energy_j: Joules
    idle_w: Joules
    sms: Annotated[int, msgspec.Meta(ge=1, le=1_024)]
    slices: tuple[Slice, ...]
    check_j: Joules | None = None

    def __post_init__(self) -> None:
        if sum(one.sms for one in self.slices) > self.sms:
            raise ValueError(f"{self.device}: its slices have more SMs than its {self.sms}")
        if len({one.name for one in self.slices}) < len(self.slices):
            raise ValueError(f"{self.device}: two slices of one name")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Joules of a slice, or of one of the lines that are nobody's."""

    name: str
    idle_j: float
    dynamic_j: float

    @property
    def energy_j(self) -> float:
        """Both."""
        return self.idle_j + self.dynamic_j


class SliceBooks(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one device over its windows; `attributed_j` is their sum, which is the counter's within rounding.

    `check_j`: power integrated over the same windows; None where one of them has none.
    """

    device: str
    seconds: float
    energy_j: float
    check_j: float | None
    rows: tuple[Row, ...]

    @property
    def attributed_j(self) -> float:
        """Of all rows."""
        return sum(row.energy_j for row in self.rows)

    @property
    def residual_share(self) -> float:
        """What the rows leave of the counter, as a share of it."""
        return 1.0 - self.attributed_j / self.energy_j if self.energy_j else 0.0


def attribute_window(window: Window, method: Method = "activity-size") -> tuple[Row, ...]:
    """The rows of one window, the slices in their order, then the lines that are nobody's where they have joules."""
    idle_j = min(window.idle_w * window.seconds, window.energy_j)
    dynamic_j = window.energy_j - idle_j
    if method == "activity":
        return _by_activity(window, dynamic_j)
    if method == "occupied":
        return _by_occupied_size(window)
    per_sm_j = idle_j / window.sms
    weights = [(one.activity or 0.0) * one.sms for one in window.slices]
    whole = sum(weights)
    rows = [
        Row(name=one.name, idle_j=per_sm_j * one.sms, dynamic_j=dynamic_j * weight / whole if whole else 0.0)
        for one, weight in zip(window.slices, weights, strict=True)
        if one.activity is not None
    ]
    empty = sum(one.sms for one in window.slices if one.activity is None)
    stranded = window.sms - sum(one.sms for one in window.slices)
    nobodys = [
        Row(name=EMPTY, idle_j=per_sm_j * empty, dynamic_j=0.0),
        Row(name=STRANDED, idle_j=per_sm_j * stranded, dynamic_j=0.0),
        Row(name=UNEXPLAINED, idle_j=0.0, dynamic_j=0.0 if whole else dynamic_j),
    ]
    return (*rows, *(row for row in nobodys if row.energy_j))


def _by_activity(window: Window, dynamic_j: float) -> tuple[Row, ...]:
    whole = sum(one.activity or 0.0 for one in window.slices)
    return tuple(
        Row(name=one.name, idle_j=0.0, dynamic_j=dynamic_j * one.activity / whole if whole else 0.0)
        for one in window.slices
        if one.activity is not None
    )


def _by_occupied_size(window: Window) -> tuple[Row, ...]:
    used = [one for one in window.slices if one.activity is not None]
    whole = sum(one.sms for one in used)
    return tuple(Row(name=one.name, idle_j=0.0, dynamic_j=window.energy_j * one.sms / whole) for one in used)


def attribute_windows(windows: Iterable[Window], method: Method = "activity-size") -> list[SliceBooks]:
    """The books of each device, in the order in which they occur. Raises DataError where there is no window."""
    by_device: dict[str, list[Window]] = {}
    for window in windows:
        by_device.setdefault(window.device, []).append(window)
    if not by_device:
        raise DataError("MIG trace: no window in it")
    return [_books(device, found, method) for device, found in by_device.items()]


def _books(device: str, windows: Sequence[Window], method: Method) -> SliceBooks:
    idle_j: dict[str, float] = {}
    dynamic_j: dict[str, float] = {}
    for window in windows:
        for row in attribute_window(window, method):
            idle_j[row.name] = idle_j.get(row.name, 0.0) + row.idle_j
            dynamic_j[row.name] = dynamic_j.get(row.name, 0.0) + row.dynamic_j
    nobodys = [name for name in (EMPTY, STRANDED, UNEXPLAINED) if name in idle_j]
    names = [*(name for name in idle_j if name not in nobodys), *nobodys]
    checks = [window.check_j for window in windows if window.check_j is not None]
    return SliceBooks(
        device=device, seconds=sum(window.seconds for window in windows),
        energy_j=sum(window.energy_j for window in windows),
        check_j=sum(checks) if len(checks) == len(windows) else None,
        rows=tuple(Row(name=name, idle_j=idle_j[name], dynamic_j=dynamic_j[name]) for name in names),
    )  # fmt: skip


def read_trace(content: bytes, origin: str) -> list[Window]:
    """Windows from JSON lines, one a line; raises DataError, one line, for anything else."""
    windows = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                windows.append(msgspec.json.decode(line, type=Window))
            except msgspec.MsgspecError as error:
                raise DataError(f"{origin}, line {number}: not a window of a MIG trace ({error})") from error
    return windows
