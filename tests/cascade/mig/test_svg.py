"""The picture of a plan: what is in it, where, and that it can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cascade.errors import DataError
from cascade.mig import svg
from cascade.mig.gpus import MEMORY_SLICES, Gpu, find_gpu
from cascade.mig.packing import GPUS_MAX, pack
from cascade.mig.placement import Layout, layouts
from cascade.mig.svg import WIDTH, Watts, number_pods, plan_svg
from tests.browser import CHROMIUM, Browser

A100 = find_gpu("a100-40gb")
MIXED = pack(A100, {"3g.20gb": 3, "1g.5gb": 6, "2g.10gb": 1})
NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 - our own text


def words(text: str) -> list[str]:
    return [element.text or "" for element in drawn(text).iter(f"{NAMESPACE}text")]


def boxes(text: str, height: float) -> list[tuple[float, float, float, str]]:
    """Top, left and right end, and fill of the boxes of a height, by their place."""
    found = [box.attrib for box in drawn(text).iter(f"{NAMESPACE}rect") if "x" in box.attrib]
    ends = (
        (float(box["y"]), float(box["x"]), float(box["x"]) + float(box["width"]), box["fill"])
        for box in found
        if float(box["height"]) == height - 2
    )
    return sorted(ends)


def picture(gpu: Gpu, layouts_by_gpu: tuple[Layout, ...]) -> str:
    return plan_svg(gpu, layouts_by_gpu, number_pods(layouts_by_gpu), "A plan")


def test_every_slice_has_its_profile_and_its_pod() -> None:
    found = words(picture(A100, MIXED))
    for profile, count in (("3g.20gb", 3), ("1g.5gb", 6), ("2g.10gb", 1)):
        assert found.count(profile) == count
    assert [word for word in found if word.startswith("triton-3g")] == [f"triton-3g-20gb {n}" for n in (1, 2, 3)]
    assert found.count("triton-1g-5gb") == 6  # in a box of one slice the number has a line of its own


def test_boxes_of_each_gpu_fill_the_band_without_overlap() -> None:
    for gpu_layouts in (MIXED, layouts(A100)[:GPUS_MAX]):
        for height in (svg._SLICE_HEIGHT, svg._SMS_HEIGHT):
            found = boxes(picture(A100, gpu_layouts), height)
            for top in {top for top, *_ in found}:
                row = [(left, right) for row_top, left, right, _ in found if row_top == top]
                assert row[0][0] == pytest.approx(svg._BAND_X + 1)
                assert row[-1][1] == pytest.approx(WIDTH - svg._MARGIN - 1)
                assert all(left - right == pytest.approx(2, abs=0.01) for (_, right), (left, _) in pairwise(row))


def test_empty_memory_and_stranded_sms_are_labelled() -> None:
    text = picture(A100, pack(A100, {"1g.5gb": 7}))
    found = words(text)
    assert found.count("empty") == 1
    assert "98 of 108 SMs in slices, 10 stranded" in found
    assert {"empty: memory in no slice", "stranded: SMs in no slice", "1g.5gb: 14 SMs, 5 GB"} <= set(found)
    assert [fill for *_, fill in boxes(text, svg._SMS_HEIGHT)][-1] == "url(#stranded)"
    whole = picture(find_gpu("h100-80gb"), pack(find_gpu("h100-80gb"), {"7g.80gb": 1}))
    assert "132 of 132 SMs in slices, 0 stranded" in words(whole)


def test_a_gpu_without_slices_is_all_empty() -> None:
    assert words(picture(A100, ((),))).count("empty") == MEMORY_SLICES


def test_watts_are_shown_by_gpu_if_given() -> None:
    watts = [Watts(55.0, 10.0 * number) for number in range(len(MIXED))]
    found = words(plan_svg(A100, MIXED, {}, "A plan", watts=watts))
    assert [word for word in found if word.endswith("W idle")] == ["55 W idle"] * len(MIXED)
    assert "20 W work" in found
    assert found.count("no pod") == 10
    with pytest.raises(DataError, match="watts of 1; give those of each GPU"):
        plan_svg(A100, MIXED, {}, "A plan", watts=watts[:1])


def test_names_and_titles_with_markup_stay_text() -> None:
    found = words(plan_svg(A100, MIXED, {(0, 0): "a<b>&"}, 'Plan "<&>"', ["<script>alert(1)</script>"]))
    assert {"a<b>&", 'Plan "<&>"', "<script>alert(1)</script>"} <= set(found)


def test_long_names_are_cut_to_their_box_and_long_notes_wrap() -> None:
    found = words(plan_svg(A100, MIXED, {(2, 3): "x" * 200}, "A plan", ["word " * 100]))
    assert max(len(word) for word in found if word.startswith("x")) * 11 * svg._LETTER_WIDTH <= svg._SLICE_WIDTH
    assert all(len(word) * 13 * svg._LETTER_WIDTH <= WIDTH for word in found)
    assert sum(word.startswith("word word") for word in found) == 5


# Of each text: whether its box lies in the picture, and in the narrowest rectangle that contains its beginning.
OVERFLOWS = """[...document.querySelectorAll("text")].filter(text => {
  const box = text.getBBox(), right = box.x + box.width;
  const around = [...document.querySelectorAll("rect[rx]")].map(rect => rect.getBBox()).filter(rect =>
    rect.x <= box.x + 1 && box.x < rect.x + rect.width && rect.y <= box.y + 2 && box.y < rect.y + rect.height);
  return around.concat({x: 0, width: 900}).some(rect => right > rect.x + rect.width);
}).map(text => text.textContent)"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser_every_text_stays_within_its_box(tmp_path: Path) -> None:
    h200 = find_gpu("h200-141gb")
    demands = [(A100, {"1g.5gb": 7, "3g.20gb": 2, "2g.10gb": 3}), (h200, {"1g.18gb": 7, "1g.35gb": 4, "7g.141gb": 1})]
    with Browser(tmp_path / "profile", WIDTH, 1_200) as browser:
        for number, (gpu, demand) in enumerate(demands):
            packed = pack(gpu, demand)
            pods = number_pods(packed) | {(0, packed[0][0].start): "triton-1g-18gb-6d5f8c9b7-x2x4z-WWWWWWWWWWWW"}
            watts = [Watts(123.0, 400.25)] * len(packed)
            text = plan_svg(
                gpu, packed, pods, "A plan with WIDE LETTERS IN ITS TITLE", ["Notes as long as this, " * 20], watts
            )
            file = tmp_path / f"{number}.svg"
            file.write_text(text)
            browser.open(file.as_uri())
            browser.wait_for(f"location.href === {file.as_uri()!r} && document.readyState === 'complete'", 30.0)
            assert browser.evaluate("document.querySelectorAll('text').length") == len(words(text))
            assert browser.evaluate(OVERFLOWS) == []
        assert browser.troubles == []


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.2."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_text_and_edges_have_the_contrast_that_wcag_asks_for() -> None:
    assert len(svg._COLOURS) >= len(A100.profiles)
    for colours in svg._COLOURS:
        assert contrast(svg._TEXT, colours.fill) >= 7.0  # AAA
        assert contrast(colours.edge, "#ffffff") >= 4.5
    assert contrast(svg._DIM, "#ffffff") >= 7.0


def test_more_gpus_than_the_limit_are_refused() -> None:
    with pytest.raises(DataError, match=f"the maximum is {GPUS_MAX}"):
        picture(A100, MIXED[:1] * (GPUS_MAX + 1))
