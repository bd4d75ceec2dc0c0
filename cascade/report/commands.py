"""`cascade report`: writes a journal as one HTML page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cascade.errors import DataError, SettingError
from cascade.ledger.commands import DeepCostFile, From, Paths, Until, moment
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
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    lang: Annotated[str, typer.Option(help="Language of the page: en or ja.")] = "en",
    start: From = None,
    until: Until = None,
    volume: Annotated[float, typer.Option(help="Decisions per year, for the business page.")] = DEFAULTS.volume,
    price: Annotated[float, typer.Option(help="Price of a kWh.")] = DEFAULTS.price,
    currency: Annotated[str, typer.Option(help="Currency of the price.")] = DEFAULTS.currency,
    region: Annotated[
        str, typer.Option(help="Country of the grid whose average carbon intensity applies, ISO 3166-1 alpha-3.")
    ] = DEFAULTS.region,
    pue: Annotated[float, typer.Option(help="PUE of the data centre.")] = DEFAULTS.pue,
    deep_cost: DeepCostFile = None,
) -> None:
    """Write the journals of services as one HTML page, which loads nothing and prints well.

    It has latency, energy by use, both over time, error budgets, a business page, an energy sheet and the method.
    """
    language = words(lang)
    assumptions = _assumptions(volume, price, currency, region, pue)
    figures = gather(read_journal(paths), moment("--from", start), moment("--until", until))
    command = shlex.join(["cascade", "report", *(path.name for path in paths)])
    counterfactual = None if deep_cost is None else deep_only(figures.summary, DeepCost.read(deep_cost))
    page = make_page(figures, assumptions, language, command, counterfactual)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"{out}: {figures.summary.transactions:,} decisions")


def _assumptions(volume: float, price: float, currency: str, region: str, pue: float) -> Assumptions:
    """The assumptions of the business page; raises SettingError if one is out of range or the region is unknown."""
    options = {"volume": volume, "price": price, "currency": currency, "region": region, "pue": pue}
    try:
        assumptions = msgspec.convert(options, Assumptions)
    except msgspec.ValidationError as error:
        text = ", ".join(f"{name} {value}" for name, value in options.items())
        remedy = "see cascade report --help"
        raise SettingError("report", "business page", text, str(error), remedy) from error
    _ = assumptions.grid
    return assumptions
