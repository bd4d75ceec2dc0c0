"""`cascade mig fit`: the picture, the reason, the exit status."""

from __future__ import annotations

import msgspec
import pytest

from cascade.cli import main
from cascade.mig.commands import Fit
from cascade.mig.gpus import find_gpu
from cascade.mig.packing import pack
from cascade.mig.picture import picture

PICTURE = """\
NVIDIA A100 40 GB

slice      0       1       2       3       4       5       6       7
GPU 0     │1g.5gb │1g.5gb │2g.10gb        │3g.20gb                        │
           98 of 108 SMs in slices, 10 stranded; 8 of 8 memory slices
"""


def fit(*arguments: str) -> int:
    return main(["mig", "fit", "--gpu", "a100-40gb", *arguments])


def test_a_layout_that_fits_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("1g.5gb=2,2g.10gb=1,3g.20gb=1") == 0
    assert capsys.readouterr().out == PICTURE


def test_what_does_not_fit_has_its_reason_what_would_do_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("3g.20gb=2,1g.5gb=1") == 1
    assert "= 9 memory slices, and a GPU has 8; 2 GPUs have room (--gpus 2)" in capsys.readouterr().out
    assert fit("3g.20gb=2,1g.5gb=1", "--gpus", "2") == 0
    assert fit("3g.20gb=5", "--gpus", "2") == 1
    assert "2 GPUs are too few; 3 GPUs have room (--gpus 3)" in capsys.readouterr().out


def test_equal_gpus_share_a_row_and_free_slices_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("3g.20gb=4,1g.5gb=1", "--gpus", "3") == 0
    out = capsys.readouterr().out
    assert "GPU 0–1   │3g.20gb                        │3g.20gb                        │" in out
    assert "GPU 2     │·      │·      │·      │·      │·      │·      │1g.5gb │·      │" in out
    assert "14 of 108 SMs in slices, 94 stranded; 1 of 8 memory slices" in out


def test_the_picture_keeps_to_80_columns_with_the_longest_names() -> None:
    h200 = find_gpu("h200-141gb")
    packed = pack(h200, {"7g.141gb": 12, "1g.35gb": 4, "1g.18gb": 7, "4g.71gb": 1})
    assert max(map(len, picture(h200, packed).splitlines())) <= 80


def test_the_json_has_placements_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("3g.20gb=3", "--json") == 1
    answer = msgspec.json.decode(capsys.readouterr().out, type=Fit)
    assert not answer.fits
    assert "at most 2" in (answer.reason or "")
    full, half = answer.gpus
    assert [(part.profile, part.start, part.memory_slices, part.sms) for part in full.slices] == [
        ("3g.20gb", 0, 4, 42),
        ("3g.20gb", 4, 4, 42),
    ]
    assert (half.sms, half.stranded_sms, half.free_memory_slices) == (108, 66, (0, 1, 2, 3))


@pytest.mark.parametrize(("option", "value"), [("--gpus", "0"), ("--gpus", "65"), ("--gpu", "a100")])
def test_an_option_outside_its_limits_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("1g.5gb=1", option, value) != 0
    assert option.removeprefix("--").upper() in capsys.readouterr().err.upper()
