"""Times and joules of a batch: measured, or scaled by the stated law, and labelled by where they come from."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import DataError
from cascade.ledger.deep_cost import DeepCost
from cascade.mig.gpus import GPUS
from cascade.mig.service_time import THROUGHPUT, Part, ServiceTimes, least_certain, read_measured

H200_FILE = Path(__file__).parents[2] / "bench" / "data" / "h200.json"
H200 = DeepCost.read(H200_FILE)
A100 = GPUS["a100-40gb"]
SMALL = Part.of(A100, A100.profile("1g.5gb"))


def test_a_measured_slice_has_its_own_times_and_others_are_scaled_by_throughput() -> None:
    times = ServiceTimes(A100, {"1g.5gb": H200})
    assert times.of(SMALL).seconds(8.0) == pytest.approx(H200.calls[1].wall_ms.value / 1e3)
    assert (times.of(SMALL).basis, times.of(SMALL).energy_basis) == ("measured", "measured")
    double = times.of(Part.of(A100, A100.profile("2g.10gb")))
    # twice the SMs and twice the memory: 64 rows take as long as 32 on the small one
    assert double.seconds(64.0) == pytest.approx(times.of(SMALL).seconds(32.0))
    assert double.joules(64.0) == pytest.approx(times.of(SMALL).joules(64.0))
    assert (double.basis, double.energy_basis) == ("modelled", "modelled")


def test_a_slice_with_more_memory_and_no_more_sms_is_not_faster_where_sms_are_scarce() -> None:
    times = ServiceTimes(A100, {"1g.5gb": H200})
    wide = times.of(Part.of(A100, A100.profile("1g.10gb")))
    assert wide.seconds(64.0) == pytest.approx(times.of(SMALL).seconds(64.0))


def test_another_gpu_is_scaled_by_its_data_sheet() -> None:
    times = ServiceTimes(A100, {"h200-141gb": H200})
    whole = times.of(Part.share(A100))
    factor = THROUGHPUT["h200-141gb"].tflops / THROUGHPUT["a100-40gb"].tflops
    assert whole.rows_factor == pytest.approx(factor)
    assert whole.basis == "modelled"
    assert whole.joules(1.0) > H200.calls[0].energy_mj["gpu0"].value / 1e3


def test_nothing_measured_is_assumed_and_says_so() -> None:
    found = ServiceTimes(A100).of(SMALL)
    assert (found.basis, found.energy_basis) == ("assumed", "assumed")
    assert "assumption" in found.source


def test_a_file_without_a_gpu_has_times_and_no_joules() -> None:
    cpu = msgspec.structs.replace(
        H200,
        meters=H200.meters[1:],
        calls=tuple(
            msgspec.structs.replace(call, energy_mj={"cpu-worker": call.energy_mj["cpu-worker"]}) for call in H200.calls
        ),
    )
    found = ServiceTimes(A100, {"1g.5gb": cpu}).of(SMALL)
    assert (found.basis, found.energy_basis) == ("measured", "assumed")


def test_the_least_certain_figure_labels_the_whole() -> None:
    assert least_certain(["measured", "assumed", "modelled"]) == "assumed"
    assert least_certain(["measured", "measured"]) == "measured"


@given(
    rows=st.tuples(st.floats(1.0, 256.0), st.floats(1.0, 256.0)).map(sorted),
    key=st.sampled_from(sorted(GPUS)),
    parts=st.integers(1, 16),
)
def test_more_rows_and_fewer_sms_never_take_less_time(rows: list[float], key: str, parts: int) -> None:
    gpu = GPUS[key]
    times = ServiceTimes(gpu)
    whole, part = times.of(Part.share(gpu)), times.of(Part.share(gpu, parts))
    assert part.seconds(rows[0]) <= part.seconds(rows[1])
    assert whole.seconds(rows[1]) <= part.seconds(rows[1])
    assert part.joules(rows[0]) <= part.joules(rows[1])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("1g.5gb", "PROFILE=FILE"),
        ("=file", "PROFILE=FILE"),
        ("1g.5gb=/no/such/file", "cannot be read"),
        (f"5g.1gb={H200_FILE}", "no such profile"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_remedy(option: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        ServiceTimes(A100, read_measured([option]))


def test_a_name_that_occurs_twice_is_refused() -> None:
    with pytest.raises(DataError, match="occurs twice"):
        read_measured([f"1g.5gb={H200_FILE}", f"1g.5gb={H200_FILE}"])


def test_a_file_with_one_size_is_refused() -> None:
    with pytest.raises(DataError, match="one size"):
        ServiceTimes(A100, {"1g.5gb": msgspec.structs.replace(H200, calls=H200.calls[:1])})
