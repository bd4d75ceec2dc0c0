"""An open-loop load, in a process of its own, whose schedule does not depend on the service.

`python -m bench.load --config cascade.toml --plan plan.msgpack --report report.json --linger-ms 1` reads the plan,
connects, waits for the start time (`Load.begin`), and sends each message when it is due. The load does not slow down
when the service falls behind, so latencies that count from the schedule are free of coordinated omission (Tene, "How
NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec
import numpy as np
import typer

from bench.observer import READY_TIMEOUT_S, ready_mark
from cascade.columns import Float64
from cascade.config import load_config
from cascade.errors import LocalPartError
from cascade.local_parts import OwnedProcess
from streaming.kafka.rdkafka_producer import RdkafkaProducer

Arrivals = Literal["constant", "poisson", "burst", "day"]
# Messages that are due within a tick are sent together. A sleep cannot be much shorter.
TICK_S = 0.0005
# Bounds the duration of one call to the client, which delays the next messages.
SEND_ROWS_MAX = 2_000
FLUSH_S_MAX = 60.0
# Time from `Load.begin` to the start: longer than the process takes to read the start time.
START_S, START_POLL_S = 0.5, 0.05
# A burst has BURST_FACTOR times the mean rate for this share of each second.
BURST_FACTOR, BURST_SHARE = 5.0, 0.1
# The run is one day: its rate swings between these shares of twice the mean.
DAY_LEAST, DAY_MOST = 0.1, 0.9


def departures(arrivals: Arrivals, rate: float, seconds: float, seed: int) -> Float64:
    """The times at which records are due, seconds after the start, float64 [about `rate` × `seconds`], ascending.

    arrivals: "constant": even gaps; "poisson": independent arrivals; "burst": Poisson with five times the mean rate in
        the first tenth of each second; "day": Poisson with a rate that rises from its least to its most and falls back.
    rate: mean number of records a second.
    seconds: duration.
    """
    count = max(int(rate * seconds), 1)
    if arrivals == "constant":
        return np.arange(count) / rate
    even = np.sort(np.random.default_rng(seed).uniform(0.0, seconds, count))
    if arrivals == "poisson":
        return even
    grid = np.linspace(0.0, seconds, 100_001)
    if arrivals == "burst":
        quiet = (1 - BURST_FACTOR * BURST_SHARE) / (1 - BURST_SHARE)
        density = np.where(grid % 1.0 < BURST_SHARE, BURST_FACTOR, quiet)
    else:
        density = DAY_LEAST + (DAY_MOST - DAY_LEAST) * (1 - np.cos(2 * np.pi * grid / seconds)) / 2
    # inverse of the distribution function, which is the integral of the density
    reached = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.asarray(np.interp(even / seconds * reached[-1], reached, grid), np.float64)


@dataclass(frozen=True, slots=True)
class Plan:
    """Messages for a topic. `due_s`: when they are due, float64 [messages], seconds after the start."""

    topic: str
    due_s: Float64
    keys: list[bytes]
    values: list[bytes]

    def write(self, path: Path) -> None:
        """Write the plan as MessagePack."""
        content = self.topic, self.due_s.tolist(), self.keys, self.values
        path.write_bytes(msgspec.msgpack.encode(content))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `write`."""
        kind = tuple[str, list[float], list[bytes], list[bytes]]
        topic, due_s, keys, values = msgspec.msgpack.decode(path.read_bytes(), type=kind)
        return cls(topic, np.array(due_s, np.float64), keys, values)


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a load. `behind_ms_*`: delay from a record's due time until it was passed to the client."""

    sent: int
    seconds: float
    behind_ms_p99: float
    behind_ms_max: float


class Load:
    """Runs `python -m bench.load` as a context manager; `wait` returns its report.

    config_path: names the broker; files are written beside it.
    plan: the messages.
    linger_ms: how long librdkafka waits for more messages before it sends.
    """

    def __init__(self, config_path: Path, plan: Plan, linger_ms: int) -> None:
        self._plan_path = config_path.with_suffix(".plan.msgpack")
        self._report_path = config_path.with_suffix(".load.json")
        self._plan = plan
        command = [sys.executable, "-m", "bench.load", "--config", str(config_path)]
        command += ["--plan", str(self._plan_path), "--report", str(self._report_path)]
        command += ["--linger-ms", str(linger_ms)]
        self._process = OwnedProcess("the load", command, config_path.with_suffix(".load.log"), os.environ)

    def __enter__(self) -> Self:
        for path in (self._report_path, ready_mark(self._report_path), start_file(self._report_path)):
            path.unlink(missing_ok=True)
        self._plan.write(self._plan_path)
        self._process.start()
        self._process.wait_until(ready_mark(self._report_path).exists, READY_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()
        self._plan_path.unlink(missing_ok=True)

    def begin(self) -> float:
        """Start the plan START_S from now; returns the start time, seconds since the epoch."""
        start_s = time.time() + START_S
        path = start_file(self._report_path)
        # renamed, so that the process never reads a part of it
        path.with_suffix(".part").write_text(repr(start_s))
        path.with_suffix(".part").rename(path)
        return start_s

    def wait(self) -> LoadReport:
        """Return when all records are acknowledged; raises LocalPartError if the process fails."""
        give_up_s = time.time() + float(self._plan.due_s[-1]) + 2 * FLUSH_S_MAX
        while self._process.running and time.time() < give_up_s:
            time.sleep(0.05)
        if not self._report_path.exists():
            raise LocalPartError(f"the load ended without a report: {self._process.log_tail()}")
        return msgspec.json.decode(self._report_path.read_bytes(), type=LoadReport)


def start_file(report: Path) -> Path:
    """The file with the start time of a load, seconds since the epoch."""
    return report.with_suffix(".start")


def load(
    config: Annotated[Path, typer.Option(help="Configuration file, for Kafka; the client is librdkafka.")],
    plan: Annotated[Path, typer.Option(help="File with the plan, MessagePack.")],
    report: Annotated[Path, typer.Option(help="File to write, JSON.")],
    linger_ms: Annotated[int, typer.Option(help="How long the client waits for more messages.")],
) -> None:
    """Send the messages of a plan when they are due."""
    todo = Plan.read(plan)
    behind_s = np.zeros(len(todo.values))
    sent, count = 0, len(todo.values)
    producer = RdkafkaProducer(load_config(config).kafka, {"linger.ms": linger_ms})
    try:
        ready_mark(report).touch()
        while not start_file(report).exists():
            time.sleep(START_POLL_S)
        start_s = float(start_file(report).read_text())
        while sent < count:
            now_s = time.time() - start_s
            until = min(int(np.searchsorted(todo.due_s, now_s, side="right")), sent + SEND_ROWS_MAX)
            if until == sent:
                time.sleep(max(min(float(todo.due_s[sent]) - now_s, 0.1), TICK_S))
                continue
            behind_s[sent:until] = now_s - todo.due_s[sent:until]
            producer.send_many(todo.topic, todo.keys[sent:until], todo.values[sent:until])
            sent = until
        seconds = time.time() - start_s
        producer.flush(FLUSH_S_MAX)
    finally:
        producer.close(FLUSH_S_MAX)
    p99_ms, max_ms = 1e3 * float(np.quantile(behind_s, 0.99)), 1e3 * float(behind_s.max())
    result = LoadReport(sent=count, seconds=seconds, behind_ms_p99=p99_ms, behind_ms_max=max_ms)
    report.write_bytes(msgspec.json.encode(result))


if __name__ == "__main__":
    typer.run(load)
