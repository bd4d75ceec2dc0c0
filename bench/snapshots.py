"""The cost of a snapshot: `python -m bench.snapshots` prints the pause of the worker's loop, and write and load times.

It folds seeded random transactions of many cards with the shipped bundle's feature engine, without Kafka.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from bench.features import random_transactions
from bench.tables import figure_table, print_table
from bench.turns import seconds_of
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.ledger.machine import describe_machine
from cascade.protocols import SystemClock
from stages.assembly import make_engine
from streaming.worker.files import FsspecFiles
from streaming.worker.snapshots import Snapshot, SnapshotStore

BATCH_ROWS = 100_000
TERMINALS = 20_000
START_MS, STEP_MS = 1_750_000_000_000, 10
REPEATS = 5
PARTITION = ("transactions", 0)


def measure(
    cards: Annotated[list[int], typer.Option(help="Number of cards; give several to measure growing states.")],
    transactions_per_card: Annotated[int, typer.Option(min=1, help="Mean number for each measurement.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the transactions.")] = 1,
) -> None:
    """Fold transactions, and measure the parts of a snapshot for each number of cards."""
    table = figure_table("cards", "state MB", "pause ms", "first pause ms", "write s", "load s")
    bundle = load_bundle(SHIPPED_BUNDLE)
    features = make_engine(bundle).features
    chance, rows = np.random.default_rng(seed), 0
    positions = {PARTITION: 1}
    for count in cards:
        for _ in range(0, count * transactions_per_card, BATCH_ROWS):
            times_ms = START_MS + STEP_MS * (rows + np.arange(BATCH_ROWS))
            features.update(random_transactions(bundle.schema, chance, rows, times_ms, count, TERMINALS))
            rows += BATCH_ROWS
        buffers = features.export_buffers()
        with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as writer:
            store = SnapshotStore(FsspecFiles(directory), 2, "bench", "bench", SystemClock(), writer.submit)
            pauses_s = [seconds_of(partial(features.export_state, buffers)) for _ in range(REPEATS)]
            fresh_s = seconds_of(features.export_state)
            arrays = features.export_state(buffers)
            write_s = seconds_of(lambda: store.save(Snapshot(arrays, positions, {}, {})).result())  # noqa: B023
            (name,) = store.candidates(positions, {})[PARTITION]
            load_s = seconds_of(partial(store.load, name))
        table.add_row(
            f"{features.statistics()[bundle.schema.roles.card].keys:,}",
            f"{sum(array.nbytes for array in arrays.values()) / 1e6:,.0f}",
            f"{1e3 * float(np.median(pauses_s)):.0f}",
            f"{1e3 * fresh_s:,.0f}",
            f"{write_s:.1f}",
            f"{load_s:.1f}",
        )
    machine = describe_machine()
    print_table(
        Console(),
        table,
        f"pause: of the worker's loop, median of {REPEATS}; first pause: with newly allocated buffers",
        f"{machine.processor}, {machine.cores} cores; numpy {np.__version__}; seed {seed}",
    )


if __name__ == "__main__":
    typer.run(measure)
