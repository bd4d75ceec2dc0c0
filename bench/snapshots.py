"""What a snapshot costs: `python -m bench.snapshots` prints the loop's pause and the time to write and to load it.

Random transactions of many cards, seeded, through the shipped bundle's feature engine; no Kafka.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import ColumnBatch
from cascade.ledger.machine import describe_machine
from cascade.protocols import SystemClock
from cascade.schema import Schema
from stages.assembly import make_engine
from streaming.files import FsspecFiles
from streaming.snapshots import Snapshot, SnapshotStore

ROWS_A_BATCH = 100_000
TERMINALS = 20_000
START_MS, STEP_MS = 1_750_000_000_000, 10
REPEATS = 5
PARTITION = ("transactions", 0)


def measure(
    cards: Annotated[list[int], typer.Option(help="Numbers of cards, each on top of the last.")],
    transactions_per_card: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the transactions.")] = 1,
) -> None:
    """Fold transactions, and time the parts of a snapshot at each number of cards."""
    console = Console()
    bundle = load_bundle(SHIPPED_BUNDLE)
    features = make_engine(bundle).features
    chance, rows = np.random.default_rng(seed), 0
    where = {PARTITION: 1}
    for number in cards:
        for _ in range(0, number * transactions_per_card, ROWS_A_BATCH):
            features.update(_transactions(bundle.schema, chance, number, rows))
            rows += ROWS_A_BATCH
        buffers = features.export_buffers()
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as writer:
            store = SnapshotStore(FsspecFiles(directory), 2, "bench", "bench", SystemClock(), writer.submit)
            into_buffers = [_seconds(lambda: features.export_state(buffers)) for _ in range(REPEATS)]  # noqa: B023
            fresh_s = _seconds(features.export_state)
            arrays = features.export_state(buffers)
            write_s = _seconds(lambda: store.save(Snapshot(arrays, where, {}, {})).result())  # noqa: B023
            (name,) = store.candidates(where, {})[PARTITION]
            load_s = _seconds(lambda: store.load(name))  # noqa: B023
        console.print(
            f"{features.statistics()[bundle.schema.roles.card].keys:,} cards,"
            f" {sum(array.nbytes for array in arrays.values()) / 1e6:,.0f} MB: pause"
            f" {1e3 * float(np.median(into_buffers)):.0f} ms (median of {REPEATS};"
            f" {1e3 * fresh_s:,.0f} ms into fresh memory), write {write_s:.1f} s, load {load_s:.1f} s",
            highlight=False,
        )
    machine = describe_machine()
    console.print(f"{machine.processor}, {machine.cores} cores; numpy {np.__version__}; seed {seed}", style="dim")


def _transactions(schema: Schema, chance: np.random.Generator, cards: int, first: int) -> ColumnBatch:
    columns = {name: np.zeros(ROWS_A_BATCH, field.dtype) for name, field in schema.fields.items()}
    roles, numbers = schema.roles, first + np.arange(ROWS_A_BATCH)
    columns[roles.transaction_id][:] = numbers
    columns[roles.event_time][:] = START_MS + STEP_MS * numbers
    columns[roles.amount][:] = chance.lognormal(3.0, 1.0, ROWS_A_BATCH)
    columns[roles.card][:] = chance.integers(0, cards, ROWS_A_BATCH)
    columns[roles.terminal][:] = chance.integers(0, TERMINALS, ROWS_A_BATCH)
    return ColumnBatch(columns, ROWS_A_BATCH)


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    typer.run(measure)
