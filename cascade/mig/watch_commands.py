"""`cascade mig watch`: watts and activity of MIG slices in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cascade.ledger.render import number_text, percent_text
from cascade.mig.call_rates import ServiceCalls
from cascade.mig.gpus import GPUS, find_gpu
from cascade.mig.prometheus import PrometheusError
from cascade.mig.watch import GpuFigures, SliceFigures, Watcher, WatchFrame

_SLICE_WIDTH: Final = 12
_POD_WIDTH: Final = 24


def watch(
    prometheus: Annotated[str, typer.Option(help="Address of Prometheus: http://127.0.0.1:9090.")],
    ledger: Annotated[
        str, typer.Option(help="Metrics address of the service, or its journals; default: workers in Prometheus.")
    ] = "",
    interval: Annotated[
        float, typer.Option(min=2.0, max=1_800.0, help="Seconds of a window, and until the next.")
    ] = 60.0,
    gpu: Annotated[str, typer.Option(help=f"Model of all GPUs, in place of DCGM's modelName: {', '.join(GPUS)}.")] = "",
    idle_w: Annotated[
        float | None, typer.Option(min=0.0, max=1_000.0, help="Idle watts of each GPU with MIG on; default: table's.")
    ] = None,
    pods: Annotated[str, typer.Option(help="How the names of the deep model's pods begin.")] = "triton",
    trace: Annotated[Path | None, typer.Option(help="Append the windows to this file, for `ledger slices`.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the last window, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each window.")] = False,
) -> None:
    """Watch MIG slices: activity, attributed watts, joules a deep call. Ctrl-C ends it.

    DCGM's metrics come from Prometheus. The rows of a GPU add up to its energy counter.
    """
    watcher = Watcher(
        prometheus,
        interval,
        ledger=ServiceCalls(ledger) if ledger else None,
        pods=pods,
        gpu=find_gpu(gpu) if gpu else None,
        idle_w=idle_w,
        trace=trace,
    )
    console = Console()
    frame = watcher.read(time.time())
    if once:
        _print(frame, console, json)
        return
    with suppress(KeyboardInterrupt):
        if json:
            for later in _frames(watcher, frame, interval):
                _print(later, console, json)
        else:
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                for later in _frames(watcher, frame, interval):
                    live.update(render_frame(later), refresh=True)


def _frames(watcher: Watcher, first: WatchFrame, interval: float) -> Iterator[WatchFrame]:
    """A frame now and after each interval. While Prometheus does not answer, the last one with a note."""
    frame = first
    while True:
        yield frame
        time.sleep(interval)
        frame = next_frame(watcher, frame, time.time())


def next_frame(watcher: Watcher, last: WatchFrame, now_s: float) -> WatchFrame:
    """The frame of `now_s`, in seconds since the epoch; the last one with a note if Prometheus does not answer."""
    try:
        return watcher.read(now_s)
    except PrometheusError as error:
        note = f"{error}; the figures are {now_s - last.at.timestamp():.0f} s old"
        return msgspec.structs.replace(last, notes=(note,))


def _print(frame: WatchFrame, console: Console, json: bool) -> None:
    if json:
        sys.stdout.buffer.write(msgspec.json.encode(frame) + b"\n")
        sys.stdout.buffer.flush()
    else:
        console.print(render_frame(frame))


def render_frame(frame: WatchFrame) -> RenderableType:
    """A frame for a terminal of 80 columns."""
    parts: list[RenderableType] = []
    for gpu in frame.gpus:
        notes = [Text(note, style="yellow") for note in gpu.notes]
        parts += [_headline(gpu), _table(gpu), *_measured(gpu), *notes, Text()]
    parts.append(_deep_line(frame))
    parts += [Text(note, style="bold red") for note in frame.notes]
    return Group(*parts)


def _headline(gpu: GpuFigures) -> Text:
    line = Text.assemble((gpu.uuid[:12], "bold cyan"), f"  {gpu.model}  ")
    if gpu.watts is None:
        return line.append("joules not known", style="bold red")
    return line.append(f"{number_text(gpu.watts)} W", style="bold")


def _measured(gpu: GpuFigures) -> list[Text]:
    """What of the figures is measured, and how far the rows are from it."""
    if gpu.energy_j is None or gpu.seconds is None or gpu.residual_share is None:
        return []
    line = f"{gpu.energy_j:,.0f} J in {gpu.seconds:.0f} s, attributed to slices; residual {abs(gpu.residual_share):.2%}"
    if gpu.check_j is not None:
        line += f"; power integrated {gpu.check_j / gpu.energy_j - 1:+.1%}"
    return [Text(line, style="dim")]


def _table(gpu: GpuFigures) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("slice", no_wrap=True, max_width=_SLICE_WIDTH)
    table.add_column("pod", no_wrap=True, width=_POD_WIDTH)
    for name in ("active", "idle W", "dyn. W", "calls/s", "J a call"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in gpu.slices:
        table.add_row(Text(part.name), Text(_shortened(part.pod or "–")), *_figures(part))
    for name, idle_w, dynamic_w in (
        ("empty slices", gpu.empty_w, 0.0),
        ("stranded SMs", gpu.stranded_w, 0.0),
        ("unexplained", 0.0, gpu.unexplained_w),
    ):
        if idle_w or dynamic_w:
            table.add_row(Text(name, style="dim"), "", "", number_text(idle_w), number_text(dynamic_w), "", "")
    return table


def _shortened(pod: str) -> str:
    """A pod's name without its middle: pods of one Deployment differ at the end."""
    return pod if len(pod) <= _POD_WIDTH else f"{pod[:11]}…{pod[11 + 1 - _POD_WIDTH :]}"


def _figures(part: SliceFigures) -> tuple[str, ...]:
    figures = (part.idle_w, part.dynamic_w, part.calls_per_s, part.j_per_call)
    return (percent_text(part.activity), *map(number_text, figures))


def _deep_line(frame: WatchFrame) -> Text:
    if frame.deep_calls_per_s is None:
        return Text("deep calls not known: no worker's metrics", style="dim")
    calls, own, reserved = map(
        number_text, (frame.deep_calls_per_s, frame.j_per_deep_call, frame.j_per_deep_call_reserved)
    )
    return Text.assemble((f"{calls} deep calls/s", "bold"), f"  {own} J each, {reserved} J with what is in no slice")
