"""Shows the progress of long work on standard error, so that standard output can be piped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

# Called with the share of the work that is done, 0 to 1.
Progress = Callable[[float], None]
# Called with the name of the present step, and the share of it that is done.
StepProgress = Callable[[str, float], None]


class Steps:
    """A progress bar for each step. If standard error is not a terminal, a line at the end of each step instead."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        disable = not self._console.is_terminal
        self._bars = Bars(*columns, TimeElapsedColumn(), console=self._console, disable=disable)
        self._tasks: dict[str, TaskID] = {}
        self._ended: set[str] = set()

    def __call__(self, step: str, share: float) -> None:
        """Show that a share (0 to 1) of a step is done; the first call with a name begins that step."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=1.0)
        self._bars.update(self._tasks[step], completed=share)
        if share >= 1.0 and step not in self._ended:
            self._ended.add(step)
            if not self._console.is_terminal:
                self._console.print(f"{step}: done")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
