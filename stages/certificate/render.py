"""Prints a certificate within 80 columns: asked, found, shown, and the verdict."""

from __future__ import annotations

import math
from datetime import datetime

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascade.certificate import Certificate, Claim, Sense

_NAMES = {
    "frauds": "frauds kept",
    "average precision": "average precision kept",
    "escalated": "escalated",
    "false alarms": "false alarms × deep-only",
}
_SIGNS: dict[Sense, str] = {"at least": "≥ ", "at most": "≤ "}


def show_certificate(certificate: Certificate, console: Console, now: datetime) -> None:
    """Prints the verdict on each claim and on all, the data and the power behind them, and the expiry.

    now: UTC, to say whether it has expired.
    """
    evidence = certificate.evidence
    console.print(f"Certificate of bundle {certificate.bundle_version}", style="bold", soft_wrap=True)
    console.print(
        f"{evidence.first:%Y-%m-%d} to {evidence.last:%Y-%m-%d}, after {evidence.history_days:.0f} days of history:"
        f" {evidence.transactions:,} transactions, {evidence.frauds:,} frauds, {evidence.cards:,} cards;"
        f" decisions: {evidence.decisions}\n"
    )
    console.print(_table(certificate))
    for line in _notes(certificate):
        console.print(line, style="dim")
    console.print(_verdict(certificate, now))


def _table(certificate: Certificate) -> Table:
    table = Table("beside deep-only", box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("asked", "found", f"shown ({100 * certificate.confidence:.4g} %)"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in certificate.claims:
        verdict = Text("shown", style="bold green") if claim.holds else Text("not shown", style="bold red")
        limits = (_asked(claim), _figure(claim, claim.observed), _SIGNS[claim.sense] + _figure(claim, claim.shown))
        table.add_row(_NAMES.get(claim.name, claim.name) + (" *" if claim.approximate else ""), *limits, verdict)
    return table


def _asked(claim: Claim) -> str:
    return _SIGNS[claim.sense] + (f"{claim.asked:.4g}" if claim.asked > 1.0 else f"{100 * claim.asked:.4g} %")


def _figure(claim: Claim, value: float) -> str:
    """The value, rounded to the side that claims less, so that a figure never looks better than it is."""
    scale, places, unit = (1.0, 2, "") if claim.asked > 1.0 else (100.0, 1, " %")
    if claim.asked < 0.1:
        places = 2
    steps = round(scale * value * 10**places, 6)
    whole = math.floor(steps) if claim.sense == "at least" else math.ceil(steps)
    return f"{whole / 10**places:.{places}f}{unit}"


def _notes(certificate: Certificate) -> list[str]:
    evidence, power, frauds = certificate.evidence, certificate.power, certificate.claims[0]
    by_unit = ", ".join(f"{_figure(frauds, bound.value)} ({bound.unit})" for bound in frauds.bounds)
    largest = "none" if frauds.largest is None else f"{100 * frauds.largest:.4g} %"
    return [
        f"\nfrauds caught: cascade {evidence.caught:,}, deep-only {evidence.caught_by_deep:,}; lost {evidence.lost:,},"
        f" gained {evidence.gained:,}",
        f"frauds kept at least, by what is independent: {by_unit}",
        f"highest claim that these bounds allow: {largest}",
        _needed(certificate),
        f"chance to show {100 * frauds.asked:.4g} % if {50 * (1 - frauds.asked):.4g} % were lost:"
        f" {min(power.chance.values()):.0%}",
        "* approximate: bootstrap over cards and days; the bounds on frauds are exact",
        f"the service watches that {100 * certificate.recall.at_least:.1f} % of cards' first frauds are caught",
    ]


def _needed(certificate: Certificate) -> str:
    claim, power = certificate.claims[0], certificate.power
    asked = f"{100 * claim.asked:.4g} %"
    numbers = [number for number in power.needed.values() if number is not None]
    if len(numbers) < len(power.needed):
        return f"frauds needed for {asked} at this loss: no number suffices, the loss is too high"
    return f"frauds needed for {asked} at this loss: {max(numbers):,} (chance {power.power:.0%})"


def _verdict(certificate: Certificate, now: datetime) -> Text:
    expires = f"\nexpires {certificate.expires:%Y-%m-%d}, earlier {certificate.ends_earlier}"
    if certificate.expires <= now:
        expires = f"\nIt expired on {certificate.expires:%Y-%m-%d}: certify again with newer data."
    if certificate.holds:
        return Text("\nAll of it is shown.", style="bold green").append(expires, style="default not bold")
    missing = ", ".join(_NAMES.get(claim.name, claim.name) for claim in certificate.claims if not claim.holds)
    return Text(f"\nNot shown: {missing}.", style="bold red").append(expires, style="default not bold")
