"""`cascade bench smoke`: ratios to references of the same run, compared with a baseline.

It fails where a ratio is more than 30 % below its baseline, never by an absolute time.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from bench.pipeline.run import run_pipeline
from bench.pipeline.scenario import load_scenario
from bench.stages import run_stages
from bench.tables import figure_table, print_table
from cascade.errors import CascadeError

BASELINE = Path(str(files("bench") / "scenarios" / "smoke-baseline.json"))
FALL_MAX = 0.3
BATCH, ROUNDS = 1_000, 9


class SmokeReport(msgspec.Struct, frozen=True, kw_only=True):
    """How many times better than its reference, by name: now and in the baseline; `fallen`: more than 30 % below it."""

    ratios: dict[str, float]
    baseline: dict[str, float]
    fallen: list[str]


def run_smoke(out: Path, seed: int) -> SmokeReport:
    """Measures the ratios; raises CascadeError where they and the baseline do not have the same names."""
    baseline = read_baseline()
    stages = run_stages(BATCH, ROUNDS, seed)
    ratios = {f"stage: {timing.stage}": timing.ratio for timing in stages.stages}
    report = run_pipeline(load_scenario("smoke"), out)
    for standing in report.standings:
        if standing.variant != (reference := report.scenario.reference):
            ratios[f"throughput: {standing.variant} / {reference}"] = standing.ratios["per_second"].median
    return compare_to_baseline(ratios, baseline)


def read_baseline() -> dict[str, float]:
    """The ratios of the last good run, by name."""
    return msgspec.json.decode(BASELINE.read_bytes(), type=dict[str, float])


def compare_to_baseline(ratios: dict[str, float], baseline: dict[str, float]) -> SmokeReport:
    """Finds the ratios that fell; raises CascadeError where the two do not have the same names."""
    unknown = sorted(baseline.keys() ^ ratios.keys())
    if unknown:
        raise CascadeError(
            f"{BASELINE}: {', '.join(unknown)}: either measured or in the baseline, not both; write a new baseline"
        )
    fallen = [name for name, ratio in ratios.items() if not ratio >= (1 - FALL_MAX) * baseline[name]]
    return SmokeReport(ratios=ratios, baseline=baseline, fallen=fallen)


def show_smoke(report: SmokeReport, console: Console) -> None:
    """Prints the report as a table, a row a ratio."""
    table = figure_table("ratio to its reference", "now", "baseline", "change")
    for name, ratio in report.ratios.items():
        baseline = report.baseline[name]
        change = f"{ratio / baseline - 1 if baseline else np.nan:+.0%}"
        table.add_row(name, f"{ratio:.2f}", f"{baseline:.2f}", f"{change} FELL" if name in report.fallen else change)
    print_table(console, table, f"{len(report.fallen) or 'none'} fell by more than {FALL_MAX:.0%}")
