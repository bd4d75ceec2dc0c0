"""What deep-only would have cost in the demo: deep calls measured on its own Triton, then the stream's own arithmetic.

The measurement is that of `cascade bench deep-calls`, shorter: five rounds of turns of a fifth of a second. Nothing
else of the demo has work meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from bench.deep_calls import ROUNDS_MIN, ROWS, configured, run_deep_calls
from cascade.config import Config
from cascade.ledger import LedgerSummary
from cascade.ledger.counterfactual import deep_only, escalated_limit_ms
from cascade.ledger.deep_cost import DeepCost
from cascade.progress import StepProgress

# Twenty ticks of the clock that counts the CPU time of another process; longer turns would take the demo's time.
TURN_S: Final = 0.2
_SEED: Final = 1


def measured_cost(config: Config, summaries: Sequence[LedgerSummary], progress: StepProgress) -> DeepCost:
    """Measures deep calls of the sizes that occur in these ledgers, in the cascade and in deep-only.

    Raises CascadeError where the deep model of the configuration cannot be measured.
    """
    return run_deep_calls(configured(config), sizes_of(summaries), ROUNDS_MIN, TURN_S, _SEED, progress).costs[0]


def sizes_of(summaries: Sequence[LedgerSummary]) -> list[int]:
    """The sizes of ROWS up to the calls of the cascade, and to those that deep-only could fill within its limit."""
    largest = max(max(_own_rows(summary), _filled_rows_max(summary)) for summary in summaries)
    return [rows for rows in ROWS if rows <= largest]


def _own_rows(summary: LedgerSummary) -> int:
    """The smallest size that is at least the mean of the cascade's own calls, so that the mean lies between two."""
    mean = summary.deep.rows_per_call or 1.0
    return next((rows for rows in ROWS if rows >= mean), ROWS[-1])


def _filled_rows_max(summary: LedgerSummary) -> float:
    """The transactions that arrive within the limit of the escalated path: no call that keeps it has more."""
    limit_ms = escalated_limit_ms(summary)
    return float("inf") if limit_ms is None else 1.0 + summary.per_second * limit_ms / 1e3


def with_deep_only(summary: LedgerSummary, cost: DeepCost) -> LedgerSummary:
    """The ledger with its comparison; raises CounterfactualError where the cost does not fit it."""
    return replace(summary, counterfactual=deep_only(summary, cost))
