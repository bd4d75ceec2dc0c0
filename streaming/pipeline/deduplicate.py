"""Step 3, deduplicate: repeats leave the table, and wait for the decision of their first occurrence."""

from __future__ import annotations

from cascade.schema import Roles
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.repeats import Repeats
from streaming.pipeline.table import Table


def deduplicate(table: Table, first_decisions: FirstDecisions, repeats: Repeats, roles: Roles) -> Table:
    """Returns the rows that occur for the first time, and adds the undecided others to `repeats`."""
    if not first_decisions.look_up(table, roles):
        return table
    repeated = table.rows["first"] >= 0
    repeats.add(table.take(repeated & table.rows["undecided"]))
    return table.take(~repeated)
