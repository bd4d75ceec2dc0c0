"""The picture of layouts in a terminal: a row of eight memory slices for each GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from cascade.mig.gpus import MEMORY_SLICES, Gpu
from cascade.mig.placement import Layout, free_memory_slices, stranded_sms

# A line has 8 slices and a label in 80 columns. The longest name of a profile of one slice has 7 letters.
_SLICE_WIDTH = 8
_LABEL_WIDTH = 10


def picture(gpu: Gpu, layouts_by_gpu: Sequence[Layout]) -> str:
    """Lines of at most 80 columns; neighbouring GPUs with the same layout share a row."""
    numbers = "".join(f"{number:<{_SLICE_WIDTH}}" for number in range(MEMORY_SLICES)).rstrip()
    lines = [f"{'slice':<{_LABEL_WIDTH}} {numbers}"]
    first = 0
    for layout, same in groupby(layouts_by_gpu):
        last = first + len(list(same)) - 1
        label = f"GPU {first}" if first == last else f"GPU {first}–{last}"
        lines += [f"{label:<{_LABEL_WIDTH}}{_row(layout)}", f"{'':<{_LABEL_WIDTH}} {use(gpu, layout)}"]
        first = last + 1
    return "\n".join(lines)


def use(gpu: Gpu, layout: Layout) -> str:
    """How much of a GPU its layout uses, in a line."""
    stranded, free = stranded_sms(gpu, layout), len(free_memory_slices(layout))
    return (
        f"{gpu.sms - stranded} of {gpu.sms} SMs in slices, {stranded} stranded; "
        f"{MEMORY_SLICES - free} of {MEMORY_SLICES} memory slices"
    )


def _row(layout: Layout) -> str:
    boxes = {placement.start: (placement.profile.name, placement.profile.memory_slices) for placement in layout}
    boxes |= dict.fromkeys(free_memory_slices(layout), ("·", 1))
    cells = (f"{name:<{size * _SLICE_WIDTH - 1}}" for _, (name, size) in sorted(boxes.items()))
    return f"│{'│'.join(cells)}│"
