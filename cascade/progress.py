"""Progress of long work on the terminal, on standard error, so that output can be piped."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Shows a bar a step; call it with the step's name and the share that is done, 0 to 1.

    Where standard error is no terminal, it prints a line when a step ends.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._ended: set[str] = set()

    def __call__(self, step: str, share: float) -> None:
        """Show that `share` of `step` is done."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
