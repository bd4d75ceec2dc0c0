"""`make bench-smoke`: ratios against references of the same run, held against those of the last good run.

A ratio that fell by more than 30 % fails; no absolute time ever does.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.pipeline.report import PipelineReport
from bench.pipeline.run import run_pipeline
from bench.pipeline.scenario import load_scenario
from bench.stages import run_stages
from cascade.errors import CascadeError

BASELINE = Path(str(files("bench") / "scenarios" / "smoke-baseline.json"))
FALL_MAX = 0.3
BATCH, ROUNDS = 1_000, 9


class SmokeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Ratios by name, how many times better than the reference: now and as expected; `fallen`: those that fell."""

    ratios: dict[str, float]
    baseline: dict[str, float]
    fallen: list[str]


def run_smoke(out: Path, seed: int) -> SmokeReport:
    """Measure the ratios; raises CascadeError where the baseline names one that was not measured."""
    baseline = read_baseline()
    stages = run_stages(BATCH, ROUNDS, seed)
    ratios = {f"stage: {one.stage}": one.ratio for one in stages.stages}
    ratios |= pipeline_ratios(run_pipeline(load_scenario("smoke"), out))
    return judged(ratios, baseline)


def read_baseline() -> dict[str, float]:
    """What is expected, by name."""
    return msgspec.json.decode(BASELINE.read_bytes(), type=dict[str, float])


def pipeline_ratios(report: PipelineReport) -> dict[str, float]:
    """Throughput of each variant over the reference's, medians of the rounds."""
    found = {}
    for one in report.standings:
        if one.variant != report.scenario.reference:
            found[f"throughput: {one.variant} / {report.scenario.reference}"] = one.ratios["per_second"].median
    return found


def judged(ratios: dict[str, float], baseline: dict[str, float]) -> SmokeReport:
    """Compare; raises CascadeError where the two do not name the same."""
    unknown = sorted(baseline.keys() ^ ratios.keys())
    if unknown:
        raise CascadeError(f"{BASELINE}: {', '.join(unknown)}: not both measured and expected; measure it anew")
    fallen = [name for name, ratio in ratios.items() if not ratio >= (1 - FALL_MAX) * baseline[name]]
    return SmokeReport(ratios=ratios, baseline=baseline, fallen=fallen)


def show_smoke(report: SmokeReport, console: Console) -> None:
    """Print the report."""
    table = Table(box=None, padding=(0, 1))
    for name, justify in (("ratio to its reference", "left"), ("now", "right"), ("baseline", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, ratio in report.ratios.items():
        change = ratio / report.baseline[name] - 1 if report.baseline[name] else np.nan
        told = f"{change:+.0%}" + (", FELL" if name in report.fallen else "")
        table.add_row(name, f"{ratio:.2f}", f"{report.baseline[name]:.2f}", told)
    console.print(table)
    limit = f"more than {FALL_MAX:.0%}"
    console.print(f"{len(report.fallen)} fell by {limit}" if report.fallen else f"none fell by {limit}")
