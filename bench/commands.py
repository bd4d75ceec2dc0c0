"""`cascade bench`: measurements, each beside a reference in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer
from rich.console import Console

from bench.ablation import PARTS, run_ablation, show_ablation
from bench.attribution import AttributionReport, attribution_errors, show_attribution
from bench.certificate import run_certificate, show_certificate_report
from bench.clients import run_clients, show_clients
from bench.cluster import write_json
from bench.deep_calls import ROWS, checked_sizes, configured, embedded, run_deep_calls, show_deep_calls
from bench.deep_latency import RATES as DEEP_RATES
from bench.deep_latency import run_deep_latency, show_deep_latency
from bench.echo.report import show as show_echo
from bench.echo.run import run_echo
from bench.echo.variants import RATES, Delivery, EchoRun, variants_of
from bench.embedded import fresh_directory
from bench.escalation import run_escalation, show_escalation
from bench.features import run_features, show_features
from bench.ledger_cost import run_ledger_cost, show_ledger_cost
from bench.pipeline.page import check_plots, make_page
from bench.pipeline.report import show as show_pipeline
from bench.pipeline.run import run_pipeline
from bench.pipeline.scenario import load_scenario
from bench.screener import run_screener, show
from bench.smoke import run_smoke, show_smoke
from bench.stages import run_stages, show_stages
from bench.tables import publish
from cascade.bundle import SHIPPED_BUNDLE
from cascade.config import DeepSettings, EnergySettings, load_config, with_config_path
from cascade.errors import CascadeError
from cascade.ledger.deep_cost import Precision
from cascade.plugins import CLIENTS, DEEP_STAGES
from cascade.progress import Steps
from stages.commands import SCHEMAS, training_installed
from stages.deep.in_process import Device
from stages.settings import Size, load_training_file
from stages.training import TrainingSettings

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure the service and its parts, each beside a reference in the same run.",
)
Seed = Annotated[int, typer.Option(help="Seed of the data.")]
Report = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")]


@app.command()
def screener(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which the methods take turns.")] = 9,
    seed: Seed = 1,
    json: Report = None,
) -> None:
    """Compare the compiled screener with LightGBM.

    Also with LightGBM's single-row call, ONNX Runtime, and tl2cgen and lleaves where they are installed.
    """
    publish(run_screener(rounds, seed), show, json)


@app.command()
def escalation(seed: Seed = 1, json: Report = None) -> None:
    """Show that the escalation budget holds, and what is lost against the best possible choice.

    On streams with drift, bursts, campaigns and a day's curve, and with the shipped models from a cold state on.
    """
    publish(run_escalation(seed), show_escalation, json)


@app.command()
def certificate(
    samples: Annotated[int, typer.Option(min=10, help="Samples of each world.")] = 200,
    seed: Seed = 1,
    json: Report = None,
) -> None:
    """Count how often the bounds of `cascade certify` fail in worlds whose truth is known, and what its watch finds."""
    with Steps() as progress:
        report = run_certificate(samples, seed, progress)
    publish(report, show_certificate_report, json)


@app.command()
def pipeline(
    scenario: Annotated[str, typer.Option(help="A shipped scenario by name, or a TOML file.")] = "pipeline",
    compare: Annotated[
        list[str] | None, typer.Option(help="A variant to run, instead of all; repeatable, the first is the reference.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; the scenario's by default.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/pipeline"),
    json: Report = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one self-contained page.")] = None,
) -> None:
    """Compare whole services, from topic to topic.

    Throughput, latency and CPU time of Cascade's variants and of other applications, which take turns on one machine.
    """
    chosen = load_scenario(scenario)
    if compare:
        chosen = chosen.only(compare)
    if rounds is not None:
        chosen = msgspec.structs.replace(chosen, rounds=rounds)
    if html is not None:
        check_plots()
    report = run_pipeline(chosen, out)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(make_page(report), encoding="utf-8")
    publish(report, show_pipeline, json)


@app.command()
def echo(
    rate: Annotated[
        list[float] | None,
        typer.Option(min=1.0, max=100_000.0, help="Transactions a second; repeatable, 100 to 10,000 by default."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, max=600.0, help="Length of a turn's load.")] = 15.0,
    warm_up: Annotated[float, typer.Option(min=0.0, max=600.0, help="Seconds of load before, not counted.")] = 10.0,
    idle_seconds: Annotated[
        float, typer.Option(min=0.0, max=600.0, help="Time without traffic, after the lowest rate; 0: none.")
    ] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds in which the variants take turns.")] = 3,
    backend: Annotated[
        list[str] | None, typer.Option(help="onnxruntime (in process, the default) or triton; repeatable.")
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="librdkafka (the default) or kafka-python; repeatable.")
    ] = None,
    delivery: Annotated[
        list[str] | None, typer.Option(help="at-least-once (the default) or exactly-once; repeatable.")
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another checkout of the project, whose service takes turns; repeatable.")
    ] = None,
    escalation_share: Annotated[float, typer.Option(min=0.0001, max=0.5, help="Share to escalate.")] = 0.01,
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/echo"),
    json: Report = None,
) -> None:
    """Compare the service with what Kafka itself costs.

    The echo polls one message, produces one message, and does nothing else. At each rate it takes turns with the
    service: CPU time, context switches and latency, and each as a ratio to the echo's.
    """
    variants = variants_of(
        against or [],
        [_choice("client", text, list(CLIENTS.own)) for text in client or ["librdkafka"]],
        [_choice("backend", text, list(DEEP_STAGES.own)) for text in backend or ["onnxruntime"]],
        [_choice("delivery", text, Delivery) for text in delivery or ["at-least-once"]],
    )
    run = EchoRun(
        variants=variants,
        rates=rate or list(RATES),
        seconds=seconds,
        warm_up_s=warm_up,
        idle_s=idle_seconds,
        rounds=rounds,
        escalation_share=escalation_share,
        seed=seed,
    )
    publish(run_echo(run, out), show_echo, json)


@app.command()
def stages(
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Transactions of a micro-batch.")] = 1_000,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which stage and plain code take turns.")] = 15,
    seed: Seed = 1,
    json: Report = None,
) -> None:
    """Compare each stage with plain Python code."""
    publish(run_stages(batch, rounds, seed), show_stages, json)


@app.command()
def clients(
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds in which the clients take turns.")] = 5,
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/clients"),
    json: Report = None,
) -> None:
    """Compare the client on librdkafka's C API with its Python binding.

    CPU time to poll and to send a record: one at a time, in batches, and at 1,000 records a second.
    """
    publish(run_clients(rounds, seed, out), show_clients, json)


@app.command()
def features(
    cards: Annotated[list[int] | None, typer.Option(min=16, help="A number of cards; repeatable.")] = None,
    events: Annotated[int, typer.Option(min=1, max=100, help="Events of each card and of each terminal.")] = 10,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which the sizes take turns.")] = 9,
    seed: Seed = 1,
    json: Report = None,
) -> None:
    """Measure the feature kernel by number of cards.

    Time for a transaction and memory for a card; by default 1,000, 100,000 and 1,000,000 cards. Then the same with
    longer sequences and with two, at the middle number of cards.
    """
    publish(run_features(cards or [1_000, 100_000, 1_000_000], events, rounds, seed), show_features, json)


@app.command()
def attribution(seed: Seed = 1, json: Report = None) -> None:
    """Compare methods that attribute joules to MIG slices.

    On synthetic devices, whose true joules are known.
    """
    publish(AttributionReport(errors=attribution_errors(seed), seed=seed), show_attribution, json)


@app.command("deep-calls")
def deep_calls(
    config: Annotated[
        Path | None,
        typer.Option(help="Measure the deep model of this configuration; it must run on this machine."),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Without --config: this bundle, not the shipped bundle.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Without --config: triton (embedded, the default) or onnxruntime.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --backend onnxruntime: cpu (the default) or cuda.")] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 (the default) or, on a GPU, fp16; repeatable.")
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option("--watts-per-core", min=0.001, max=1_000, help="Without --config: watts of a busy core."),
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Transactions of a call; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=5, max=1_000, help="Rounds in which the sizes take turns.")] = 15,
    seconds: Annotated[
        float | None, typer.Option(min=0.2, max=600, help="Length of a turn; 2 by default, with a GPU 5 or more.")
    ] = None,
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/deep-calls"),
    json: Annotated[
        Path | None, typer.Option(help="Write the cost to this file, for --deep-cost, and GPU counters beside it.")
    ] = None,
) -> None:
    """Measure what a call to the deep model costs.

    CPU time and joules by the number of rows, without idle. `--deep-cost` of the ledger computes deep-only from it.
    """
    sizes = checked_sizes(rows or ROWS, rounds)
    if config is not None:
        excluded = {"bundle": bundle, "backend": backend, "device": device, "precision": precision}
        given = [f"--{name}" for name, value in {**excluded, "watts-per-core": watts}.items() if value is not None]
        if given:
            raise CascadeError(f"{', '.join(given)} beside --config: the configuration has it; leave one of them out")
        with Steps() as progress:
            report = run_deep_calls(configured(load_config(config)), sizes, rounds, seconds, seed, progress)
    else:
        busy_w = EnergySettings().watts_per_core if watts is None else watts
        name = _choice("backend", backend, list(DEEP_STAGES.own))
        deep = DeepSettings(backend=name, device=_choice("device", device, Device))
        precisions = [_choice("precision", text, Precision) for text in precision or ["fp32"]]
        served_model = embedded(bundle or SHIPPED_BUNDLE, deep, precisions, busy_w, fresh_directory(out))
        with served_model as served, Steps() as progress:
            report = run_deep_calls(served, sizes, rounds, seconds, seed, progress)
    show_deep_calls(report, Console())
    if json is None:
        return
    for cost in report.costs:
        write_json(json if cost.precision == "fp32" else json.with_suffix(f".{cost.precision}.json"), cost)
    if report.trace:
        json.with_suffix(".nvml.json").write_bytes(msgspec.json.encode(report.trace) + b"\n")
        json.with_suffix(".turns.json").write_bytes(msgspec.json.encode(report.turns) + b"\n")


def _choice(option: str, text: str | None, choices: Any) -> Any:
    """The text, or the first of `choices` (a list or a Literal) where it is None; raises CascadeError for others."""
    known = choices if isinstance(choices, list) else get_args(choices)
    if text is None or text in known:
        return text or known[0]
    raise CascadeError(f"--{option} {text}: use {' or '.join(known)}")


@app.command("deep-latency")
def deep_latency(
    rate: Annotated[list[float] | None, typer.Option(min=1, max=1_000, help="Calls a second; repeatable.")] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle with the deep model.")] = SHIPPED_BUNDLE,
    rounds: Annotated[int, typer.Option(min=1, max=1_000, help="Rounds in which the peers take turns.")] = 12,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Length of a turn.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/deep-latency"),
    json: Report = None,
) -> None:
    """Measure how long a deep call takes beside what Triton needs for it.

    The deep stage beside NVIDIA's clients and the stage in process: latency, CPU time and context switches of a call,
    and of a second without calls.
    """
    report = run_deep_latency(bundle, rate or DEEP_RATES, rounds, seconds, fresh_directory(out))
    publish(report, show_deep_latency, json)


@app.command()
def ledger(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which ledger and work take turns.")] = 9,
    seed: Seed = 1,
    json: Report = None,
) -> None:
    """Measure what the ledger costs.

    CPU time for a micro-batch, beside that of the worker's own work, and for what it does every second.
    """
    publish(run_ledger_cost(rounds, seed), show_ledger_cost, json)


@app.command()
def smoke(
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/smoke"),
    json: Report = None,
) -> None:
    """Compare the speed with the shipped baseline.

    Fails where the ratio to a reference of the same run is more than 30 % below its baseline; takes two minutes.
    """
    report = run_smoke(out, seed)
    publish(report, show_smoke, json)
    if report.fallen:
        raise CascadeError(f"more than 30 % below the baseline: {', '.join(report.fallen)}")


@app.command()
def ablation(
    data: Annotated[list[Path], typer.Option(help="Labelled transactions, Parquet or CSV; repeatable.")],
    schema: Annotated[Path, typer.Option(help="Schema file.", show_default="shipped")] = SCHEMAS / "simulator.toml",
    features: Annotated[Path, typer.Option(help="Feature file.", show_default="shipped")] = SCHEMAS
    / "simulator-features.toml",
    training: Annotated[Path, typer.Option(help="Training file.", show_default="shipped")] = SCHEMAS
    / "simulator-training.toml",
    size: Annotated[str, typer.Option(help="small or large: the deep model.")] = "large",
    without: Annotated[
        list[str] | None,
        typer.Option(help="nothing, order, time, terminal, card or features; repeatable, all by default."),
    ] = None,
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="Directory for checkpoints; a run goes on from them.")] = Path(
        "build/ablation"
    ),
    json: Report = None,
) -> None:
    """Train the deep model without a part of its inputs: what each brings, and what all bring beyond the screener."""
    parts = [_choice("without", part, list(PARTS)) for part in without or PARTS]
    parts = ["nothing", *(part for part in parts if part != "nothing")]
    settings = TrainingSettings(seed=seed, file=load_training_file(training))
    with Steps() as progress, with_config_path(training), training_installed():
        report = run_ablation(data, schema, features, settings, _choice("size", size, Size), parts, out, progress)
    publish(report, show_ablation, json)
