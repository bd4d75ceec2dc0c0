"""The last four lines of the demo: what the cascade keeps light, its quality, its energy, and whether it is on time.

Each is at most 69 characters, so that it fits 80 columns with its name before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bench.cores import Cores
from bench.demo_kept import Kept
from cascade.ledger import LedgerSummary
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.render import number_text, percent_text
from cascade.ledger.sla import ObjectiveResult

# A service that waits for a core in a tenth of its working time has not enough of them; below it, its own work is slow.
WAITED_SHARE_MIN: Final = 0.1
_NAMED_MAX: Final = 2
# An interval whose ends are further apart than this factor replaces the figure.
WIDE: Final = 1.25


def light_line(escalated_share: float, transactions: int) -> str:
    """The share of the transactions that the screener alone decided."""
    return f"{percent_text(1.0 - escalated_share)} of {transactions:,} transactions never reached the deep model"


def quality_line(found: Kept | None) -> str:
    """The shares of deep-only's quality that the cascade keeps."""
    if found is None:
        return "not known: deep-only catches no fraud of this data"
    precision, caught = percent_text(found.precision.value), percent_text(found.caught.value)
    return f"{precision} of deep-only's average precision, {caught} of its caught frauds"


def energy_lines(backlog: LedgerSummary, live: LedgerSummary) -> list[str]:
    """Deep-only's energy as a multiple of the cascade's, a line for each kind of energy that both parts have."""
    if backlog.counterfactual is None or live.counterfactual is None:
        return ["deep-only is not measured; ledger.json says why: deep_only_problem"]
    later = {comparison.kind: comparison.filled.ratio for comparison in live.counterfactual.comparisons}
    return [
        _energy_line(comparison.filled.ratio, later[comparison.kind], comparison.kind)
        for comparison in backlog.counterfactual.comparisons
        if comparison.kind in later
    ]


def _energy_line(backlog: Estimate, live: Estimate, kind: str) -> str:
    verdicts = {_verdict(backlog), _verdict(live)}
    verdict = f"deep-only needs {verdicts.pop()}:" if len(verdicts) == 1 else "mixed: deep-only"
    return f"{verdict} backlog {_factor(backlog)} ×, live {_factor(live)} × ({kind})"


def _factor(ratio: Estimate) -> str:
    """A factor, or its interval if that is so wide that the factor alone would say too much."""
    if ratio.high <= WIDE * ratio.low:
        return number_text(ratio.value)
    return "–".join(f"{end:.2g}" if end < 100.0 else f"{end:.0f}" for end in (ratio.low, ratio.high))


def _verdict(ratio: Estimate) -> str:
    if ratio.low > 1.0:
        return "more"
    return "less" if ratio.high < 1.0 else "as much"


def service_line(objectives: Sequence[ObjectiveResult], cores: Cores) -> str:
    """Whether the live part kept the service level, and if not, by whom it was missed."""
    missed = [objective for objective in objectives if not objective.met]
    if not missed:
        return f"met: all {len(objectives)} limits"
    text = f"missed {len(missed)} of {len(objectives)} limits"
    if cores.waited_share is None:
        return f"{text}; who had the cores is not known here"
    if cores.waited_share < WAITED_SHARE_MIN:
        return f"{text}; a core was free: the service is too slow"
    service = next(iter(cores.used))
    others = sorted(((share, name) for name, share in cores.used.items() if name != service), reverse=True)
    names = ", ".join(name for _, name in others[:_NAMED_MAX])
    took = sum(share for share, _ in others[:_NAMED_MAX])
    return f"{text}; no free core: {names} took {took:.2g} of {cores.cores}"
