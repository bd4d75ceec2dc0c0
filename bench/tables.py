"""The layout of what benchmarks print: a table of figures, and notes under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.cluster import write_json

Report = TypeVar("Report", bound=msgspec.Struct)


def figure_table(names: str | None, *figures: str, title: str | None = None) -> Table:
    """An empty table of right-aligned figures; `names` heads a left-aligned column of names before them."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False
    )
    if names is not None:
        table.add_column(names, no_wrap=True)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    return table


def print_table(console: Console, table: Table, *notes: str) -> None:
    """Prints a table, and each note on a line of its own under it."""
    console.print()
    console.print(table)
    if notes:
        print_notes(console, *notes)


def print_notes(console: Console, *notes: str) -> None:
    """Prints each note on a line of its own, under what was printed before."""
    console.print()
    for note in notes:
        console.print(Padding(Text(note), (0, 0, 0, 1), expand=False))


def publish(report: Report, show: Callable[[Report, Console], None], json: Path | None) -> None:
    """Writes a report to the file `json`, unless it is None, and prints it with `show`."""
    if json is not None:
        write_json(json, report)
    show(report, Console())
