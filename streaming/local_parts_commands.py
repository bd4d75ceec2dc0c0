"""`cascade local`: an embedded Kafka broker and an embedded Triton server, for work without Docker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cascade.local_parts import local_parts_dir
from stages.deep import local_triton
from stages.deep.local_triton import LocalTriton
from streaming.kafka import local_broker
from streaming.kafka.local_broker import LocalBroker
from streaming.service.kernel_compilation import compile_every_kernel
from streaming.service.waiting import stop_signals

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run a local Kafka broker and a local Triton server, without Docker.",
)


@app.command()
def install() -> None:
    """Download Kafka and Triton, and compile the kernels.

    Later calls only check that everything is there.
    """
    directory = local_parts_dir()
    for part in (local_broker, local_triton):
        part.install(directory, typer.echo)
    typer.echo("Cascade's kernels: compiling")
    started_s = time.monotonic()
    compile_every_kernel()
    typer.echo(f"Cascade's kernels: ready ({time.monotonic() - started_s:.0f} s)")


@app.command()
def broker(
    data: Annotated[Path, typer.Option(help="Directory of topics and offsets; the next start reads it again.")] = Path(
        "build/local-broker"
    ),
    nodes: Annotated[
        int, typer.Option(min=1, max=local_broker.NODES_MAX, help="Number of brokers; 3 for replicated topics.")
    ] = 1,
    port: Annotated[int, typer.Option(help="Port of the first broker, the others follow; 0: free ports.")] = 9092,
) -> None:
    """Run Kafka on this machine until Ctrl-C."""
    with stop_signals() as stop, LocalBroker(data, nodes=nodes, port=port or None) as running:
        typer.echo(f"Kafka {local_broker.KAFKA_VERSION} at {running.bootstrap}, data in {running.data_dir}")
        typer.echo("Ctrl-C stops it")
        stop.wait()
    typer.echo("Kafka is stopped; its data stays")


@app.command()
def triton(
    repository: Annotated[Path, typer.Option(help="Triton model repository (NAME/config.pbtxt).", exists=True)],
    port: Annotated[int, typer.Option(help="Port of gRPC; 0: a free port.")] = 8001,
) -> None:
    """Run Triton (CPU) on this machine until Ctrl-C."""
    with stop_signals() as stop, LocalTriton(repository, grpc_port=port or None) as running:
        typer.echo(f"Triton {local_triton.TRITON_VERSION}: gRPC {running.grpc_url}, HTTP {running.http_url}")
        typer.echo(f"metrics {running.metrics_url}")
        typer.echo("Ctrl-C stops it")
        stop.wait()
    typer.echo("Triton is stopped")
