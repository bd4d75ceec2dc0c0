"""`cascade mig plan`, `check` and `autoscale`: what layouts of slices do under a load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console

from cascade.errors import DataError, SettingError
from cascade.ledger.journal import read_journal
from cascade.mig.arrivals import Bursts
from cascade.mig.autoscale import Crowd, Replicas, day_rates, rules, show_days, simulate_day
from cascade.mig.checks import ERROR_MAX, RATES, run_checks, show_checks
from cascade.mig.demand import RESERVE, Demand, ModelEntry, journal_rates, read_models
from cascade.mig.evaluation import Evaluation
from cascade.mig.gpus import GPUS, Gpu, find_gpu
from cascade.mig.packing import GPUS_MAX
from cascade.mig.plan_files import indented_json, plan_picture, write_plan
from cascade.mig.plan_report import make_plan, show_plan
from cascade.mig.queueing import Batching
from cascade.mig.service_time import ServiceTimes, read_measured
from cascade.mig.worker_day import show_worker_days, simulate_worker_day, worker_behaviors
from cascade.setting_files import convert_settings

_WHERE: Final = "command line"
# Parameters of `plan` that have no effect with a journal, and further ones that have none with a plan file.
_FROM_JOURNAL: Final = ("mean_rate", "escalated", "rows_per_call")
_OF_ONE_MODEL: Final = ("reserve", "p99", "memory_gb", "burst_factor", "burst_share", "burst_s", "measured")
_IDLE_HELP: Final = "Watts of a whole GPU with its slices made and nothing running; default: the table's."

GpuName = Annotated[str, typer.Option("--gpu", help=f"Model of the GPUs: {', '.join(GPUS)}.")]
Measured = Annotated[
    list[str] | None,
    typer.Option(
        help="PROFILE=FILE of `cascade bench deep-calls --json`, or GPU=FILE for a whole GPU; repeat for several."
    ),
]
BurstFactor = Annotated[
    float, typer.Option(min=1.0, max=1_000.0, help="Rate in a burst ÷ rate between two bursts; 1: no bursts.")
]
BurstShare = Annotated[float, typer.Option(min=0.001, max=0.9, help="Share of the time that is in bursts.")]
BurstSeconds = Annotated[float, typer.Option("--burst-s", min=0.001, max=86_400.0, help="Mean length of a burst.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


def plan(
    context: typer.Context,
    gpu: GpuName,
    gpus: Annotated[int, typer.Option(min=1, max=GPUS_MAX, help="GPUs that the plan may use.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Transactions a second at the peak.")] = None,
    mean_rate: Annotated[
        float | None, typer.Option(help="The same in the mean, for the joules; default: rate.")
    ] = None,
    reserve: Annotated[float, typer.Option(help="p99 must hold up to this multiple of the peak.")] = RESERVE,
    escalated: Annotated[float, typer.Option(help="Share of them that the deep model gets.")] = 0.01,
    p99: Annotated[str, typer.Option(help="Limit of a deep call's p99 at the server: 20ms.")] = "20ms",
    rows_per_call: Annotated[float, typer.Option(help="Transactions in a deep call, mean.")] = 1.0,
    memory_gb: Annotated[float, typer.Option(help="GPU memory of one instance of the model, GB.")] = 2.0,
    burst_factor: BurstFactor = 1.0,
    burst_share: BurstShare = 0.05,
    burst_s: BurstSeconds = 1.0,
    journal: Annotated[
        list[Path] | None,
        typer.Option(
            help="Take rates and rows from journals of a service: its busiest interval is the peak.", exists=True
        ),
    ] = None,
    interval_s: Annotated[float, typer.Option(min=1.0, max=86_400.0, help="Interval of its rates, seconds.")] = 60.0,
    models: Annotated[
        Path | None, typer.Option(help="TOML file with [[models]], in place of the options about one model.")
    ] = None,
    measured: Measured = None,
    idle_w: Annotated[float | None, typer.Option(min=1.0, max=2_000.0, help=_IDLE_HELP)] = None,
    batch_delay_us: Annotated[int, typer.Option(min=0, max=1_000_000, help="Triton's max_queue_delay.")] = 200,
    layouts: Annotated[int, typer.Option(min=1, max=100, help="Layouts to print.")] = 6,
    simulate: Annotated[
        int, typer.Option(min=0, max=10_000_000, help="Calls to simulate as a check; 0: none.")
    ] = 20_000,
    seed: Seed = 1,
    json: JsonFile = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the first layout.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write plan.json, plan.svg, the GPUs' configuration and the overlay of k8s/ there."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=16, help="GPUs of a node, for the configuration.")] = 8,
    base: Annotated[Path, typer.Option(help="Where k8s/base is, for the overlay.")] = Path("k8s/base"),
) -> None:
    """Plan slices for deep calls: the layouts with the fewest joules a call that keep p99.

    Exit status 1 with the limit that is in the way if there is no such layout.
    """
    options = {"rate": rate, "journal": journal or None, "models": models}
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise DataError(f"{' and '.join(given) or 'no rate'}: give one of --rate, --journal and --models")
    if out is not None and not (base / "kustomization.yaml").is_file():
        raise DataError(f"--base {base}: no kustomization.yaml there; give the path of k8s/base")
    model = _gpu(gpu, idle_w)
    batching = Batching(delay_s=batch_delay_us / 1e6)
    if models is not None:
        _refuse(context, (*_FROM_JOURNAL, *_OF_ONE_MODEL), f"belongs to a model in {models}")
        evaluations = [_evaluation(model, entry, str(models), batching, seed) for entry in read_models(models)]
    else:
        stated = {
            "rate": rate,
            "mean_rate": mean_rate,
            "reserve": reserve,
            "escalated": escalated,
            "p99": p99,
            "rows_per_call": rows_per_call,
            "memory_gb": memory_gb,
        }
        if journal:
            _refuse(context, _FROM_JOURNAL, "comes from the journal")
            stated |= _journal_rates(journal, interval_s)
        demand = _demand(stated, _bursts(burst_factor, burst_share, burst_s))
        times = ServiceTimes(model, read_measured(measured or []))
        evaluations = [Evaluation(demand, times, batching, seed)]
    result = make_plan(model, gpus, evaluations, layouts, simulate, seed)
    # before the tables: a pipe that closes early ends the command
    _write_json(json, result)
    with _written():
        if svg is not None:
            svg.write_text(plan_picture(result, model))
        commands = [] if out is None else write_plan(out, result, model, gpus_per_node, base)
    console = Console()
    show_plan(result, model, console)
    if out is not None:
        console.print(f"\n {out}: plan, picture, configuration of the GPUs, overlay. With the GPU operator:\n")
        console.print("\n".join(commands), highlight=False, soft_wrap=True)


def _refuse(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Raises DataError if the command line has one of these parameters of the command, which would have no effect."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise DataError(f"--{name.replace('_', '-')}: {reason}; leave the option out")


def _journal_rates(journal: Sequence[Path], interval_s: float) -> dict[str, float]:
    """Prints the deep calls of a journal. Returns their rates as options: each row counts as escalated."""
    found = journal_rates(read_journal(journal), interval_s)
    typer.echo(
        f"journal: {found.intervals:,} intervals of {found.interval_s:g} s, {found.calls_per_s_mean:,.4g} deep"
        f" calls/s, busiest {found.calls_per_s_max:,.4g}, {found.escalated_share:.2%} escalated"
    )
    rows = found.rows_per_call
    rates = {"rate": found.calls_per_s_max * rows, "mean_rate": found.calls_per_s_mean * rows}
    return rates | {"escalated": 1.0, "rows_per_call": rows}


@contextmanager
def _written() -> Iterator[None]:
    """Names the file of an OSError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be written ({error.strerror})") from error


