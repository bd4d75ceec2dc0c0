"""Writes what a cluster needs for a plan: its figures, its picture, the GPUs' configuration, the overlay of `k8s/`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cascade.mig.gpus import Gpu
from cascade.mig.mig_parted import write_gpu_configuration
from cascade.mig.overlay import write_overlay
from cascade.mig.packing import pack
from cascade.mig.placement import Layout
from cascade.mig.plan_report import Plan, plan_notes, slices_text
from cascade.mig.svg import PodKey, Watts, number_pods, plan_svg

CONFIGURATION = "cascade"


def indented_json(figures: object) -> bytes:
    """Structs and containers of them as indented JSON, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(figures)) + b"\n"


def plan_picture(plan: Plan, gpu: Gpu) -> str:
    """The first layout of a plan as SVG."""
    best = plan.layouts[0]
    layouts = pack(gpu, best.replicas)
    models = _models(plan, layouts)
    pods = models if len(best.models) > 1 else number_pods(layouts)
    work_w = {
        model.name: model.dynamic_mj / 1e3 * demand.calls_per_s_mean / sum(model.replicas.values())
        for model, demand in zip(best.models, plan.demands, strict=True)
    }
    watts = [
        Watts(plan.idle_w, sum(work_w[models[number, placement.start]] for placement in layout))
        for number, layout in enumerate(layouts)
    ]
    title = f"{gpu.name}: {slices_text(best.replicas)}, {best.energy_mj:,.3g} mJ a call"
    return plan_svg(gpu, layouts, pods, title, plan_notes(plan, gpu), watts)


def _models(plan: Plan, layouts: Sequence[Layout]) -> dict[PodKey, str]:
    """The model of each slice."""
    waiting = {
        name: [model.name for model in plan.layouts[0].models for _ in range(model.replicas.get(name, 0))]
        for name in plan.layouts[0].replicas
    }
    return {
        (number, placement.start): waiting[placement.profile.name].pop(0)
        for number, layout in enumerate(layouts)
        for placement in layout
    }


def write_plan(directory: Path, plan: Plan, gpu: Gpu, gpus_per_node: int, base: Path) -> list[str]:
    """Writes plan.json, plan.svg, mig-parted.yaml, gpu-operator-configmap.yaml and the overlay of each model.

    The overlay is `overlay`; with several models, `overlay-NAME` for each. Returns the command lines for the GPU
    operator. Raises DataError where a configuration is impossible, OSError if a file cannot be written.

    gpus_per_node: of the cluster. base: `k8s/base`, to which the overlays refer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_bytes(indented_json(plan))
    (directory / "plan.svg").write_text(plan_picture(plan, gpu))
    models = plan.layouts[0].models
    for model in models:
        overlay = directory / ("overlay" if len(models) == 1 else f"overlay-{model.name}")
        write_overlay(overlay, model.replicas, gpu, Path(os.path.relpath(base, overlay)).as_posix())
    return write_gpu_configuration(directory, CONFIGURATION, pack(gpu, plan.layouts[0].replicas), gpus_per_node)
