"""The latency of a deep call: what a turn counts, by a peer with a known delay, and a short real run."""

from __future__ import annotations

import io
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.deep_latency import DeepLatencyReport, Turns, measure_turn, show_deep_latency, triton_time
from cascade.cli import main
from cascade.protocols import DeepInputs

ROW = DeepInputs({"card_sequence": np.zeros((1, 1, 1), np.float32)}, np.zeros((1, 1), np.float32))
METRICS = """\
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="fraud_deep",version="1"} 4
nv_inference_request_duration_us{model="fraud_deep",version="1"} 6000
nv_inference_queue_duration_us{model="fraud_deep",version="1"} 99
"""


class Delayed:
    """Answers each call after 20 ms, and works for a moment in another thread."""

    def __init__(self) -> None:
        self.inputs: list[DeepInputs] = []

    def submit(self, inputs: DeepInputs) -> Future[Any]:
        self.inputs.append(inputs)
        answer: Future[Any] = Future()
        threading.Timer(0.02, answer.set_result, [None]).start()
        return answer

    def close(self) -> None:
        """Nothing is open."""


def test_a_turn_counts_each_call_from_its_start_to_its_answer_and_the_servers_share() -> None:
    found, peer = Turns(), Delayed()
    counts = iter([(10, 1.0), (20, 1.5), (20, 1.5), (20, 1.5)])
    inputs = [ROW, DeepInputs(ROW.sequences, ROW.features)]
    for _ in range(2):
        measure_turn(peer, inputs, 20, 0.5, found, lambda: next(counts))
    assert len(found.result_s) == len(found.callback_s) == len(peer.inputs) == 20
    assert min(found.result_s) >= 0.02
    assert min(found.callback_s) >= 0.02
    assert peer.inputs[0] is inputs[0]
    assert peer.inputs[1] is inputs[1]
    # the second turn had no request at the server
    assert found.server_s == [pytest.approx(0.05)]
    assert len(found.cpu_us) == len(found.switches) == 2
    assert min(found.switches) >= 1


def test_the_servers_time_is_that_of_its_metrics() -> None:
    assert triton_time(METRICS) == (4, 0.006)


@pytest.mark.triton
def test_a_real_run_has_every_peer_at_every_rate_and_fits_80_columns(
    triton_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    arguments = ["--rate", "20", "--rounds", "1", "--seconds", "1", "--out", str(tmp_path / "out")]
    assert main(["bench", "deep-latency", *arguments, "--json", str(path)]) == 0
    report = msgspec.json.decode(path.read_bytes(), type=DeepLatencyReport)
    by_peer = {entry.peer: entry for entry in report.latencies}
    assert len(by_peer) == len(report.latencies) == len(report.idle) == 5
    assert {peer for peer, entry in by_peer.items() if entry.server_ms is None} == {
        "in process",
        "at once",
    }
    assert all(entry.calls == 20 for entry in report.latencies)
    assert by_peer["at once"].result_ms[0] < by_peer["stage, Triton"].result_ms[0]
    console = Console(file=io.StringIO(), width=80, record=True)
    show_deep_latency(report, console)
    assert "…" not in console.export_text()