def _write_json(file: Path | None, figures: object) -> None:
    if file is not None:
        with _written():
            file.write_bytes(indented_json(figures))


def _gpu(key: str, idle_w: float | None) -> Gpu:
    gpu = find_gpu(key)
    if idle_w is None:
        return gpu
    others = tuple(text for text in gpu.assumptions if not text.startswith("idle"))
    return msgspec.structs.replace(gpu, idle_w=idle_w, assumptions=(f"idle {idle_w:g} W: as stated", *others))


def _bursts(factor: float, share: float, mean_s: float) -> Bursts | None:
    return Bursts(factor=factor, share=share, mean_s=mean_s) if factor > 1.0 else None


def _demand(stated: dict[str, Any], bursts: Bursts | None = None) -> Demand:
    """The demand of the options about one model. Raises SettingError, which names the option."""
    try:
        entry = convert_settings(stated, ModelEntry, _WHERE, "see --help")
        return msgspec.structs.replace(entry, bursts=bursts).demand(_WHERE)
    except SettingError as error:
        option = f"--{error.key.replace('_', '-')}"
        raise SettingError(_WHERE, option, error.value, error.problem, error.remedy) from error


def _evaluation(gpu: Gpu, entry: ModelEntry, origin: str, batching: Batching, seed: int) -> Evaluation:
    demand = entry.demand(f"{origin}, model {entry.name}")
    files = [f"{name}={file}" for name, file in entry.measured.items()]
    return Evaluation(demand, ServiceTimes(gpu, read_measured(files)), batching, seed)


