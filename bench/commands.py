"""`cascade bench`: speed, always beside what it is compared with, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer
from rich.console import Console

from bench.attribution import AttributionReport, attribution_errors, show_attribution
from bench.cluster import write_json
from bench.deep_calls import ROWS, checked_sizes, configured, embedded, run_deep_calls, show_deep_calls
from bench.embedded import fresh_directory
from bench.features import run_features, show_features
from bench.ledger_cost import run_ledger_cost, show_ledger_cost
from bench.pipeline.page import check_plots, make_page
from bench.pipeline.report import show as show_pipeline
from bench.pipeline.run import run_pipeline
from bench.pipeline.scenario import load_scenario
from bench.screener import run_screener, show
from bench.smoke import run_smoke, show_smoke
from bench.stages import run_stages, show_stages
from cascade.bundle import SHIPPED_BUNDLE
from cascade.config import DeepSettings, EnergySettings, load_config
from cascade.errors import CascadeError
from cascade.ledger.deep_cost import Backend, Precision
from stages.deep.in_process import Device

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True,
    help="Speed, always beside what it is compared with, in one run.",
)  # fmt: skip


@app.command()
def screener(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which the methods take turns.")] = 9,
    seed: Annotated[int, typer.Option(help="Of data and models.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """The compiled screener against LightGBM, its single-row call, and what else is installed."""
    report = run_screener(rounds, seed)
    if json is not None:
        write_json(json, report)
    show(report, Console())


@app.command()
def pipeline(
    scenario: Annotated[str, typer.Option(help="A shipped scenario by name, or a TOML file.")] = "pipeline",
    compare: Annotated[
        list[str] | None, typer.Option(help="Only these variants, the first as the reference; once for each.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the scenario's.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/pipeline"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as one self-contained page.")] = None,
) -> None:
    """Whole services side by side: throughput, latency and CPU time, from topic to topic, by turns."""
    wanted = load_scenario(scenario)
    if compare:
        wanted = wanted.only(compare)
    if rounds is not None:
        wanted = msgspec.structs.replace(wanted, rounds=rounds)
    if html is not None:
        check_plots()
    report = run_pipeline(wanted, out)
    if json is not None:
        write_json(json, report)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(make_page(report), encoding="utf-8")
    show_pipeline(report, Console())


@app.command()
def stages(
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Transactions of a micro-batch.")] = 1_000,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which the two ways take turns.")] = 15,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Each stage by itself, beside the plain way to do the same."""
    report = run_stages(batch, rounds, seed)
    if json is not None:
        write_json(json, report)
    show_stages(report, Console())


@app.command()
def features(
    cards: Annotated[list[int] | None, typer.Option(min=16, help="Numbers of cards; once for each.")] = None,
    events: Annotated[int, typer.Option(min=1, max=100, help="Events of each card and of each terminal.")] = 10,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which the sizes take turns.")] = 9,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """The feature kernel at more and more cards: time a transaction, memory a card."""
    report = run_features(cards or [1_000, 100_000, 1_000_000], events, rounds, seed)
    if json is not None:
        write_json(json, report)
    show_features(report, Console())


@app.command()
def attribution(
    seed: Annotated[int, typer.Option(help="Of the simulated devices.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the errors to this file.")] = None,
) -> None:
    """How well joules of MIG slices are attributed, on synthetic devices whose truth is known."""
    errors = attribution_errors(seed)
    if json is not None:
        write_json(json, AttributionReport(errors=errors, seed=seed))
    show_attribution(errors, Console())


@app.command("deep-calls")
def deep_calls(
    config: Annotated[
        Path | None,
        typer.Option(help="Measure the deep model that a service of this configuration calls, on this machine."),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Without --config: a bundle instead of the shipped one.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Without --config: triton (an embedded one, the default) or onnxruntime.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --backend onnxruntime: cpu (the default) or cuda.")] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32 (the default) or, on a GPU, fp16; once for each, by turns."),
    ] = None,
    watts: Annotated[
        float | None, typer.Option("--watts-per-core", min=0.001, max=1_000, help="Without --config: of a busy core.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Transactions of a call; once for each.")] = None,
    rounds: Annotated[int, typer.Option(min=5, max=1_000, help="Rounds in which the sizes take turns.")] = 15,
    seconds: Annotated[
        float | None, typer.Option(min=0.2, max=600, help="Of each turn; 2, with a GPU 5 or more.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/deep-calls"),
    json: Annotated[
        Path | None, typer.Option(help="Write the cost here, for --deep-cost; GPUs' counters beside it.")
    ] = None,
) -> None:
    """What a deep call costs by its rows, in CPU time and joules, idle apart: what deep-only is computed from."""
    sizes = checked_sizes(rows or ROWS, rounds)
    if config is not None:
        alone = {
            "--bundle": bundle, "--backend": backend, "--device": device, "--precision": precision,
            "--watts-per-core": watts,
        }  # fmt: skip
        if given := [name for name, value in alone.items() if value is not None]:
            raise CascadeError(f"{', '.join(given)} beside --config: the configuration says it; leave one of them out")
        report = run_deep_calls(configured(load_config(config)), sizes, rounds, seconds, seed)
    else:
        wanted = EnergySettings().watts_per_core if watts is None else watts
        deep = DeepSettings(backend=_one_of("backend", backend, Backend), device=_one_of("device", device, Device))
        precisions = [_one_of("precision", one, Precision) for one in precision or ["fp32"]]
        with embedded(bundle or SHIPPED_BUNDLE, deep, precisions, wanted, fresh_directory(out)) as served:
            report = run_deep_calls(served, sizes, rounds, seconds, seed)
    show_deep_calls(report, Console())
    if json is None:
        return
    for cost in report.costs:
        write_json(json if cost.precision == "fp32" else json.with_suffix(f".{cost.precision}.json"), cost)
    if report.trace:
        json.with_suffix(".nvml.json").write_bytes(msgspec.json.encode(report.trace) + b"\n")
        json.with_suffix(".turns.json").write_bytes(msgspec.json.encode(report.turns) + b"\n")


def _one_of(option: str, text: str | None, choices: Any) -> Any:
    """The text, or the first choice where it is None; raises CascadeError where it is none of the choices."""
    known = get_args(choices)
    if text is None or text in known:
        return text or known[0]
    raise CascadeError(f"--{option} {text}: use {' or '.join(known)}")


@app.command()
def ledger(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds by turns.")] = 9,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """What the ledger costs a micro-batch, beside what the worker does with it, and what it costs each second."""
    report = run_ledger_cost(rounds, seed)
    if json is not None:
        write_json(json, report)
    show_ledger_cost(report, Console())


@app.command()
def smoke(
    seed: Annotated[int, typer.Option(help="Of the data.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/smoke"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Ratios against references of the same run; fails where one fell by more than 30 % since the baseline."""
    report = run_smoke(out, seed)
    if json is not None:
        write_json(json, report)
    show_smoke(report, Console())
    if report.fallen:
        raise CascadeError(f"fell by more than 30 %: {', '.join(report.fallen)}")
