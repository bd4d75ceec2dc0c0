"""How long a deep call takes beside what Triton needs for it, and what the call costs this process.

The deep stage takes turns with the two clients that NVIDIA ships, with the stage in process, and with a call that is
answered at once, which shows what the measurement costs. Calls come at a steady rate, one row each: at a low rate the
caches are cold, as they are in a service that escalates one transaction in a hundred.
"""

from __future__ import annotations

import asyncio
import re
import resource
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from rich.console import Console

from bench.tables import figure_table, print_table
from cascade.bundle import Bundle, load_bundle
from cascade.config import DeepSettings
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from cascade.protocols import DeepInputs
from stages.assembly import deep_signature, make_deep_stage
from stages.deep.local_triton import TRITON_VERSION, LocalTriton
from stages.deep.repository import write_repository
from stages.deep.signature import MODEL_NAME, DeepSignature

RATES: Final = (10, 50, 100)
# Different rows, so that no cache of the server can answer.
_INPUTS: Final = 8
_TIMEOUT_S: Final = 1.0
_READY_S: Final = 60.0
# gRPC ends a channel's last threads some seconds after it; they must not count for the next turn.
_SETTLE_S: Final = 0.5
_HARNESS: Final = "at once"


class Peer(Protocol):
    """What a turn measures: sends a call, and completes its future from another thread or at once."""

    def submit(self, inputs: DeepInputs) -> Future[Any]:
        """Start a call."""
        ...

    def close(self) -> None:
        """Release what it has opened."""
        ...


