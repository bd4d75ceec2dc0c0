"""Attribution of a GPU's joules to its MIG slices, which have no counter of their own.

For each window of the device's counter:

    idle     = idle power of the whole device × time, at most the counter; divided by SMs
    dynamic  = counter − idle; divided by activity × SMs of each slice
    rows     = idle and dynamic joules of each slice in use; idle joules of empty slices and of stranded SMs; dynamic
               joules that no activity explains

The rows always add up to the counter, because they are shares of the measured total: no model of a slice's power is
accurate for all workloads. Activity is that of the slice itself, 0 to 1 (DCGM's `DCGM_FI_PROF_GR_ENGINE_ACTIVE`).
Stranded SMs are in no slice: the profiles leave some over, and MIG itself takes some.

Two methods of other tools are there for comparison (`Method`). "activity", as in Kepler, divides the dynamic joules by
activity without the size of a slice, and leaves out idle. "occupied", as in CEEMS, divides all joules by size among the
slices in use, so that empty slices get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec

from cascade.errors import DataError
from cascade.ledger.account import sum_if_known

EMPTY: Final = "empty slices"
STRANDED: Final = "stranded SMs"
UNEXPLAINED: Final = "not explained by activity"
Method = Literal["activity-size", "activity", "occupied"]
METHODS: Final[tuple[Method, ...]] = ("activity-size", "activity", "occupied")

Joules = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Slice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A MIG device in a window. `activity`: mean over the window; None, which is not 0, if nothing runs on it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    sms: Annotated[int, msgspec.Meta(ge=1, le=1_024)]
    activity: Share | None = None


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The readings of one device: `energy_j` by its counter over `seconds`, `check_j` by integrated power.

    idle_w: watts of the whole device with MIG on and nothing running.
    sms: SMs of the whole device.
    """

    device: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    energy_j: Joules
    idle_w: Joules
    sms: Annotated[int, msgspec.Meta(ge=1, le=1_024)]
    slices: tuple[Slice, ...]
    check_j: Joules | None = None

    def __post_init__(self) -> None:
        if sum(part.sms for part in self.slices) > self.sms:
            raise ValueError(f"{self.device}: its slices have more SMs than its {self.sms}")
        if len({part.name for part in self.slices}) < len(self.slices):
            raise ValueError(f"{self.device}: two slices have the same name")


class Row(msgspec.Struct, frozen=True):
    """Joules of a slice, or of EMPTY, STRANDED or UNEXPLAINED."""

    name: str
    idle_j: float
    dynamic_j: float

    @property
    def energy_j(self) -> float:
        """Idle and dynamic joules together."""
        return self.idle_j + self.dynamic_j


class SliceBooks(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one device over its windows.

    seconds, energy_j: length of the windows, and joules of the counter in them.
    check_j: power integrated over the same windows; None if a window has none.
    """

    device: str
    seconds: float
    energy_j: float
    check_j: float | None
    rows: tuple[Row, ...]

    @property
    def residual_share(self) -> float:
        """The part of the counter that is in no row, as a share of the counter."""
        return 1.0 - sum(row.energy_j for row in self.rows) / self.energy_j if self.energy_j else 0.0


def attribute_window(window: Window, method: Method = "activity-size") -> tuple[Row, ...]:
    """The rows of one window: the slices in their order, then those of EMPTY, STRANDED and UNEXPLAINED with joules."""
    idle_j = min(window.idle_w * window.seconds, window.energy_j)
    dynamic_j = window.energy_j - idle_j
    if method == "activity":
        return _divided(window, dynamic_j, lambda part: part.activity or 0.0)
    if method == "occupied":
        return _divided(window, window.energy_j, lambda part: part.sms)
    per_sm_j = idle_j / window.sms
    rows = _divided(window, dynamic_j, lambda part: (part.activity or 0.0) * part.sms, per_sm_j)
    empty = sum(part.sms for part in window.slices if part.activity is None)
    stranded = window.sms - sum(part.sms for part in window.slices)
    others = [
        Row(EMPTY, idle_j=per_sm_j * empty, dynamic_j=0.0),
        Row(STRANDED, idle_j=per_sm_j * stranded, dynamic_j=0.0),
        Row(UNEXPLAINED, idle_j=0.0, dynamic_j=0.0 if any(part.activity for part in window.slices) else dynamic_j),
    ]
    return (*rows, *(row for row in others if row.energy_j))


def _divided(
    window: Window, dynamic_j: float, weight: Callable[[Slice], float], idle_per_sm_j: float = 0.0
) -> tuple[Row, ...]:
    """The rows of the slices in use, with the dynamic joules in proportion to their weights."""
    used = [part for part in window.slices if part.activity is not None]
    whole = sum(map(weight, used))
    return tuple(
        Row(part.name, idle_per_sm_j * part.sms, dynamic_j * weight(part) / whole if whole else 0.0) for part in used
    )


def attribute_windows(windows: Iterable[Window], method: Method = "activity-size") -> list[SliceBooks]:
    """The books of each device, in the order in which the devices occur. Raises DataError without a window."""
    by_device: dict[str, list[Window]] = {}
    for window in windows:
        by_device.setdefault(window.device, []).append(window)
    if not by_device:
        raise DataError("MIG trace: it contains no window")
    return [_books(device, device_windows, method) for device, device_windows in by_device.items()]


def _books(device: str, windows: Sequence[Window], method: Method) -> SliceBooks:
    found: dict[str, Row] = {}
    for row in (row for window in windows for row in attribute_window(window, method)):
        before = found.get(row.name, Row(row.name, 0.0, 0.0))
        found[row.name] = Row(row.name, before.idle_j + row.idle_j, before.dynamic_j + row.dynamic_j)
    others = [found.pop(name) for name in (EMPTY, STRANDED, UNEXPLAINED) if name in found]
    return SliceBooks(
        device=device,
        seconds=sum(window.seconds for window in windows),
        energy_j=sum(window.energy_j for window in windows),
        check_j=sum_if_known([window.check_j for window in windows]),
        rows=(*found.values(), *others),
    )


def read_trace(content: bytes, origin: str) -> list[Window]:
    """The windows in JSON lines; raises DataError for anything else. `origin` names the file in errors."""
    windows = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                windows.append(msgspec.json.decode(line, type=Window))
            except msgspec.MsgspecError as error:
                raise DataError(f"{origin}, line {number}: must be a window of a MIG trace ({error})") from error
    return windows
