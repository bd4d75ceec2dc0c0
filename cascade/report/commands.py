"""`cascade report`: a journal as one page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cascade.errors import DataError, SettingError
from cascade.ledger.commands import From, Paths, Until, moment
from cascade.ledger.counterfactual import deep_only
from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.journal import read_journal
from cascade.report.business import Assumptions
from cascade.report.figures import gather
from cascade.report.page import make_page
from cascade.report.words import words

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DEFAULTS = Assumptions()


@app.command()
def report(
    paths: Paths,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    lang: Annotated[str, typer.Option(help="en or ja.")] = "en",
    start: From = None,
    until: Until = None,
    volume: Annotated[float, typer.Option(help="Decisions a year, of the business page.")] = DEFAULTS.volume,
    price: Annotated[float, typer.Option(help="Of a kWh.")] = DEFAULTS.price,
    currency: Annotated[str, typer.Option(help="Of the price.")] = DEFAULTS.currency,
    region: Annotated[str, typer.Option(help="ISO 3166-1 alpha-3: its grid's average.")] = DEFAULTS.region,
    pue: Annotated[float, typer.Option(help="Of the data centre.")] = DEFAULTS.pue,
    deep_cost: Annotated[
        Path | None,
        typer.Option(help="What `cascade bench deep-calls` wrote on the service's machine: adds the saving."),
    ] = None,
) -> None:
    """One self-contained page (it prints, too) of what services have kept on disk, as [ledger] says.

    Latency, energy by who used it, both over time, error budgets, a business page, an energy sheet, and the method.
    """
    language = words(lang)
    given = _assumptions(volume, price, currency, region, pue)
    figures = gather(read_journal(paths), moment("--from", start), moment("--until", until))
    command = shlex.join(["cascade", "report", *(path.name for path in paths)])
    counterfactual = None if deep_cost is None else deep_only(figures.summary, DeepCost.read(deep_cost))
    page = make_page(figures, given, language, command, counterfactual)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"{out}: {figures.summary.transactions:,} decisions")


def _assumptions(volume: float, price: float, currency: str, region: str, pue: float) -> Assumptions:
    given = {"volume": volume, "price": price, "currency": currency, "region": region, "pue": pue}
    try:
        found = msgspec.convert(given, Assumptions)
    except msgspec.ValidationError as error:
        raise SettingError(
            "report", "business page", ", ".join(f"{name} {value}" for name, value in given.items()), str(error),
            "see cascade report --help",
        ) from error  # fmt: skip
    _ = found.g_per_kwh
    return found