class DeepLatency(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of a peer at a rate, all rounds together.

    - `result_ms`, `callback_ms`: from `submit` to the end of `future.result()`, and to a callback; p50, p90, p99.
    - `cpu_us`, `switches`: CPU time and voluntary context switches of this process a call, medians over the rounds;
      those of the measurement itself are in it.
    - `server_ms`: Triton's own time for a request, queue included, mean; None without Triton.
    """

    peer: str
    rate_per_s: float
    calls: int
    result_ms: tuple[float, float, float]
    callback_ms: tuple[float, float, float]
    cpu_us: float
    switches: float
    server_ms: float | None


class DeepIdle(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer costs a second that waits for calls, medians over the rounds: CPU milliseconds and switches."""

    peer: str
    cpu_ms_per_s: float
    switches_per_s: float


class DeepLatencyReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench deep-latency`."""

    latencies: tuple[DeepLatency, ...]
    idle: tuple[DeepIdle, ...]
    rounds: int
    turn_s: float
    machine: Machine


class _Usage(msgspec.Struct, frozen=True):
    cpu_s: float
    switches: int

    @classmethod
    def now(cls) -> _Usage:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(used.ru_utime + used.ru_stime, used.ru_nvcsw)


class Turns(msgspec.Struct):
    """What the turns of a peer at a rate have found; the first three lists have an entry a call, the others a turn."""

    result_s: list[float] = []
    callback_s: list[float] = []
    server_s: list[float] = []
    cpu_us: list[float] = []
    switches: list[float] = []


def run_deep_latency(
    bundle_path: Path, rates: Sequence[float], rounds: int, turn_s: float, directory: Path
) -> DeepLatencyReport:
    """Measures a bundle's deep model on an embedded Triton, and in this process.

    bundle_path: the bundle's directory.
    rates: calls a second.
    rounds: in each, every peer has a turn at every rate, and one without calls.
    turn_s: seconds of a turn.
    directory: for Triton's repository and its log.
    """
    bundle = load_bundle(bundle_path)
    signature = deep_signature(bundle)
    repository = write_repository(bundle.directory / "deep.onnx", signature, directory / "models", "cpu")
    with LocalTriton(repository, log_dir=directory) as triton:
        peers = _peers(bundle, triton.grpc_url)
        found: dict[tuple[str, float], Turns] = {(name, rate): Turns() for name in peers for rate in rates}
        idle: dict[str, list[_Usage]] = {name: [] for name in peers}
        inputs = _rows(signature)

        def server_time() -> tuple[int, float]:
            with urllib.request.urlopen(triton.metrics_url, timeout=_READY_S) as page:  # noqa: S310 - a local address
                return triton_time(page.read().decode())

        with Steps() as progress:
            for number in range(rounds):
                for place, name in enumerate(_rotated(list(peers), number)):
                    progress("measure, by turns", (number + place / len(peers)) / rounds)
                    with closing(peers[name]()) as peer:
                        peer.submit(inputs[0]).result()
                        for rate in rates:
                            measure_turn(peer, inputs, rate, turn_s, found[name, rate], server_time)
                        idle[name].append(_idle(turn_s))
                    time.sleep(_SETTLE_S)
            progress("measure, by turns", 1.0)
    return DeepLatencyReport(
        latencies=tuple(_latency(name, rate, turns) for (name, rate), turns in found.items()),
        idle=tuple(_idle_of(name, used, turn_s) for name, used in idle.items()),
        rounds=rounds,
        turn_s=turn_s,
        machine=describe_machine(),
    )


def measure_turn(
    peer: Peer,
    inputs: Sequence[DeepInputs],
    rate: float,
    turn_s: float,
    found: Turns,
    server_time: Callable[[], tuple[int, float]],
) -> None:
    """Sends calls at a rate for some seconds, the next one not before the last one is answered, and adds to `found`.

    `server_time`: the requests that the server has answered, and the seconds that they took.
    """
    requests_before, seconds_before = server_time()
    before = _Usage.now()
    started_s = time.monotonic()
    calls = 0
    while (due_s := started_s + calls / rate) < started_s + turn_s:
        time.sleep(max(due_s - time.monotonic(), 0.0))
        sent_s = time.monotonic()
        future = peer.submit(inputs[calls % len(inputs)])
        future.add_done_callback(partial(_note, found.callback_s, sent_s))
        future.result()
        found.result_s.append(time.monotonic() - sent_s)
        calls += 1
    after = _Usage.now()
    found.cpu_us.append((after.cpu_s - before.cpu_s) * 1e6 / calls)
    found.switches.append((after.switches - before.switches) / calls)
    requests, seconds = server_time()
    if requests > requests_before:
        found.server_s.append((seconds - seconds_before) / (requests - requests_before))


def _note(found: list[float], sent_s: float, _: Future[Any]) -> None:
    found.append(time.monotonic() - sent_s)


def _rows(signature: DeepSignature) -> list[DeepInputs]:
    chance = np.random.default_rng(1)
    shapes = signature.sequences
    return [
        DeepInputs(
            {name: chance.standard_normal((1, *shape), dtype=np.float32) for name, shape in shapes.items()},
            chance.standard_normal((1, signature.features), dtype=np.float32),
        )
        for _ in range(_INPUTS)
    ]


def _rotated(names: list[str], number: int) -> list[str]:
    first = number % len(names)
    return names[first:] + names[:first]


def _idle(seconds: float) -> _Usage:
    before = _Usage.now()
    time.sleep(seconds)
    after = _Usage.now()
    return _Usage(after.cpu_s - before.cpu_s, after.switches - before.switches)


def _idle_of(peer: str, used: Sequence[_Usage], seconds: float) -> DeepIdle:
    return DeepIdle(
        peer=peer,
        cpu_ms_per_s=1e3 * float(np.median([turn.cpu_s for turn in used])) / seconds,
        switches_per_s=float(np.median([turn.switches for turn in used])) / seconds,
    )


def _latency(peer: str, rate: float, turns: Turns) -> DeepLatency:
    return DeepLatency(
        peer=peer,
        rate_per_s=rate,
        calls=len(turns.result_s),
        result_ms=_percentiles_ms(turns.result_s),
        callback_ms=_percentiles_ms(turns.callback_s),
        cpu_us=float(np.median(turns.cpu_us)),
        switches=float(np.median(turns.switches)),
        server_ms=1e3 * float(np.median(turns.server_s)) if turns.server_s else None,
    )


def _percentiles_ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    p50, p90, p99 = np.percentile(np.array(seconds) * 1e3, [50, 90, 99]).tolist()
    return p50, p90, p99


# --- the peers --------------------------------------------------------------------------------------------------------


def _peers(bundle: Bundle, url: str) -> dict[str, Callable[[], Peer]]:
    return {
        "stage, Triton": lambda: _Stage(bundle, DeepSettings(url=url)),
        "tritonclient": lambda: _Blocking(deep_signature(bundle), url),
        "the same, aio": lambda: _OnALoop(deep_signature(bundle), url),
        "in process": lambda: _Stage(bundle, DeepSettings(backend="onnxruntime")),
        _HARNESS: _AtOnce,
    }


class _Stage:
    """The service's own stage."""

    def __init__(self, bundle: Bundle, settings: DeepSettings) -> None:
        self._stage = make_deep_stage(bundle, settings)
        self._stage.wait_ready(_READY_S)

    def submit(self, inputs: DeepInputs) -> Future[Any]:
        return self._stage.submit(inputs, _TIMEOUT_S)

    def close(self) -> None:
        self._stage.close()


class _Blocking:
    """NVIDIA's client, which blocks its caller: no other thread of Python's has to wake up."""

    def __init__(self, signature: DeepSignature, url: str) -> None:
        from tritonclient.grpc import InferenceServerClient

        self._signature, self._client = signature, InferenceServerClient(url)

    def submit(self, inputs: DeepInputs) -> Future[Any]:
        answer: Future[Any] = Future()
        tensors, outputs = _tensors(self._signature, inputs)
        answer.set_result(self._client.infer(MODEL_NAME, tensors, outputs=outputs).as_numpy(self._signature.output))
        return answer

    def close(self) -> None:
        self._client.close()


class _OnALoop:
    """NVIDIA's asyncio client on a loop in a thread of its own."""

    def __init__(self, signature: DeepSignature, url: str) -> None:
        self._signature = signature
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = self._run(self._connect(url)).result()

    async def _connect(self, url: str) -> Any:
        from tritonclient.grpc.aio import InferenceServerClient

        return InferenceServerClient(url)

    async def _infer(self, inputs: DeepInputs) -> Any:
        tensors, outputs = _tensors(self._signature, inputs)
        return (await self._client.infer(MODEL_NAME, tensors, outputs=outputs)).as_numpy(self._signature.output)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def submit(self, inputs: DeepInputs) -> Future[Any]:
        return self._run(self._infer(inputs))

    def close(self) -> None:
        self._run(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _AtOnce:
    """What the measurement itself costs."""

    def submit(self, inputs: DeepInputs) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result(None)
        return answer

    def close(self) -> None:
        """Nothing is open."""


def _tensors(signature: DeepSignature, inputs: DeepInputs) -> tuple[list[Any], list[Any]]:
    from tritonclient.grpc import InferInput, InferRequestedOutput

    tensors = []
    for name, values in signature.tensors(inputs).items():
        tensors.append(InferInput(name, list(values.shape), "FP32"))
        tensors[-1].set_data_from_numpy(values)
    return tensors, [InferRequestedOutput(signature.output)]


def triton_time(metrics: str) -> tuple[int, float]:
    """The requests that a page of Triton's metrics counts as answered, and the seconds that they took together."""
    found = {
        name: float(value)
        for name, value in re.findall(
            r"^nv_inference_(request_success|request_duration_us)\{.*\} (\S+)$", metrics, re.M
        )
    }
    return round(found["request_success"]), found["request_duration_us"] / 1e6


def show_deep_latency(report: DeepLatencyReport, console: Console) -> None:
    """Prints a table of the calls, and one of the peers at rest."""
    table = figure_table("", "/s", "p50 ms", "p99", "callback", "Triton", "CPU µs", "switches")
    own = {entry.rate_per_s: entry for entry in report.latencies if entry.peer == _HARNESS}
    for entry in report.latencies:
        table.add_row(
            entry.peer,
            f"{entry.rate_per_s:g}",
            f"{entry.result_ms[0]:.2f}",
            f"{entry.result_ms[2]:.1f}",
            f"{entry.callback_ms[0]:.2f}",
            "" if entry.server_ms is None else f"{entry.server_ms:.2f}",
            f"{entry.cpu_us - (0 if entry.peer == _HARNESS else own[entry.rate_per_s].cpu_us):,.0f}",
            f"{entry.switches:.1f}",
        )
    resting = figure_table("without calls", "CPU ms/s", "switches/s")
    for idle in report.idle:
        resting.add_row(idle.peer, f"{idle.cpu_ms_per_s:.2f}", f"{idle.switches_per_s:.1f}")
    print_table(console, table)
    print_table(
        console,
        resting,
        f"Triton {TRITON_VERSION} on the CPU, one row a call; {report.rounds} rounds, turns of {report.turn_s:g} s",
        "p50, p99: until `result()` returns; callback: p50 until a callback runs; Triton: its own mean for a request",
        "the same, aio: NVIDIA's asyncio client; at once: a call that is answered at once, what measuring costs",
        f"CPU µs: of this process a call, less that of `{_HARNESS}` at the same rate",
        report.machine.text,
    )
