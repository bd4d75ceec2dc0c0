"""The picture of a plan as SVG: a row for each GPU, with its eight memory slices and its SMs.

900 units wide, on a light background, in the reader's own sans-serif font. Colour is never the only sign: each slice
has its profile in words, and what is free or stranded is hatched and labelled.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from cascade.errors import DataError
from cascade.mig.gpus import MEMORY_SLICES, Gpu, Profile
from cascade.mig.packing import GPUS_MAX
from cascade.mig.placement import Layout, free_memory_slices, stranded_sms

WIDTH: Final = 900
_MARGIN: Final = 24
_BAND_X: Final = 132  # to the left of it are the GPU's number and watts
_BAND_WIDTH: Final = WIDTH - _MARGIN - _BAND_X
_SLICE_WIDTH: Final = _BAND_WIDTH / MEMORY_SLICES
_SLICE_HEIGHT: Final = 62
_SMS_HEIGHT: Final = 18
_ROW_HEIGHT: Final = 118
# Mean width of a letter as a share of the font size, in a wide sans-serif font such as DejaVu Sans.
_LETTER_WIDTH: Final = 0.56

_TEXT: Final = "#1b1f24"
_DIM: Final = "#4d5663"
_FRAME: Final = "#8a94a1"


class _Colours(NamedTuple):
    fill: str
    edge: str


# By position in the GPU's list of profiles.
_COLOURS: Final = (
    _Colours("#cfe4f8", "#1f5f9e"),
    _Colours("#cdeedd", "#1c6b44"),
    _Colours("#fbe7ba", "#7f5300"),
    _Colours("#f8d3ca", "#9a3621"),
    _Colours("#e4d8f5", "#5b3894"),
    _Colours("#dce1e8", "#414b57"),
)

PodKey = tuple[int, int]  # GPU and start slot


class Watts(NamedTuple):
    """Mean power of a GPU: `idle` of the device, `work` above it."""

    idle: float
    work: float


def number_pods(layouts_by_gpu: Sequence[Layout]) -> dict[PodKey, str]:
    """A name for the Triton pod of each slice, by GPU and start slot: `triton-1g-5gb 1`, numbered by profile.

    The name is that of the profile's Deployment. Which of its pods gets which slice is up to the device plugin.
    """
    pods: dict[PodKey, str] = {}
    numbers: dict[str, int] = {}
    for gpu, layout in enumerate(layouts_by_gpu):
        for placement in layout:
            name = placement.profile.name
            numbers[name] = numbers.get(name, 0) + 1
            pods[gpu, placement.start] = f"triton-{name.replace('.', '-')} {numbers[name]}"
    return pods


def plan_svg(
    gpu: Gpu,
    layouts_by_gpu: Sequence[Layout],
    pods: Mapping[PodKey, str],
    title: str,
    notes: Sequence[str] = (),
    watts: Sequence[Watts] = (),
) -> str:
    """The picture of GPUs of one model with their slices, as the text of an SVG file.

    - `layouts_by_gpu`: the slices of each GPU; an empty layout is a GPU without slices.
    - `pods`: what runs on a slice, by the number of its GPU and its start slot; see `number_pods`. A slice that is
      missing here is drawn as reserved by no pod.
    - `title`: one line. `notes`: paragraphs below the legend.
    - `watts`: of each GPU, in the order of `layouts_by_gpu`; empty if unknown.

    Raises DataError for more than GPUS_MAX GPUs, and for watts of another number of GPUs.
    """
    if len(layouts_by_gpu) > GPUS_MAX:
        raise DataError(f"picture of {len(layouts_by_gpu)} GPUs: the maximum is {GPUS_MAX}")
    if watts and len(watts) != len(layouts_by_gpu):
        raise DataError(f"picture of {len(layouts_by_gpu)} GPUs: watts of {len(watts)}; give those of each GPU")
    parts = [_text(_MARGIN, 40, title, size=20, weight="bold")]
    parts.append(_text(_MARGIN, 68, "memory slice", size=12, colour=_DIM))
    for start in range(MEMORY_SLICES):
        parts.append(_text(_BAND_X + start * _SLICE_WIDTH + 8, 68, str(start), size=12, colour=_DIM))
    y = 74.0
    for number, layout in enumerate(layouts_by_gpu):
        parts += _row(gpu, layout, number, y, pods, watts[number] if watts else None)
        y += _ROW_HEIGHT
    used = {placement.profile for layout in layouts_by_gpu for placement in layout}
    legend, y = _legend(gpu, [profile for profile in gpu.profiles if profile in used], y + 8)
    below, y = _notes(notes, y + 20)
    description = f"{len(layouts_by_gpu)} × {gpu.name}, their MIG slices and the pods on them"
    return _document("\n".join([*parts, *legend, *below]), y + 4, title, description)


def _row(
    gpu: Gpu, layout: Layout, number: int, y: float, pods: Mapping[PodKey, str], watts: Watts | None
) -> Iterable[str]:
    stranded = stranded_sms(gpu, layout)
    yield _text(_MARGIN, y + 22, f"GPU {number}", size=16, weight="bold")
    if watts is not None:
        yield _text(_MARGIN, y + 42, f"{watts.idle:.0f} W idle", size=12, colour=_DIM)
        yield _text(_MARGIN, y + 58, f"{watts.work:.3g} W work", size=12, colour=_DIM)
    yield _text(_MARGIN, y + _SLICE_HEIGHT + 20, f"{gpu.sms} SMs", size=12, colour=_DIM)
    for placement in layout:
        yield from _slice(gpu, placement.profile, placement.start, y, pods.get((number, placement.start)))
    for start in free_memory_slices(layout):
        yield from _free_slice(gpu, start, y)
    yield from _sms(gpu, layout, y + _SLICE_HEIGHT + 6)
    use = f"{gpu.sms - stranded} of {gpu.sms} SMs in slices, {stranded} stranded"
    yield _text(_BAND_X, y + _SLICE_HEIGHT + _SMS_HEIGHT + 21, use, size=12, colour=_DIM)


def _slice(gpu: Gpu, profile: Profile, start: int, y: float, pod: str | None) -> Iterable[str]:
    x, width = _BAND_X + start * _SLICE_WIDTH, profile.memory_slices * _SLICE_WIDTH
    colours = _COLOURS[gpu.profiles.index(profile)]
    yield _box(x, y, width, _SLICE_HEIGHT, colours.fill, colours.edge)
    yield _text(x + 8, y + 19, profile.name, size=14, weight="bold")
    for line, words in enumerate(_wrapped(pod or "no pod", width - 12, size=11, lines=2)):
        yield _text(x + 8, y + 36 + 15 * line, words, size=11)


def _free_slice(gpu: Gpu, start: int, y: float) -> Iterable[str]:
    x = _BAND_X + start * _SLICE_WIDTH
    memory_gb = min(profile.memory_gb for profile in gpu.profiles)
    yield _box(x, y, _SLICE_WIDTH, _SLICE_HEIGHT, "url(#free)", _FRAME, dashed=True)
    yield _text(x + 8, y + 19, "empty", size=13, colour=_DIM)
    yield _text(x + 8, y + 36, f"{memory_gb} GB", size=11, colour=_DIM)


def _sms(gpu: Gpu, layout: Layout, y: float) -> Iterable[str]:
    """A bar of all SMs: those of the slices from left to right, then the stranded ones."""
    ends = [0]
    for placement in layout:
        ends.append(ends[-1] + placement.profile.sms)
    scale = _BAND_WIDTH / gpu.sms
    for placement, (first, end) in zip(layout, pairwise(ends), strict=True):
        x, width = _BAND_X + first * scale, (end - first) * scale
        colours = _COLOURS[gpu.profiles.index(placement.profile)]
        yield _box(x, y, width, _SMS_HEIGHT, colours.fill, colours.edge)
        yield _text(x + width / 2, y + 13, str(placement.profile.sms), size=11, anchor="middle")
    if ends[-1] < gpu.sms:
        x, width = _BAND_X + ends[-1] * scale, (gpu.sms - ends[-1]) * scale
        yield _box(x, y, width, _SMS_HEIGHT, "url(#stranded)", _FRAME, dashed=True)
        yield _text(x + width / 2, y + 13, str(gpu.sms - ends[-1]), size=11, anchor="middle", halo=True)


def _legend(gpu: Gpu, profiles: Sequence[Profile], y: float) -> tuple[list[str], float]:
    """The elements of the legend, three in a line, and the y below them."""
    entries = [
        (
            _COLOURS[gpu.profiles.index(profile)],
            f"{profile.name}: {profile.sms} SMs, {profile.memory_gb} GB",
        )
        for profile in profiles
    ]
    entries.append((_Colours("url(#free)", _FRAME), "empty: memory in no slice"))
    entries.append((_Colours("url(#stranded)", _FRAME), "stranded: SMs in no slice"))
    parts = []
    for number, (colours, words) in enumerate(entries):
        x, top = _MARGIN + number % 3 * 284, y + number // 3 * 26
        parts.append(_box(x, top, 22, 16, colours.fill, colours.edge, dashed=colours.edge == _FRAME))
        parts.append(_text(x + 30, top + 13, words, size=13))
    return parts, y + (len(entries) + 2) // 3 * 26


def _notes(notes: Sequence[str], y: float) -> tuple[list[str], float]:
    lines = [line for note in notes for line in _wrapped(note, WIDTH - 2 * _MARGIN, size=13, lines=20)]
    return [_text(_MARGIN, y + 19 * number, line, size=13) for number, line in enumerate(lines)], y + 19 * len(lines)


def _wrapped(words: str, width: float, size: float, lines: int) -> list[str]:
    """The words in at most so many lines of `width` units; the rest is cut off with an ellipsis."""
    letters = int(width / (size * _LETTER_WIDTH))
    return textwrap.wrap(words, letters, max_lines=lines, placeholder="…")


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: int,
    colour: str = _TEXT,
    weight: str = "",
    anchor: str = "",
    halo: bool = False,
) -> str:
    style = f' font-weight="{weight}"' if weight else ""
    style += f' text-anchor="{anchor}"' if anchor else ""
    style += ' paint-order="stroke" stroke="#ffffff" stroke-width="4"' if halo else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{style}>{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, edge: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    # half a unit inside, so that neighbours do not share an edge
    return (
        f'<rect x="{x + 1:g}" y="{y + 1:g}" width="{width - 2:g}" height="{height - 2:g}" rx="3"'
        f' fill="{fill}" stroke="{edge}"{dash}/>'
    )


def _document(body: str, height: float, title: str, description: str) -> str:
    label = quoteattr(f"{title}. {description}.")
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"
 role="img" aria-label={label} font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif">
<defs>
<pattern id="free" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="8" height="8" fill="#ffffff"/><rect width="1" height="8" fill="#c9d0d8"/></pattern>
<pattern id="stranded" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">
<rect width="6" height="6" fill="#f3f4f6"/><rect width="2" height="6" fill="#b4bcc6"/></pattern>
</defs>
<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>
{body}
</svg>
"""
