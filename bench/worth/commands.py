"""`cascade worth`: does the deep stage pay, for one's own bundle and load."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgspec
import typer
from msgspec.structs import replace
from rich.console import Console

from bench.deep_calls import ROUNDS_MIN, ROWS, embedded, run_deep_calls
from bench.worth.report import Electricity, WorthReport, kind_worth
from bench.worth.shared_cost import by_default, of_ledger, read_ledger
from bench.worth.show import show_worth
from cascade.bundle import Bundle, load_bundle
from cascade.config import DeepSettings, EnergySettings
from cascade.errors import CascadeError, SettingError
from cascade.ledger import LedgerSummary
from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.errors import CounterfactualError
from cascade.plugins import DEEP_STAGES
from cascade.progress import Steps
from cascade.report.business import Assumptions
from stages.recalibration import Changes, read_report
from stages.validation import ValidationRows
from stages.worth import ways_to_decide

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DEFAULTS = Assumptions()
_SEED = 1


@app.command()
def worth(
    bundle: Annotated[Path, typer.Option(help="Bundle to judge.")],
    rate: Annotated[
        float | None, typer.Option(min=0.1, max=1e9, help="Transactions a second.", show_default="the ledger's")
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Your service's ledger, for what a transaction costs besides the deep model.", exists=True),
    ] = None,
    cost: Annotated[
        Path | None, typer.Option(help="File of `cascade bench deep-calls`, for Triton or a GPU; else measured here.")
    ] = None,
    review_capacity: Annotated[
        float | None, typer.Option(min=0.0, help="Most reviews on a mean day.", show_default="the bundle's")
    ] = None,
    price: Annotated[float, typer.Option(min=0.0, help="Price of a kWh.")] = DEFAULTS.price,
    currency: Annotated[str, typer.Option(help="Currency of the price and of the amounts.")] = DEFAULTS.currency,
    pue: Annotated[float, typer.Option(min=1.0, max=5.0, help="PUE of the data centre.")] = DEFAULTS.pue,
    seconds: Annotated[float, typer.Option(min=0.2, help="Without --cost: length of a turn of the measurement.")] = 0.3,
    json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON instead.")] = False,
) -> None:
    """Say whether the deep stage pays, and at which escalated share.

    Quality and cost of decisions come from the bundle's own validation rows, energy from measured deep calls. Each
    share is compared with the screener alone and with everything deep.
    """
    loaded = load_bundle(bundle)
    summary = None if ledger is None else read_ledger(ledger)
    if rate is None:
        rate = _ledger_rate(summary)
    deep_cost = _measured(loaded, summary, seconds) if cost is None else _read_cost(cost, loaded)
    screener_us = read_report(loaded).screener.us_per_row
    if summary is None or ledger is None:
        shared = by_default(deep_cost, rate, screener_us)
    else:
        shared = of_ledger(summary, deep_cost, ledger)
    costs = Changes(reviews_per_day_max=review_capacity).of_costs(loaded.policy.costs)
    rows = ValidationRows.from_parquet(loaded.content["validation.parquet"], str(bundle / "validation.parquet"))
    ways = ways_to_decide(rows, replace(loaded.policy, costs=costs), _SEED)
    electricity = Electricity(price, currency, pue)
    report = WorthReport(
        bundle=loaded.version,
        rate=rate,
        transactions=len(rows),
        frauds=int(rows.fraud.sum()),
        reviews_per_day_max=costs.reviews_per_day_max,
        electricity=electricity,
        ways=ways,
        kinds=tuple(kind_worth(kind, ways, shared, deep_cost, rate, electricity) for kind in shared.shared_mj),
        shared=shared,
        cost=deep_cost,
    )
    if json:
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        return
    show_worth(report, Console())


def _ledger_rate(summary: LedgerSummary | None) -> float:
    if summary is None or summary.per_second <= 0.0:
        remedy = "state your load, or name a ledger with decisions"
        raise SettingError("worth", "--rate", None, "is missing", remedy)
    return summary.per_second


def _measured(bundle: Bundle, summary: LedgerSummary | None, seconds: float) -> DeepCost:
    """The cost of deep calls of all sizes, measured on this machine with the ledger's backend, else in process."""
    backend, watts = "onnxruntime", EnergySettings().watts_per_core
    if summary is not None:
        backend, watts = summary.deep_backend, summary.watts_per_core or watts
        if backend not in DEEP_STAGES.own:
            raise CascadeError(f"the ledger's deep model ran on {backend or 'an unknown backend'}; measure it, --cost")
    deep = DeepSettings(backend=backend)
    with (
        TemporaryDirectory(prefix="cascade-worth-") as directory,
        embedded(bundle.directory, deep, ["fp32"], watts, Path(directory)) as served,
        Steps() as progress,
    ):
        return run_deep_calls(served, ROWS, ROUNDS_MIN, seconds, _SEED, progress).costs[0]


def _read_cost(path: Path, bundle: Bundle) -> DeepCost:
    """The cost in a file. Raises CounterfactualError if it is of another deep model."""
    cost = DeepCost.read(path)
    same = (
        cost.model_sha256 == hashlib.sha256(bundle.content["deep.onnx"]).hexdigest()
        if cost.precision == "fp32"
        else cost.bundle_version == bundle.version
    )
    if not same:
        raise CounterfactualError(
            f"{path}: of the deep model of bundle {cost.bundle_version}, not of {bundle.version}; run"
            " `cascade bench deep-calls --bundle` for it"
        )
    return cost
