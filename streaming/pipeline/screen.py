"""Steps 4 and 5, features and screen: rows are folded into the state, and scored by the screener."""

from __future__ import annotations

from cascade.engine import Engine, Screened
from cascade.ledger import StageLaps
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.table import Table


def screen(table: Table, engine: Engine, threshold_raise: float, laps: StageLaps) -> tuple[Screened, int]:
    """Fills the columns of both steps; returns the engine's result, and the number of undecided rows to escalate.

    Records that the previous owner of their partition escalated stay escalated, even if their scores differ now, since
    the records of other partitions came in another order: decided by the screener, they would follow later ones of
    their card.

    threshold_raise: log-odds that are added to the escalation threshold. laps: gets the stages `features` and
    `screener`.
    """
    laps.skip()
    computed = engine.compute(table.batch, table.column("partition_id"))
    laps.end("features", len(table))
    screened = engine.score(computed, threshold_raise)
    laps.end("screener", len(table))
    suspicious = kernels.mark_screened(
        table.rows, screened.probability, screened.escalate, laps.wall_ms("features"), laps.wall_ms("screener")
    )
    return screened, suspicious
