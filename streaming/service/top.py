"""`cascade top`: shows a running service in a terminal, from its metrics endpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cascade.config import load_config
from streaming.service.scrape import DEFAULT_URL, Frame, Scrape, UnreachableError, scrape

# A terminal narrower than WIDE gets fewer columns, one narrower than NARROW no tables.
WIDE, NARROW = 72, 44

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def render_frame(frame: Frame, where: str, width: int) -> RenderableType:
    """Renders a frame for a terminal of `width` columns."""
    parts: list[RenderableType] = [_headline(frame, where), _state(frame)]
    if width >= NARROW:
        parts += [Text(), _latencies(frame, width), Text(), _budgets(frame)]
    parts.append(_energy(frame))
    return Group(*parts)


@app.command()
def top(
    url: Annotated[str, typer.Option(help="Address of the service; default: http://127.0.0.1:9464.")] = "",
    config: Annotated[Path | None, typer.Option(help="Configuration file with the address, in place of --url.")] = None,
    interval: Annotated[float, typer.Option(min=0.2, max=3_600.0, help="Seconds between frames.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print the figures since the start of the service, and end.")
    ] = False,
) -> None:
    """Watch a running service: rates, latency, escalation, error budgets, energy. Ctrl-C ends it."""
    base = url or _address(config)
    console = Console()
    now = scrape(base)
    if once:
        console.print(render_frame(Frame.between(None, now), base, console.width))
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        before: Scrape | None = None
        try:
            while True:
                live.update(_shown(before, now, base, console.width), refresh=True)
                time.sleep(interval)
                before, now = now, _again(base, now)
        except KeyboardInterrupt:
            return


def _again(base: str, last: Scrape) -> Scrape:
    """Returns the next scrape; the last one if the service does not answer."""
    try:
        return scrape(base)
    except UnreachableError:
        return last


def _shown(before: Scrape | None, now: Scrape, base: str, width: int) -> RenderableType:
    if before is now:
        return Text.assemble(
            (f"{base} does not answer", "bold red"), f"; last answer {time.time() - now.at_s:.0f} s ago"
        )
    return render_frame(Frame.between(before, now), base, width)


def _address(config: Path | None) -> str:
    if config is None:
        return DEFAULT_URL
    health = load_config(config).health
    host = "127.0.0.1" if health.host in ("0.0.0.0", "::") else health.host  # noqa: S104 - compared, not bound to
    return f"http://{host}:{health.port}"


# --- the frame --------------------------------------------------------------------------------------------------------


def _headline(frame: Frame, where: str) -> Text:
    return Text.assemble(
        ("cascade ", "bold cyan"), where, "  ", (f"{frame.per_second:,.0f}", "bold"), "/s  ",
        (_percent(frame.escalated_share), "bold"), " escalated  ",
        (_percent(frame.degraded_share), "bold red" if frame.degraded_share > 0.001 else "bold"), " degraded  ",
        (f"last {_duration(frame.seconds)}", "dim"),
    )  # fmt: skip


def _state(frame: Frame) -> Text:
    line = Text(f"{_count(frame.lag)} transactions waiting", style="yellow" if frame.lag >= 1_000 else "")
    if frame.dead_letters:
        line.append(f"  {frame.dead_letters:,.0f} dead letters", style="yellow")
    if frame.workers is not None:
        running, workers = frame.workers
        line.append(f"  {running} of {workers} workers running", style="" if running == workers else "bold red")
    return line


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _latencies(frame: Frame, width: int) -> Table:
    wide = width >= WIDE
    table = _table("path", "/s", "p50 ms", "p99 ms", *(("p99.9 ms",) if wide else ()))
    for path in frame.paths:
        figures = [path.p50_ms, path.p99_ms, *((path.p999_ms,) if wide else ())]
        table.add_row(path.path, f"{path.per_second:,.1f}", *map(_figure, figures))
    return table


def _budgets(frame: Frame) -> Table:
    table = _table("objective", "burn rate ×", "")
    for name, burn in frame.burn.items():
        style, word = (
            ("dim", "no data") if math.isnan(burn) else ("green", "within") if burn <= 1 else ("bold red", "over")
        )
        table.add_row(name, _figure(burn), Text(word, style=style))
    return table


def _energy(frame: Frame) -> Text:
    lines = []
    for kind, watts in sorted(frame.watts.items()):
        style = "green" if kind == "measured" else "yellow"
        figures = f"{_figure(watts)} W, {_figure(frame.mj_per_decision[kind])} mJ per decision"
        lines.append(Text.assemble((figures, style), " ", (kind, "dim")))
    if frame.lost_meters:
        lines.append(Text(f"no reading from {', '.join(frame.lost_meters)}", style="bold red"))
    return Text("\n").join(lines)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.3g} %"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"
