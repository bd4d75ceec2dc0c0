"""What takes turns: the echo, and Cascade's service with several settings, of this checkout and of others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from bench.embedded import ServiceProcess
from bench.observer import DECISIONS_MAX
from bench.open_loop import Service
from bench.peers import Job, PeerProcess
from cascade.config import Backend, ClientName, load_config
from cascade.errors import CascadeError
from streaming.kafka import client_named

Delivery = Literal["at-least-once", "exactly-once"]
ECHO, THIS = "echo", "cascade"
# A checkout that was never used compiles its kernels first.
COMPILE_S_MAX = 600.0
RATES = (100.0, 300.0, 1_000.0, 3_000.0, 10_000.0)


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """The echo, or the service with these settings.

    `name`: in the report. `checkout`: directory whose code runs; None: this one. `backend`: of the deep model,
    onnxruntime is in the service's own process.
    """

    name: str
    echo: bool = False
    checkout: str | None = None
    client: ClientName = "librdkafka"
    backend: Backend = "onnxruntime"
    delivery: Delivery = "at-least-once"

    def settings(self) -> dict[str, Any]:
        """The settings that distinguish the variant from others, by section or key; without topics and group."""
        deep = {"backend": "onnxruntime"} if self.backend == "onnxruntime" else {}
        return {"kafka": {"client": self.client}, "deep": deep, "delivery": self.delivery}

    def service(self, config_path: Path) -> Service:
        """Makes the process that a configuration file describes, not started yet."""
        if not self.echo:
            return ServiceProcess(config_path, environment=environment_of(self.checkout))
        config = load_config(config_path)
        job = Job(
            bootstrap=config.kafka.bootstrap,
            transactions=config.kafka.topics.transactions,
            decisions=config.kafka.topics.decisions,
            group=config.kafka.group,
            out=config_path.with_suffix(""),
        )
        command = [sys.executable, "-m", "bench.peers.echo", f"--commit-s={config.worker.commit_interval_ms / 1e3}"]
        return PeerProcess(ECHO, command, {}, job)


class EchoRun(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run: each round runs every variant once at each rate.

    `rates`: transactions a second. `seconds`: duration of a turn's load after `warm_up_s`. `idle_s`: time without
    traffic. `escalation_share`: of the transactions that count, at each rate.
    """

    variants: list[Variant]
    rates: list[float]
    seconds: float = 15.0
    warm_up_s: float = 10.0
    idle_s: float = 20.0
    rounds: int = 3
    escalation_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.01
    seed: int = 1

    def check(self) -> None:
        """Raises CascadeError for rates that are given twice, or more transactions than an observer reads."""
        if len(set(self.rates)) < len(self.rates):
            raise CascadeError("--rate: given twice; leave one of them out")
        seconds = self.seconds + self.warm_up_s
        if max(self.rates) * seconds > DECISIONS_MAX:
            limit = DECISIONS_MAX / seconds
            raise CascadeError(f"--rate {max(self.rates):g}: at most {limit:,.0f} for {seconds:g} s; lower one of them")


def variants_of(
    checkouts: Sequence[Path],
    clients: Sequence[ClientName],
    backends: Sequence[Backend],
    deliveries: Sequence[Delivery],
) -> list[Variant]:
    """The echo, and a service for each combination; names contain the settings in which services differ.

    Raises CascadeError for a checkout that has no service, or has the name of another variant; and for a client without
    the delivery.

    checkouts: directories with other versions of the project, beside this one.
    """
    names = {THIS: None} | {_checkout_name(directory): str(directory.resolve()) for directory in checkouts}
    if len(names) <= len(checkouts) or ECHO in names:
        raise CascadeError(f"--against: each directory needs a name of its own, and not {THIS} or {ECHO}; rename it")
    choices: list[Sequence[str]] = [list(names), clients, backends, deliveries]
    for choice in choices:
        if repeated := {value for value in choice if choice.count(value) > 1}:
            raise CascadeError(f"{', '.join(sorted(repeated))}: given twice; leave one of them out")
    for client in clients:
        if "exactly-once" in deliveries and not client_named(client).exactly_once:
            raise CascadeError(f"--client {client} has no exactly-once delivery; leave one of them out")
    found = [Variant(name=ECHO, echo=True)]
    for checkout, client, backend, delivery in product(names, clients, backends, deliveries):
        chosen = (client, backend, delivery)
        differing = [value for value, choice in zip(chosen, choices[1:], strict=True) if len(choice) > 1]
        found.append(
            Variant(
                name=", ".join([checkout, *differing]),
                checkout=names[checkout],
                client=client,
                backend=backend,
                delivery=delivery,
            )
        )
    return found


def _checkout_name(directory: Path) -> str:
    if not (directory / "cascade" / "cli.py").is_file():
        raise CascadeError(f"--against {directory}: no cascade/cli.py in it; name a checkout of the project")
    return directory.resolve().name


def environment_of(checkout: str | None) -> dict[str, str]:
    """Variables with which Python imports the project from a checkout first; none for this one."""
    if checkout is None:
        return {}
    search = [checkout, os.environ.get("PYTHONPATH", "")]
    # without the second, `python -m` would look in the working directory before PYTHONPATH
    return {"PYTHONPATH": os.pathsep.join(filter(None, search)), "PYTHONSAFEPATH": "1"}


def compile_kernels(checkout: str | None) -> None:
    """Compiles a checkout's kernels, so that no turn waits for them; raises CascadeError where that fails."""
    command = [sys.executable, "-m", "cascade", "compile"]
    environment = {**os.environ, **environment_of(checkout)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_S_MAX, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CascadeError(f"{checkout or THIS}: its kernels were not compiled in {COMPILE_S_MAX:.0f} s") from error
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CascadeError(f"{checkout or THIS}: `cascade compile` failed there: {reason}")
