"""A consumer downstream, in a process of its own, that measures when each decision becomes visible.

`python -m bench.observer --config cascade.toml --out seen.npz` reads the decisions (`read_committed`) until SIGTERM,
and then writes a row for each: `partition` and `offset` (int64) of the transaction, `path` (int64: 0 screened, 1 deep,
2 degraded), and `seen_s` (float64), when its fetch returned, seconds since the epoch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import typer

from bench.cluster import parse_decision_id
from cascade.columns import Float64, Int64
from cascade.config import load_config
from cascade.errors import LocalPartError
from cascade.local_parts import OwnedProcess
from streaming.kafka import make_consumer
from streaming.pipeline.decisions import Decision, decode_decision

POLL_S, POLL_ROWS_MAX = 0.05, 20_000
# Bounds the memory to about a gigabyte if nothing stops the observer.
DECISIONS_MAX = 5_000_000
READY_TIMEOUT_S = 60.0
SCREENED, DEEP, DEGRADED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Observations:
    """The file of an observer, in the order of arrival; the module explains the columns."""

    partition: Int64
    offset: Int64
    path: Int64
    seen_s: Float64

    @classmethod
    def read(cls, path: Path) -> Self:
        """Load the file of an observer."""
        with np.load(path) as found:
            return cls(found["partition"], found["offset"], found["path"], found["seen_s"])


class Observer:
    """Runs `python -m bench.observer` as a context manager; `end` stops it and returns its observations."""

    def __init__(self, config_path: Path, latest: bool = False) -> None:
        """`latest`: skip the decisions that the topic already contains."""
        self._out = config_path.with_suffix(".seen.npz")
        self._ready = ready_mark(self._out)
        command = [sys.executable, "-m", "bench.observer", "--config", str(config_path), "--out", str(self._out)]
        if latest:
            command.append("--latest")
        self._process = OwnedProcess("the observer", command, config_path.with_suffix(".observer.log"), os.environ)

    def __enter__(self) -> Self:
        self._out.unlink(missing_ok=True)
        self._ready.unlink(missing_ok=True)
        self._process.start()
        self._process.wait_until(self._ready.exists, READY_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def end(self) -> Observations:
        """Stop the observer; raises LocalPartError if it wrote no file."""
        self._process.stop(60.0)
        if not self._out.exists():
            raise LocalPartError(f"the observer ended without a file: {self._process.log_tail()}")
        return Observations.read(self._out)


def ready_mark(path: Path) -> Path:
    """The file that a process creates when it is ready to measure; `path` is the file that it writes at its end."""
    return path.with_suffix(".ready")


def observe(
    config: Annotated[Path, typer.Option(help="Configuration file of the service that decides.")],
    out: Annotated[Path, typer.Option(help="File to write, .npz.")],
    latest: Annotated[bool, typer.Option("--latest", help="Skip the decisions that exist already.")] = False,
) -> None:
    """Record when each decision becomes visible, until SIGTERM."""
    settings, stop = load_config(config), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    seen_s: list[float] = []
    counts: list[int] = []
    values: list[bytes | None] = []
    with closing(make_consumer(settings.kafka, None)) as consumer:
        partitions = consumer.partitions_for(settings.kafka.topics.decisions)
        consumer.assign(partitions)
        if latest:
            for partition, end in consumer.end_offsets(partitions).items():
                consumer.seek(partition, end)
        ready_mark(out).touch()
        while not stop.is_set() and len(values) < DECISIONS_MAX:
            fetched = consumer.poll(POLL_S, POLL_ROWS_MAX)
            # decoded after the end, since decoding would delay the next fetch
            seen_s.append(time.time())
            counts.append(sum(map(len, fetched)))
            for batch in fetched:
                values += batch.values
    decisions = [decode_decision(value or b"", settings.kafka.codec) for value in values]
    positions = np.array([parse_decision_id(each.decision_id) for each in decisions], np.int64).reshape(-1, 2)
    np.savez(
        out,
        partition=positions[:, 0],
        offset=positions[:, 1],
        path=np.array(list(map(_path, decisions)), np.int64),
        seen_s=np.repeat(np.array(seen_s), counts),
    )


def _path(decision: Decision) -> int:
    if decision.degraded:
        return DEGRADED
    return DEEP if decision.stage == "deep" else SCREENED


if __name__ == "__main__":
    typer.run(observe)
