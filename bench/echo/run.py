"""All rounds of a run: echo and services take turns at each rate, on the same broker and the same Triton."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.cluster import EndlessData, shipped_bundle_with, simulated, threshold_for
from bench.echo.report import EchoReport, standings
from bench.echo.turn import RateLoad, Turn, run_turn
from bench.echo.variants import EchoRun, compile_kernels
from bench.embedded import EmbeddedParts, fresh_directory
from bench.load import departures
from bench.traffic import Traffic
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.ledger.machine import describe_machine
from cascade.progress import Steps

CARDS, TERMINALS, DAYS = 20_000, 20_000, 20
# A JVM compiles hot code while it runs: a cold broker takes ten times as long at p99.
BROKER_WARM_UP_RATE, BROKER_WARM_UP_S = 3_000.0, 10.0


def run_echo(run: EchoRun, out: Path) -> EchoReport:
    """Runs `cascade bench echo`, with data and logs under `out`.

    Raises CascadeError where a variant cannot run, or its process ends.
    """
    run.check()
    started_s = time.monotonic()
    directory = fresh_directory(out)
    turns: list[Turn] = []
    with Steps() as progress, ExitStack() as stack:
        checkouts = list(dict.fromkeys(variant.checkout for variant in run.variants if not variant.echo))
        for number, checkout in enumerate(checkouts):
            progress("compile", number / len(checkouts))
            compile_kernels(checkout)
        progress("compile", 1.0)
        progress("simulate", 0.0)
        loads = _loads(run, directory)
        progress("simulate", 1.0)
        with_triton = any(variant.backend == "triton" for variant in run.variants if not variant.echo)
        parts = stack.enter_context(EmbeddedParts(directory, loads[0].bundle, with_triton))
        for number, variant in enumerate(run.variants):
            progress("warm the broker up", number / len(run.variants))
            run_turn(variant, -1, loads[-1], parts, 0.0)
        progress("warm the broker up", 1.0)
        wanted = run.rounds * len(run.rates) * len(run.variants)
        for round_ in range(run.rounds):
            # each round begins with another variant, so that no variant always follows the same neighbour
            first = round_ % len(run.variants)
            for load in loads[:-1]:
                idle_s = run.idle_s if load.rate == min(run.rates) else 0.0
                for variant in (*run.variants[first:], *run.variants[:first]):
                    progress("measure, by turns", len(turns) / wanted)
                    turns.append(run_turn(variant, round_, load, parts, idle_s))
        progress("measure, by turns", 1.0)
    return EchoReport(
        run=run,
        standings=standings(turns),
        turns=turns,
        machine=describe_machine(),
        elapsed_s=time.monotonic() - started_s,
    )


def _loads(run: EchoRun, directory: Path) -> list[RateLoad]:
    """A load for each rate in ascending order, and as the last one that for the broker's warm-up."""
    schema = load_bundle(SHIPPED_BUNDLE).schema
    rows = EndlessData(schema, simulated(schema, cards=CARDS, terminals=TERMINALS, days=DAYS, seed=run.seed))
    traffic = Traffic(schema, rows)
    shapes = [(rate, run.seconds, run.warm_up_s) for rate in sorted(run.rates)]
    loads = []
    for number, (rate, seconds, warm_up_s) in enumerate([*shapes, (BROKER_WARM_UP_RATE, BROKER_WARM_UP_S, 0.0)]):
        due_s = departures("poisson", rate, seconds + warm_up_s, run.seed)
        keys, values = traffic.messages("json", 0, len(due_s))
        # a turn begins with an empty state, so a score depends on how many transactions came before
        sent = rows.rows(0, len(due_s))
        threshold = threshold_for(run.escalation_share, sent, int(np.searchsorted(due_s, warm_up_s)))
        name = f"escalating-{rate:g}"
        bundle = shipped_bundle_with(directory / f"bundle-{number}", name, run.escalation_share, threshold, {})
        loads.append(RateLoad(rate, warm_up_s, due_s, keys, values, bundle))
    return loads
