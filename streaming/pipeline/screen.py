"""Steps 4 and 5, features and screen: rows are folded into the state, scored, and chosen for the deep model."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float64, Int64
from cascade.engine import Engine, Screened
from cascade.ledger import StageLaps
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.table import Table


def screen(
    table: Table, engine: Engine, budget_factor: float, laps: StageLaps
) -> tuple[Screened, Int64, Int64, Float64]:
    """Fills the columns of both steps.

    Returns the engine's result; the positions (int64) of the undecided rows that the screener decides, and of those to
    escalate; and the seconds (float64) that each undecided row has waited before its micro-batch began.

    Records that the previous owner of their partition escalated stay escalated, even if their scores differ now, since
    the records of other partitions came in another order: decided by the screener, they would follow later ones of
    their card. The budget counts them.

    budget_factor: the part of the escalation budget that is used. laps: gets the stages `features` and `screener`.
    """
    laps.skip()
    count = len(table.rows)
    computed = engine.compute(table.batch, table.column("partition_id"))
    laps.end("features", count)
    screened = engine.score(computed)
    engine.escalation.factor = budget_factor
    laps.end("screener", count)
    found, queue_s = np.empty(count, np.int64), np.empty(count)
    clear, end = kernels.mark_screened(
        table.rows, screened.probability, screened.escalation_score, engine.escalation.control,
        laps.wall_ms("features"), laps.wall_ms("screener"), found, queue_s,
    )  # fmt: skip
    return screened, found[:clear], found[clear:end], queue_s[:end]
