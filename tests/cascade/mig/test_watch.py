"""`cascade mig watch`: watts and joules a call of slices, live, against a pretended Prometheus and a real one."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from cascade.cli import main
from cascade.errors import DataError
from cascade.ledger.journal import read_journal
from cascade.ledger.slices import attribute_windows, read_trace
from cascade.mig.call_rates import (
    DEEP_CALLS,
    TRITON_REQUESTS,
    ServiceCalls,
    ServiceMetricsError,
    deep_calls_per_s,
    triton_calls_per_s,
)
from cascade.mig.dcgm import METRICS, watched_gpus
from cascade.mig.prometheus import PrometheusError, Sample, Series
from cascade.mig.watch import Watcher, WatchFrame, deep_watts, gpu_figures
from cascade.mig.watch_commands import next_frame, render_frame
from tests.cascade.ledger.helpers import NOON
from tests.cascade.ledger.test_journal import written
from tests.cascade.mig.pretended_dcgm import (
    CALLS_PER_S,
    IDLE_W,
    POWER_W,
    SLICES,
    SM_W,
    UUID,
    exposition,
    triton_exposition,
    worker_exposition,
)
from tests.http_answers import Answer, answering

SCRAPE_S = 10.0


def scraped(at_s: float, workers: bool = True) -> list[tuple[dict[str, str], float]]:
    """The samples of a scrape, as Prometheus stores them."""
    sources: dict[str, dict[str, str]] = {exposition(at_s): {}}
    sources |= {triton_exposition(pod, at_s): {"pod": pod} for pod in CALLS_PER_S}
    if workers:
        sources[worker_exposition(at_s)] = {"pod": "cascade-worker-0"}
    return [
        ({"__name__": sample.name, "job": "test", "instance": "node-a", **sample.labels, **target}, sample.value)
        for text, target in sources.items()
        # without types, because the reader renames counters, which Prometheus does not
        for family in text_string_to_metric_families(re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
        for sample in family.samples
    ]


def prometheus_answer(workers: bool = True, driver_loaded_s: float = 0.0) -> Answer:
    """The API of a Prometheus that scrapes every SCRAPE_S seconds; the counters begin at `driver_loaded_s`."""

    def answer(path: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        if path != "/api/v1/query":
            return 404, b""
        end_s = float(query["time"][0])
        range_s = float(query["query"][0].rpartition("[")[2].removesuffix("s]"))
        first = math.floor((end_s - range_s) / SCRAPE_S) + 1
        times = [number * SCRAPE_S for number in range(first, math.floor(end_s / SCRAPE_S) + 1)]
        streams: dict[str, dict[str, object]] = {}
        for at_s in times:
            for labels, value in scraped(at_s - driver_loaded_s, workers):
                stream = streams.setdefault(json.dumps(labels), {"metric": labels, "values": []})
                stream["values"].append([at_s, repr(value)])
        found = [stream for stream in streams.values() if stream["metric"]["__name__"] in query["query"][0]]
        return 200, json.dumps({"status": "success", "data": {"resultType": "matrix", "result": found}}).encode()

    return answer


def frame_at(now_s: float, workers: bool = True, **options: object) -> WatchFrame:
    with answering(prometheus_answer(workers)) as base:
        return Watcher(base, 60.0, **options).read(now_s)


def test_watts_of_each_slice_are_those_of_the_rule_that_made_the_joules() -> None:
    (gpu,) = frame_at(1_000.0).gpus
    assert (gpu.uuid, gpu.notes) == (UUID, ())
    assert gpu.watts == pytest.approx(POWER_W)
    assert gpu.residual_share == pytest.approx(0.0, abs=1e-9)
    for part in gpu.slices:
        _, sms, pod, activity = SLICES[part.name.partition("/")[2]]
        assert part.pod == (pod or None)
        if pod:
            assert part.idle_w == pytest.approx(IDLE_W * sms / 108)
            assert part.dynamic_w == pytest.approx(SM_W * sms * activity)
            assert part.calls_per_s == pytest.approx(CALLS_PER_S[pod], rel=1e-3)
            assert part.j_per_call == pytest.approx((part.idle_w + part.dynamic_w) / CALLS_PER_S[pod], rel=1e-3)
        else:
            assert (part.idle_w, part.j_per_call) == (None, None)
    assert gpu.empty_w == pytest.approx(IDLE_W * 28 / 108)
    assert gpu.stranded_w == pytest.approx(IDLE_W * 10 / 108)
    rows = sum((part.idle_w or 0.0) + (part.dynamic_w or 0.0) for part in gpu.slices)
    assert rows + gpu.empty_w + gpu.stranded_w + gpu.unexplained_w == pytest.approx(POWER_W)


def test_joules_a_deep_call_are_with_and_without_what_is_in_no_slice() -> None:
    frame = frame_at(1_000.0)
    calls = sum(CALLS_PER_S.values())
    assert frame.deep_calls_per_s == pytest.approx(calls, rel=1e-3)
    assert frame.j_per_deep_call_reserved == pytest.approx(POWER_W / calls, rel=1e-3)
    assert frame.j_per_deep_call == pytest.approx((POWER_W - IDLE_W * 38 / 108) / calls, rel=1e-3)
    assert frame_at(1_000.0, pods="other").j_per_deep_call is None
    without = frame_at(1_000.0, workers=False)
    assert (without.deep_calls_per_s, without.j_per_deep_call) == (None, None)


def test_windows_follow_each_other_and_the_trace_is_one_that_the_ledger_reads(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with answering(prometheus_answer()) as base:
        watcher = Watcher(base, 60.0, trace=trace)
        for now_s in (1_000.0, 1_060.0, 1_125.0, 1_126.0):
            frame = watcher.read(now_s)
    # nothing was scraped in the last second
    assert any("fewer than two samples" in note for note in frame.gpus[0].notes)
    windows = read_trace(trace.read_bytes(), str(trace))
    assert [window.seconds for window in windows] == [60.0, 60.0, 60.0]
    (books,) = attribute_windows(windows)
    assert books.energy_j == pytest.approx(180.0 * POWER_W)
    assert books.check_j == pytest.approx(180.0 * POWER_W)
    assert main(["ledger", "slices", str(trace)]) == 0
    with answering(prometheus_answer()) as base, pytest.raises(DataError, match=r"--trace .* cannot be written"):
        Watcher(base, 60.0, trace=tmp_path).read(1_000.0)


def test_a_prometheus_without_dcgm_is_named_and_not_a_gpu_without_watts() -> None:
    empty = b'{"status":"success","data":{"resultType":"matrix","result":[]}}'
    with answering(lambda path, query: (200, empty)) as base:
        frame = Watcher(base, 60.0).read(1_000.0)
    assert frame.gpus == ()
    assert "no metrics of DCGM: check that" in frame.notes[0]


def test_while_prometheus_does_not_answer_the_last_figures_stay_with_their_age() -> None:
    absent = threading.Event()

    def answer(path: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        return (503, b"") if absent.is_set() else prometheus_answer()(path, query)

    with answering(answer) as base:
        watcher = Watcher(base, 60.0)
        good = watcher.read(time.time() - 30.0)
        absent.set()
        kept = next_frame(watcher, good, time.time())
        assert kept.gpus == good.gpus
        assert "status 503" in kept.notes[0]
        assert "the figures are 30 s old" in kept.notes[0]
        with pytest.raises(PrometheusError):
            watcher.read(1_000.0)


# --- calls that Prometheus does not know ------------------------------------------------------------------------------


def test_calls_are_rates_of_their_own_samples_also_across_a_restart() -> None:
    def counter(name: str, *values: float, **labels: str) -> Series:
        return Series(name, labels, tuple(Sample(10.0 * number, value) for number, value in enumerate(values)))

    # 200 calls in 20 s, and 100 + 50 in 20 s; a single sample says nothing
    workers = [counter(DEEP_CALLS, 500, 600, 700), counter(DEEP_CALLS, 900, 1_000, 50), counter(DEEP_CALLS, 7)]
    assert deep_calls_per_s(workers, 0.0, 20.0) == pytest.approx(10.0 + 7.5)
    assert deep_calls_per_s(workers, 5.0, 20.0) == pytest.approx(10.0 + 5.0)
    assert deep_calls_per_s([workers[2]], 0.0, 20.0) is None
    tritons = [
        counter(TRITON_REQUESTS, 0, 100, 200, pod="a", model="deep"),
        counter(TRITON_REQUESTS, 0, 10, 20, pod="a", model="other"),
        counter(TRITON_REQUESTS, 0, math.nan, math.inf, pod="b"),
        counter(TRITON_REQUESTS, 0, 100, 200),
    ]
    assert triton_calls_per_s(tritons, 0.0, 20.0) == {"a": pytest.approx(11.0)}


def test_calls_of_a_service_are_counted_since_its_start_and_then_since_the_last_reading() -> None:
    text = (
        worker_exposition(50.0)
        + f"# TYPE cascade_start_time_seconds gauge\ncascade_start_time_seconds {time.time() - 100}\n"
    )
    with answering(lambda path, query: (200 if path == "/metrics" else 404, text.encode())) as base:
        calls = ServiceCalls(base)
        assert calls.per_s(0.0, 0.0) == pytest.approx(sum(CALLS_PER_S.values()) / 2, rel=0.02)
        time.sleep(0.01)
        assert calls.per_s(0.0, 0.0) == 0.0


@pytest.mark.parametrize("content", [b"", b"<html>", b"up 1\n", b"\xff{"])
def test_an_address_that_is_no_service_is_a_note_and_the_slices_are_shown(content: bytes) -> None:
    with answering(lambda path, query: (200, content)) as base:
        with pytest.raises(ServiceMetricsError, match=r"--ledger|not the metrics of a Cascade service"):
            ServiceCalls(base).per_s(0.0, 0.0)
        frame = frame_at(1_000.0, ledger=ServiceCalls(base))
    assert frame.gpus[0].watts is not None
    assert frame.deep_calls_per_s is None
    assert base in frame.notes[0]


def test_calls_of_a_journal_are_those_of_its_lines_in_the_window(tmp_path: Path) -> None:
    written(tmp_path / "journal", minutes=5)
    calls = ServiceCalls(str(tmp_path / "journal"))
    (run,) = read_journal([tmp_path / "journal"])
    counts = [account.counters.deep_calls.count for account in run.accounts]
    assert counts[3] > counts[0] > 0
    start_s = NOON.timestamp()
    assert calls.per_s(start_s + 60.0, start_s + 240.0) == pytest.approx((counts[3] - counts[0]) / 180.0)
    with pytest.raises(ServiceMetricsError, match=r"no line in the window; .* --interval must be longer"):
        calls.per_s(start_s + 61.0, start_s + 62.0)
    with pytest.raises(DataError, match=r"--ledger .* no such directory"):
        ServiceCalls(str(tmp_path / "absent"))
    frame = frame_at(1_000.0, ledger=calls)
    assert "no line in the window" in frame.notes[0]
    assert frame.gpus[0].watts is not None


# --- the terminal -----------------------------------------------------------------------------------------------------


def shown(frame: WatchFrame) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_frame(frame))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_frame_has_slices_lines_of_their_own_and_deep_calls_in_80_columns() -> None:
    text = shown(frame_at(1_000.0))
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "GPU-5c89852c",
        "residual 0.00%; power integrated +0.0%",
        "1g.5gb/7",
        "triton-1g-5…f8c9b7-x2x4z",
        "50.0 %",
        "empty slices",
        "stranded SMs",
    ):
        assert words in text
    assert "J with what is in no slice" in text
    assert "unexplained" not in text


def test_figures_that_are_not_known_are_dashes_and_notes() -> None:
    (gpu,) = frame_at(1_000.0, workers=False).gpus
    blind = msgspec.structs.replace(gpu, watts=None, energy_j=None, residual_share=None, notes=("no counter",))
    frame = msgspec.structs.replace(frame_at(1_000.0, workers=False), gpus=(blind,))
    text = shown(frame)
    assert "joules not known" in text
    assert "no counter" in text
    assert "deep calls not known" in text


def test_the_command_prints_the_last_window_as_text_and_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer = prometheus_answer(driver_loaded_s=time.time() - 1_000.0)
    with answering(answer) as base:
        assert main(["mig", "watch", "--prometheus", base, "--once", "--trace", str(tmp_path / "trace")]) == 0
        assert "J with what is in no slice" in capsys.readouterr().out
        assert main(["mig", "watch", "--prometheus", base, "--once", "--json", "--idle-w", "50"]) == 0
        frame = msgspec.json.decode(capsys.readouterr().out, type=WatchFrame)
        assert frame.gpus[0].stranded_w == pytest.approx(50.0 * 10 / 108)
    assert len((tmp_path / "trace").read_text().splitlines()) == 1
    assert main(["mig", "watch", "--prometheus", base, "--once"]) == 1
    assert f"{base}: no answer" in capsys.readouterr().err
    assert main(["mig", "watch", "--prometheus", base, "--once", "--gpu", "v100"]) == 1
    assert "not in the table" in capsys.readouterr().err


def test_it_goes_on_with_a_json_line_for_each_window_until_ctrl_c() -> None:
    with answering(prometheus_answer(driver_loaded_s=time.time() - 1_000.0)) as base:
        command = [sys.executable, "-m", "cascade", "mig", "watch", "--prometheus", base, "--interval", "12", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            frames = [msgspec.json.decode(process.stdout.readline(), type=WatchFrame) for _ in range(2)]
            process.send_signal(signal.SIGINT)
            assert process.wait(20.0) == 0
    first, second = (gpu for frame in frames for gpu in frame.gpus)
    assert (first.seconds, second.seconds) in {(10.0, 10.0), (10.0, 20.0)}
    assert second.watts == pytest.approx(POWER_W)


ODD_VALUES = st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1.0, 160.0, 9.6e6, -1.0, math.nan, math.inf, 1e300]))
ODD_SERIES = st.builds(
    lambda name, labels, values: Series(name, labels, tuple(Sample(float(at_s), value) for at_s, value in values)),
    st.sampled_from([*METRICS, "up"]),
    st.fixed_dictionaries(
        {"UUID": st.sampled_from(["GPU-1", "GPU-2", ""])},
        optional={
            "GPU_I_ID": st.sampled_from(["1", "2", "x", ""]),
            "GPU_I_PROFILE": st.sampled_from(["1g.5gb", "3g.20gb", "7g.40gb", "9g", "[red]", ""]),
            "modelName": st.sampled_from(["NVIDIA A100-SXM4-40GB", "NVIDIA H200", "[/]"]),
            "pod": st.sampled_from(["triton-a", "nvidia-dcgm-exporter-x", "[bold]"]),
        },
    ),
    st.lists(st.tuples(st.integers(0, 90), ODD_VALUES), max_size=6).map(sorted),
)


@given(found=st.lists(ODD_SERIES, max_size=12), since_s=st.dictionaries(st.just("GPU-1"), st.floats(0.0, 90.0)))
@settings(max_examples=150, deadline=None)
def test_whatever_the_series_are_the_rows_add_up_and_can_be_shown(
    found: list[Series], since_s: dict[str, float]
) -> None:
    gpus = tuple(gpu_figures(gpu, {"triton-a": 10.0}) for gpu in watched_gpus(found, since_s, 60.0, 100.0))
    for gpu in gpus:
        assert gpu.notes or gpu.watts is not None
        if gpu.watts is not None:
            rows = [(part.idle_w or 0.0) + (part.dynamic_w or 0.0) for part in gpu.slices]
            total = sum(rows) + gpu.empty_w + gpu.stranded_w + gpu.unexplained_w
            assert 0.0 < total == pytest.approx(gpu.watts)
    own, reserved = deep_watts(gpus, "triton")
    assert own is None or 0.0 <= own <= reserved
    shown(
        WatchFrame(
            at=datetime.fromtimestamp(0.0, UTC),
            gpus=gpus,
            deep_calls_per_s=None,
            j_per_deep_call=own,
            j_per_deep_call_reserved=reserved,
            notes=(),
        )
    )


# --- a real Prometheus, a pretended exporter --------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
def test_a_real_prometheus_gives_the_windows_of_the_pretended_exporter(tmp_path: Path) -> None:
    begun_s = time.monotonic()
    texts = {
        "dcgm": exposition,
        "worker": worker_exposition,
        **{pod: lambda seconds, pod=pod: triton_exposition(pod, seconds) for pod in CALLS_PER_S},
    }

    def answer(path: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        return 200, texts[path.strip("/")](time.monotonic() - begun_s).encode()

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with answering(answer) as exporter:
        target = exporter.removeprefix("http://")
        jobs = [
            {
                "job_name": name,
                "metrics_path": f"/{name}",
                "honor_labels": True,
                "static_configs": [{"targets": [target], "labels": {"pod": name} if name in CALLS_PER_S else {}}],
            }
            for name in texts
        ]
        config = tmp_path / "prometheus.json"  # JSON is YAML
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
        command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                frame = wait_for_frame(base, process)
            finally:
                process.terminate()
    (gpu,) = frame.gpus
    assert gpu.watts == pytest.approx(POWER_W, rel=0.02)  # the exporter's clock starts before Prometheus's
    assert gpu.check_j == pytest.approx(gpu.energy_j, rel=0.02)
    assert frame.deep_calls_per_s == pytest.approx(sum(CALLS_PER_S.values()), rel=0.02)
    for part in gpu.slices:
        _, sms, pod, activity = SLICES[part.name.partition("/")[2]]
        assert part.activity == pytest.approx(activity)
        if pod:
            assert part.dynamic_w == pytest.approx(SM_W * sms * activity, rel=0.05)
            assert part.calls_per_s == pytest.approx(CALLS_PER_S[pod], rel=0.02)


def wait_for_frame(base: str, process: subprocess.Popen[bytes]) -> WatchFrame:
    """The first frame with a window of at least four seconds and all counters."""
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "prometheus ended"
        try:
            frame = Watcher(base, 5.0).read(time.time())
        except PrometheusError:
            time.sleep(0.2)
            continue
        calls = [part.calls_per_s for gpu in frame.gpus for part in gpu.slices if part.pod]
        if calls and None not in calls and all((gpu.seconds or 0.0) >= 4.0 for gpu in frame.gpus):
            return frame
        time.sleep(0.5)
    pytest.fail("no window of 4 s within a minute")
