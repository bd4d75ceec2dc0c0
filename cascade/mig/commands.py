"""`cascade mig`: plans the deep stage on MIG slices, checks layouts, and watches slices at work."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import msgspec
import typer

from cascade.mig.gpus import GPUS, find_gpu
from cascade.mig.packing import GPUS_MAX, pack
from cascade.mig.picture import picture
from cascade.mig.placement import Layout, free_memory_slices, parse_counts, stranded_sms, why_not
from cascade.mig.plan_commands import autoscale, check, plan
from cascade.mig.watch_commands import watch

GPU_HELP: Final = f"Model of the GPUs: {', '.join(GPUS)}."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Plan the deep model on MIG slices of GPUs, check layouts, and watch slices at work.",
)


app.command()(plan)
app.command()(check)
app.command()(autoscale)
app.command()(watch)


class PlacedSlice(msgspec.Struct, frozen=True):
    """A slice in the JSON of `cascade mig fit`: `memory_slices` from `start` on."""

    profile: str
    start: int
    memory_slices: int
    sms: int


class FittedGpu(msgspec.Struct, frozen=True):
    """A GPU in the JSON of `cascade mig fit`. `free_memory_slices`: their numbers."""

    slices: tuple[PlacedSlice, ...]
    sms: int
    stranded_sms: int
    free_memory_slices: tuple[int, ...]


class Fit(msgspec.Struct, frozen=True):
    """The JSON of `cascade mig fit`. `gpus`: the smallest number that has room. `reason`: None if they are enough."""

    gpu: str
    fits: bool
    reason: str | None
    gpus: tuple[FittedGpu, ...]


@app.command()
def fit(
    layout: Annotated[str, typer.Argument(help="Profiles with their counts: 1g.5gb=2,2g.10gb=1,3g.20gb=1.")],
    gpu: Annotated[str, typer.Option(help=GPU_HELP)],
    gpus: Annotated[int, typer.Option(min=1, max=GPUS_MAX, help="GPUs among which the slices may be divided.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line instead of the picture.")] = False,
) -> None:
    """Check whether slices fit on GPUs, and show where. Exit status 1 with the reason if they do not.

    The layout needs as few GPUs as possible. Stranded SMs are in no slice.
    """
    model = find_gpu(gpu)
    counts = parse_counts(model, layout)
    packed = pack(model, counts)
    reason = None if len(packed) <= gpus else _too_few(gpus, len(packed), why_not(model, counts) or "")
    if json:
        fitted = tuple(_fitted(model.sms, stranded_sms(model, placed), placed) for placed in packed)
        sys.stdout.buffer.write(msgspec.json.encode(Fit(model.key, reason is None, reason, fitted)) + b"\n")
    else:
        print(f"{model.name}: does not fit: {reason}" if reason else f"{model.name}\n\n{picture(model, packed)}")
    if reason:
        raise typer.Exit(1)


def _too_few(gpus: int, needed: int, why_not_one: str) -> str:
    reason = why_not_one if gpus == 1 else f"{gpus} GPUs are too few"
    return f"{reason}; {needed} GPUs have room (--gpus {needed})"


def _fitted(sms: int, stranded: int, placed: Layout) -> FittedGpu:
    slices = tuple(
        PlacedSlice(part.profile.name, part.start, part.profile.memory_slices, part.profile.sms) for part in placed
    )
    return FittedGpu(slices, sms, stranded, free_memory_slices(placed))