def check(
    gpu: GpuName = "a100-40gb",
    measured: Measured = None,
    calls: Annotated[int, typer.Option(min=1_000, max=10_000_000, help="Calls to simulate in each case.")] = 60_000,
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="Clients that take the replicas in turn.")] = 4,
    burst_factor: BurstFactor = 1.0,
    burst_share: BurstShare = 0.05,
    burst_s: BurstSeconds = 1.0,
    seed: Seed = 1,
    json: JsonFile = None,
) -> None:
    """Compare the planner's model with a simulation: five rates, four layouts of one GPU.

    Exit status 1 if an error at p99 is above 10 %. A rate that a layout cannot carry is left out.
    """
    model = find_gpu(gpu)
    times = ServiceTimes(model, read_measured(measured or []))
    bursts = _bursts(burst_factor, burst_share, burst_s)
    found = run_checks(model, times, RATES, calls, clients, bursts, seed)
    _write_json(json, found)
    show_checks(found, Console())
    if found.error_max > ERROR_MAX:
        raise typer.Exit(1)


def autoscale(
    gpu: GpuName,
    rate: Annotated[float, typer.Option(help="Transactions a second in the busiest hour, without the crowd.")],
    profile: Annotated[str | None, typer.Option(help="Slice of each Triton; default: the smallest.")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=GPUS_MAX, help="GPUs whose slices Triton may use.")] = 1,
    escalated: Annotated[float, typer.Option(help="Share of transactions that the deep model gets.")] = 0.01,
    p99: Annotated[str, typer.Option(help="Limit of a deep call's p99 at the server: 20ms.")] = "20ms",
    rows_per_call: Annotated[float, typer.Option(help="Transactions in a deep call, mean.")] = 1.0,
    crowd: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="Flash crowd: multiple of the curve; 1: none.")
    ] = 3.0,
    crowd_hour: Annotated[float, typer.Option(min=0.0, max=23.0, help="Hour at which it begins.")] = 18.0,
    crowd_minutes: Annotated[float, typer.Option(min=1.0, max=45.0, help="How long it lasts.")] = 15.0,
    least: Annotated[int, typer.Option(min=1, max=100, help="Replicas that always run.")] = 2,
    start_s: Annotated[float, typer.Option(min=0.0, max=600.0, help="Until a new pod serves calls, seconds.")] = 30.0,
    partitions: Annotated[int, typer.Option(min=1, max=100_000, help="Of the topic: the most workers.")] = 12,
    least_workers: Annotated[int, typer.Option(min=1, max=100_000, help="Workers that always run.")] = 3,
    worker_rate: Annotated[float, typer.Option(min=1.0, max=1e9, help="Transactions a second of a worker.")] = 20_000.0,
    measured: Measured = None,
    idle_w: Annotated[float | None, typer.Option(min=1.0, max=2_000.0, help=_IDLE_HELP)] = None,
    seed: Seed = 1,
    json: JsonFile = None,
) -> None:
    """Simulate a day with a flash crowd under the autoscaler's rules, beside static provisioning.

    The curve of the day is assumed. Triton scales on calls that wait and calls in flight, up to the slices there are;
    workers on lag and busy cores, up to the partitions.
    """
    model = _gpu(gpu, idle_w)
    slice_profile = model.profile(profile) if profile else model.profiles[0]
    stated = {"rate": rate, "escalated": escalated, "p99": p99, "rows_per_call": rows_per_call}
    demand = _demand(stated)
    evaluation = Evaluation(demand, ServiceTimes(model, read_measured(measured or [])), Batching(), seed)
    replicas = Replicas(model, slice_profile, evaluation)
    if not replicas.rate_max:
        raise DataError(f"--p99 {p99}: a {slice_profile.name} keeps it at no rate; `cascade mig plan` shows which does")
    slices = gpus * slice_profile.count_max
    if least > slices:
        raise DataError(f"--least {least}: {gpus} × {model.key} have {slices} slices {slice_profile.name}; lower it")
    if least_workers > partitions:
        raise DataError(f"--least-workers {least_workers}: more than the {partitions} partitions; lower it")
    flash = Crowd(factor=crowd, start_h=crowd_hour, minutes=crowd_minutes) if crowd > 1.0 else None
    rates = day_rates(demand.calls_per_s, flash)
    chosen = rules(replicas, slices, least, float(rates.max()))
    days = [simulate_day(model, slice_profile, replicas, rates, rule, start_s) for rule in chosen]
    transactions = rates * (rate / demand.calls_per_s)
    behaviors = worker_behaviors(partitions, least_workers, float(transactions.max()), worker_rate)
    worker_days = [
        simulate_worker_day(transactions, worker_rate, name, behavior, start_s) for name, behavior in behaviors.items()
    ]
    _write_json(json, {"triton": days, "workers": worker_days})
    console = Console()
    show_days(days, model, slice_profile, replicas, float(rates.max()), console)
    show_worker_days(worker_days, partitions, worker_rate, console)
