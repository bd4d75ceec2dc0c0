"""Commands of the service: `run`, `compile`, `topics`.

A worker's start waits for every import here; what works on data files is in `streaming.data_commands`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from cascade.compilation import cache_directory, compilations
from cascade.config import check_instance, load_config, with_config_path
from cascade.ledger import render
from streaming.kafka import describe_topics, ensure_topics
from streaming.kafka.topics import wait_for_broker
from streaming.service.kernel_compilation import compile_every_kernel
from streaming.service.serve import serve
from streaming.service.standby import stand_by
from streaming.service.supervisor import supervise
from streaming.service.topics import differences, topic_specs
from streaming.service.worker_memory import WorkerMemory
from streaming.service.worker_report import WorkerSlot, settings_in

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
ConfigOption = Annotated[Path, typer.Option(help="Configuration file; docs/cascade.example.toml shows every key.")]
CreateTopicsOption = Annotated[
    int, typer.Option(min=0, help="Create missing topics with this many partitions; 0: create none.")
]
BROKER_WAIT_S = 30.0


@app.command()
def run(
    config: ConfigOption = Path("cascade.toml"),
    create_topics: CreateTopicsOption = 0,
    ledger: Annotated[Path | None, typer.Option(help="Also write the ledger to this file, as a JSON line.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the ledger as a JSON line instead of tables.")] = False,
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
    worker_memory: Annotated[int | None, typer.Option(hidden=True)] = None,
    standby_memory: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run the service: read transactions and labels, write decisions and dead letters, until SIGTERM.

    At SIGTERM or Ctrl-C it decides and commits the transactions in flight, and prints the ledger. A second signal ends
    it at once: no transaction is lost, but some are decided again, with the same decision id. If `worker.processes` is
    above 1, it starts that many workers; health, metrics and ledger cover all of them.
    """
    if standby_memory:
        own, *of_workers = map(WorkerMemory, map(int, standby_memory.split(",")))
        stand_by(own, of_workers)
        return
    if worker is not None and worker_memory is not None:
        own_settings = settings_in(os.environ, worker)
        serve(own_settings, slot=WorkerSlot(worker, WorkerMemory(worker_memory)))
        return
    settings = load_config(config)
    with with_config_path(config):
        check_instance(settings.kafka)
        several = settings.worker.processes > 1
        summary = supervise(settings, create_topics) if several else serve(settings, create_topics)
    line = summary.to_json_line()
    if ledger is not None:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        ledger.write_bytes(line + b"\n")
    if json:
        print(line.decode())
    else:
        render(summary, Console())


@app.command(name="compile")
def compile_command(
    json: Annotated[bool, typer.Option("--json", help="Print directory, number of compilations and seconds.")] = False,
) -> None:
    """Compile the kernels ahead of a worker's first start, for any bundle and codec, as an image does at its build.

    They go into `NUMBA_CACHE_DIR`, else beside the installed code. Where both are read-only, a worker copies them to
    the user's cache directory. numba compiles for this machine's processor: `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES`
    name another one, and must be the same at a worker's start.
    """
    started_s = time.monotonic()
    compile_every_kernel()
    seconds = time.monotonic() - started_s
    directory = cache_directory()
    if json:
        counts = {"directory": directory and str(directory), "compiled": compilations(), "seconds": round(seconds, 1)}
        print(msgspec.json.encode(counts).decode())
        return
    typer.echo(f"{directory or 'no cache'}: {compilations()} kernels compiled, the others were there ({seconds:.0f} s)")


@app.command()
def topics(
    partitions: Annotated[
        int, typer.Option(min=1, max=10_000, help="Partitions of transactions, decisions and terminal summaries.")
    ],
    config: ConfigOption = Path("cascade.toml"),
    replication: Annotated[
        int, typer.Option(min=-1, max=32_767, help="Copies of each record; -1: the broker's default.")
    ] = -1,
    wait: Annotated[float, typer.Option(min=0.0, max=86_400.0, help="Seconds to wait for the broker.")] = BROKER_WAIT_S,
) -> None:
    """Create the topics of a configuration, with their settings; do nothing to those that are there.

    A topic that is there and differs is reported with the remedy. Exit status: 0 if every topic is there now, also if
    some differ, since the service runs with them; 1 if the broker does not answer or refuses to create a topic.
    """
    settings = load_config(config)
    specs = topic_specs(settings, partitions, replication)
    wait_for_broker(settings.kafka, wait, lambda text: typer.echo(text, err=True))
    created = ensure_topics(settings.kafka, specs)
    found = describe_topics(settings.kafka, [spec.name for spec in specs])
    for spec in specs:
        count, copies = found[spec.name].partitions, found[spec.name].replication
        state = "created" if spec.name in created else "there"
        typer.echo(f"{spec.name}: {state}, {count} partition{'s' * (count > 1)}, replication factor {copies}")
    for line in differences(settings, specs, found):
        typer.echo(f"differs: {line}", err=True)
