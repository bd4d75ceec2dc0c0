"""`cascade mig`: plans the deep stage on MIG slices, checks layouts, and watches slices at work."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cascade.mig.gpus import GPUS, find_gpu
from cascade.mig.placement import parse_counts, place, stranded_sms, why_not

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Plan the deep model on MIG slices of GPUs, check layouts, and watch slices at work.",
)


@app.callback()
def mig() -> None:
    """A group also while it has a single command."""


@app.command()
def fit(
    layout: Annotated[str, typer.Argument(help="Profiles with their counts: 1g.5gb=2,3g.20gb=1.")],
    gpu: Annotated[str, typer.Option(help=f"Model of the GPUs: {', '.join(GPUS)}.")],
) -> None:
    """Check whether a layout fits on a GPU."""
    model = find_gpu(gpu)
    counts = parse_counts(model, layout)
    placed = place(model, counts)
    if placed is None:
        print(f"does not fit: {why_not(model, counts)}")
        raise typer.Exit(1)
    for placement in placed:
        Console().print(f"{placement.start} {placement.profile.name}", highlight=False)
    Console().print(f"{stranded_sms(model, placed)} SMs of {model.sms} in no slice", highlight=False)
