"""All rounds of a scenario: the variants take turns on the same broker and the same Triton."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.cluster import EndlessData, shipped_bundle_with, simulated, threshold_for
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory
from bench.open_loop import Service
from bench.peers import Work, peer_named
from bench.pipeline.report import PipelineReport, standings
from bench.pipeline.scenario import Models, Scenario, Variant
from bench.pipeline.turn import Turn, run_turn
from bench.traffic import Traffic
from cascade.bundle import SHIPPED_BUNDLE, SHIPPED_LARGE_BUNDLE, Bundle, load_bundle
from cascade.config import load_config
from cascade.errors import CascadeError
from cascade.ledger.machine import describe_machine
from cascade.policy import RAW_MAX
from cascade.progress import Steps


def run_pipeline(scenario: Scenario, out: Path) -> PipelineReport:
    """Runs a scenario, with data and logs under `out`.

    Raises CascadeError where the reference cannot run, or where a variant's service ends or makes no progress.
    """
    started_s = time.monotonic()
    directory = fresh_directory(out)
    skipped = {variant.name: why for variant in scenario.variant if (why := _missing(variant)) is not None}
    variants = [variant for variant in scenario.variant if variant.name not in skipped]
    if scenario.reference in skipped:
        raise CascadeError(f"{scenario.reference}, the reference, cannot run here: {skipped[scenario.reference]}")
    turns: list[Turn] = []
    with Steps() as progress, ExitStack() as stack:
        progress("simulate", 0.0)
        shipped = SHIPPED_LARGE_BUNDLE if scenario.deep == "large" else SHIPPED_BUNDLE
        size, schema = scenario.data, load_bundle(shipped).schema
        data = simulated(schema, cards=size.cards, terminals=size.terminals, days=size.days, seed=scenario.seed)
        threshold = threshold_for(scenario.escalation_share, data, shipped=shipped)
        bundles = _bundles(directory, shipped, scenario.escalation_share, threshold)
        progress("simulate", 1.0)
        parts = stack.enter_context(EmbeddedParts(directory, bundles["cascade"]))
        traffic = Traffic(parts.bundle.schema, EndlessData(parts.bundle.schema, data))
        for round_ in range(scenario.rounds):
            # each round begins with another variant, so that no variant always follows the same neighbour
            first = round_ % len(variants)
            for variant in (*variants[first:], *variants[:first]):
                progress("measure, by turns", len(turns) / (scenario.rounds * len(variants)))
                bundle = bundles[variant.models]
                make_service = _service_maker(variant, parts, bundle, scenario.escalation_share)
                turns.append(run_turn(variant, len(turns), round_, scenario, parts, traffic, bundle, make_service))
        progress("measure, by turns", 1.0)
    return PipelineReport(
        scenario=scenario,
        standings=standings(scenario, turns),
        turns=turns,
        skipped=skipped,
        machine=describe_machine(),
        elapsed_s=time.monotonic() - started_s,
    )


def _bundles(directory: Path, shipped: Path, share: float, threshold: float) -> dict[Models, Bundle]:
    """The shipped models with three policies, so that nothing else differs."""
    thresholds: dict[Models, float] = {"cascade": threshold, "deep-only": -RAW_MAX, "screener-only": RAW_MAX}
    return {
        name: shipped_bundle_with(directory / f"bundle-{name}", name, share, escalate_from, {}, shipped)
        for name, escalate_from in thresholds.items()
    }


def _missing(variant: Variant) -> str | None:
    """Why a variant cannot run here; None where it can."""
    return None if variant.peer is None else peer_named(variant.peer).missing()


def _service_maker(variant: Variant, parts: EmbeddedParts, bundle: Bundle, share: float) -> Callable[[Path], Service]:
    """A function that makes the variant's service for a configuration file; `share`: escalated by a peer."""
    if variant.peer is None:
        module = "bench.silent" if variant.ledger == "off" else "cascade"
        return lambda path: ServiceProcess(path, module)
    peer, triton = peer_named(variant.peer), parts.triton
    if triton is None:
        raise CascadeError(f"{variant.name}: a peer needs a Triton")

    def make(path: Path) -> Service:
        kafka = load_config(path).kafka
        work = Work(
            bootstrap=kafka.bootstrap,
            transactions=kafka.topics.transactions,
            decisions=kafka.topics.decisions,
            group=kafka.group,
            bundle=bundle.directory,
            triton_grpc=triton.grpc_url,
            triton_http=triton.http_url,
            out=path.with_suffix(""),
            escalate_share=share,
        )
        return peer.run(work)

    return make
