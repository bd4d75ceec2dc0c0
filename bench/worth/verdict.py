"""The sentence at the end of `cascade worth`: whether the deep stage pays, at which share, and against what."""

from __future__ import annotations

from bench.worth.report import KindWorth, WorthReport
from cascade.ledger.render import number_text, percent_text
from stages.intervals import Figure


def verdict(report: WorthReport, found: KindWorth) -> str:
    """One sentence by one kind of energy. Gains are of 1,000 transactions, electricity included."""
    ways, currency = report.ways, report.electricity.currency
    if found.best == 0:
        return (
            f"The deep stage does not pay here: no escalated share costs less than the screener alone"
            f" ({currency} {number_text(ways[0].cost_per_thousand.value)} a thousand); {_on_deep(found, currency)}."
        )
    best = ways[found.best]
    share, saving = percent_text(best.share), found.energy[found.best].saving
    gain = f"{currency} {_ends(found.gain_on_screener)} a thousand on the screener alone"
    against = f"{_on_deep(found, currency)}, which needs {number_text(saving.value)} × its energy ({found.kind})"
    if found.pays:
        return f"The deep stage pays here: best at {share} escalated, it gains {gain}; {against}."
    return (
        f"The deep stage is not shown to pay here: best at {share} escalated, it gains {gain}, and the interval"
        f" contains zero with {report.frauds:,} frauds of validation; {against}."
    )


def _on_deep(found: KindWorth, currency: str) -> str:
    """The cost of the best share against everything deep."""
    gain = found.gain_on_deep
    word, ends = ("less", gain) if gain.value >= 0.0 else ("more", Figure(-gain.value, -gain.high, -gain.low))
    return f"it costs {currency} {_ends(ends)} a thousand {word} than everything deep"


def _ends(figure: Figure) -> str:
    return f"{number_text(figure.value)} ({number_text(figure.low)} to {number_text(figure.high)})"
