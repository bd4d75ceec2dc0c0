"""Watts of MIG slices, live: DCGM's metrics from Prometheus, divided by the ledger's rule (`cascade/ledger/slices.py`).

The rule divides a device's measured joules: idle power by SMs, the rest by activity × SMs. So watts of a slice are
attributed, not measured; the sum of the rows is measured, and the residual is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from cascade.errors import CascadeError, DataError
from cascade.ledger.slices import EMPTY, STRANDED, UNEXPLAINED, Row, SliceBooks, Window, attribute_windows
from cascade.mig import call_rates, dcgm
from cascade.mig.call_rates import ServiceCalls
from cascade.mig.dcgm import WatchedGpu, watched_gpus
from cascade.mig.gpus import Gpu
from cascade.mig.prometheus import Series, read_series

# Prometheus is asked for so much more, so that a window begins with the sample that ended the one before.
_SLACK_S: Final = 5.0
# After a longer pause of Prometheus or of this command, a window begins anew and the trace has a gap.
_RANGE_S_MAX: Final = 3_600.0


class SliceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A slice in a window.

    - `activity`: mean, 0 to 1; None if not known.
    - `idle_w`, `dynamic_w`: attributed watts; None for an empty slice, and where the window cannot be divided.
    - `calls_per_s`: requests of its Triton pod; `j_per_call`: attributed joules of one. None if not known.
    """

    name: str
    profile: str
    sms: int
    pod: str | None
    activity: float | None
    idle_w: float | None
    dynamic_w: float | None
    calls_per_s: float | None
    j_per_call: float | None


class GpuFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU in a window.

    - `seconds`, `energy_j`, `check_j`: as in Window; None if its joules are not known. `watts`: their mean.
    - `empty_w`, `stranded_w`: idle watts of empty slices and of SMs in no slice.
    - `unexplained_w`: watts above idle without any activity.
    - `residual_share`: the part of the joules that is in no row.
    - `notes`: what is missing, left out or not to be trusted.
    """

    uuid: str
    model: str
    seconds: float | None
    energy_j: float | None
    check_j: float | None
    watts: float | None
    slices: tuple[SliceFigures, ...]
    empty_w: float
    stranded_w: float
    unexplained_w: float
    residual_share: float | None
    notes: tuple[str, ...]


class WatchFrame(msgspec.Struct, frozen=True, kw_only=True):
    """All GPUs at a moment.

    - `deep_calls_per_s`: of all workers; None if not known.
    - `j_per_deep_call`: joules of the slices with the deep model's pods, idle included.
    - `j_per_deep_call_reserved`: the same with empty slices, stranded SMs and unexplained joules of their GPUs.
    - `notes`: about the whole.
    """

    at: datetime
    gpus: tuple[GpuFigures, ...]
    deep_calls_per_s: float | None
    j_per_deep_call: float | None
    j_per_deep_call_reserved: float | None
    notes: tuple[str, ...]


class Watcher:
    """Reads one window after the other.

    - `prometheus`: its address.
    - `window_s`: length of the first window; a later one begins where its GPU's last one ended.
    - `ledger`: the service's calls, if Prometheus does not have them.
    - `pods`: how the names of the deep model's pods begin.
    - `gpu`, `idle_w`: as for `watched_gpus`.
    - `trace`: file to which each window is appended; `cascade ledger slices` reads it.
    """

    def __init__(
        self,
        prometheus: str,
        window_s: float,
        *,
        ledger: ServiceCalls | None = None,
        pods: str = "triton",
        gpu: Gpu | None = None,
        idle_w: float | None = None,
        trace: Path | None = None,
    ) -> None:
        self._prometheus = prometheus
        self._window_s = window_s
        self._ledger = ledger
        self._pods = pods
        self._gpu = gpu
        self._idle_w = idle_w
        self._trace = trace
        self._since_s: dict[str, float] = {}

    def read(self, now_s: float) -> WatchFrame:
        """The figures up to `now_s`, in seconds since the epoch. Raises PrometheusError, and DataError for the trace.

        A ledger without an answer is a note, not an error.
        """
        # the newest sample may be a window old, and the window before it is needed
        ages_s = [2.0 * self._window_s, *(now_s - since_s for since_s in self._since_s.values())]
        range_s = min(max(ages_s) + _SLACK_S, _RANGE_S_MAX)
        names = (*dcgm.METRICS, *call_rates.METRICS)
        series = read_series(self._prometheus, names, range_s, now_s)
        found = watched_gpus(series, self._since_s, self._window_s, now_s, self._gpu, self._idle_w)
        self._since_s = {gpu.uuid: gpu.end_s for gpu in found if gpu.end_s is not None}
        windows = [gpu.window for gpu in found if gpu.window is not None]
        self._append(windows)
        start_s = now_s - self._window_s - _SLACK_S
        calls, notes = self._deep_calls(series, start_s, now_s)
        if not found:
            notes.append(f"no metrics of DCGM: check that {self._prometheus} scrapes dcgm-exporter")
        by_pod = call_rates.triton_calls_per_s(series, start_s, now_s)
        gpus = tuple(gpu_figures(gpu, by_pod) for gpu in found)
        own_w, reserved_w = deep_watts(gpus, self._pods)
        return WatchFrame(
            at=datetime.fromtimestamp(now_s, UTC),
            gpus=gpus,
            deep_calls_per_s=calls,
            j_per_deep_call=_over(own_w, calls),
            j_per_deep_call_reserved=_over(reserved_w, calls),
            notes=tuple(notes),
        )

    def _deep_calls(self, series: Sequence[Series], start_s: float, end_s: float) -> tuple[float | None, list[str]]:
        if self._ledger is None:
            return call_rates.deep_calls_per_s(series, start_s, end_s), []
        try:
            return self._ledger.per_s(start_s, end_s), []
        except CascadeError as error:
            return None, [str(error)]

    def _append(self, windows: Sequence[Window]) -> None:
        if self._trace is None or not windows:
            return
        try:
            with self._trace.open("ab") as file:
                file.writelines(msgspec.json.encode(window) + b"\n" for window in windows)
        except OSError as error:
            raise DataError(f"--trace {self._trace}: cannot be written ({error.strerror})") from error


def gpu_figures(gpu: WatchedGpu, calls_per_s_by_pod: dict[str, float]) -> GpuFigures:
    """The figures of a GPU; without watts where its window cannot be divided."""
    window = gpu.window
    books = attribute_windows([window])[0] if window is not None else None
    watts = _watts(books) if books is not None else {}
    slices = []
    for part in gpu.slices:
        row = watts.get(part.name)
        calls = calls_per_s_by_pod.get(part.pod) if part.pod is not None else None
        slices.append(
            SliceFigures(
                name=part.name,
                profile=part.profile,
                sms=part.sms,
                pod=part.pod,
                activity=part.activity,
                idle_w=None if row is None else row.idle_j,
                dynamic_w=None if row is None else row.dynamic_j,
                calls_per_s=calls,
                j_per_call=_over(None if row is None else row.energy_j, calls),
            )
        )
    empty, stranded, unexplained = (
        row.energy_j if (row := watts.get(name)) is not None else 0.0 for name in (EMPTY, STRANDED, UNEXPLAINED)
    )
    return GpuFigures(
        uuid=gpu.uuid,
        model=gpu.model,
        seconds=None if window is None else window.seconds,
        energy_j=None if window is None else window.energy_j,
        check_j=None if window is None else window.check_j,
        watts=None if window is None else window.energy_j / window.seconds,
        slices=tuple(slices),
        empty_w=empty,
        stranded_w=stranded,
        unexplained_w=unexplained,
        residual_share=None if books is None else books.residual_share,
        notes=gpu.notes,
    )


def _watts(books: SliceBooks) -> dict[str, Row]:
    """The rows as joules of one second, so watts, by name."""
    return {row.name: Row(row.name, row.idle_j / books.seconds, row.dynamic_j / books.seconds) for row in books.rows}


def deep_watts(gpus: Sequence[GpuFigures], pods: str) -> tuple[float | None, float | None]:
    """Watts of the slices with the deep model's pods; and with what their GPUs draw in no slice.

    pods: how the names of these pods begin. Where a GPU names no pod at all, all its slices in use count. None if there
    is no such slice, or if one has no watts.
    """
    own_w: list[float | None] = []
    reserved_w: list[float] = []
    for gpu in gpus:
        unnamed = all(part.pod is None for part in gpu.slices)
        mine = [
            part
            for part in gpu.slices
            if (part.pod is not None and part.pod.startswith(pods)) or (unnamed and part.idle_w is not None)
        ]
        own_w += [None if part.idle_w is None else part.idle_w + (part.dynamic_w or 0.0) for part in mine]
        reserved_w += [gpu.empty_w + gpu.stranded_w + gpu.unexplained_w] if mine else []
    known = [watts for watts in own_w if watts is not None]
    if not known or len(known) < len(own_w):
        return None, None
    return sum(known), sum(known) + sum(reserved_w)


def _over(watts: float | None, calls_per_s: float | None) -> float | None:
    return watts / calls_per_s if watts is not None and calls_per_s else None
