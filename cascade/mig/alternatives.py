"""The same calls on GPUs without MIG, and what MIG saves against them.

Three alternatives, under the same model of times and joules:

- whole GPU: one Triton a GPU that serves all models, each with 1, 2 or 4 instances behind a queue of its own. An
  instance computes as if all others were always busy too (an equal share of SMs and bandwidth): that is the worst case.
- MPS: 2, 4 or 7 Tritons a GPU, each limited to an equal share of the SMs. There is no isolation of memory bandwidth and
  caches, and a fault of one process can end all: the model charges nothing for either, which is the best case.
- own GPU, with several models: none shares a GPU with another, as where they must be isolated and there is no MIG.

None of them strands an SM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from cascade.mig.evaluation import Evaluation, Server
from cascade.mig.gpus import Gpu
from cascade.mig.placement import layouts, stranded_sms
from cascade.mig.plan import PlannedLayout, Planner
from cascade.mig.service_time import Part

INSTANCES: Final = (1, 2, 4)
MPS_PARTS: Final = (2, 4, 7)
# The saving that is often quoted for MIG (docs/mig.md has the sources).
QUOTED: Final = 0.30
# Rates at which MIG and the whole GPU are compared, from a hundredth of a GPU to all GPUs.
_RATES: Final = 400


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs without MIG that carry the same calls: the fewest joules a call of its kind.

    replicas: of all models together; a Triton that serves several models counts once for each. instances: of the
    model in each. p99_ms, headroom: of the model that comes closest to its limit. busy_share: its mean over replicas.
    idle_mj, dynamic_mj: of a call.
    """

    kind: str
    gpus: int
    replicas: int
    instances: int
    p99_ms: float
    headroom: float
    busy_share: float
    idle_mj: float
    dynamic_mj: float

    @property
    def energy_mj(self) -> float:
        """Joules of a call, in mJ."""
        return self.idle_mj + self.dynamic_mj


def whole_gpus(gpu: Gpu, evaluations: Sequence[Evaluation]) -> Alternative | None:
    """Whole GPUs with one Triton for all models; None if no number of instances keeps every limit."""
    memory_gb = sum(evaluation.demand.memory_gb for evaluation in evaluations)
    found = []
    for instances in INSTANCES:
        server = whole_server(gpu, instances, len(evaluations))
        counts = _fewest(evaluations, server)
        if counts is not None and memory_gb * instances <= gpu.memory_gb:
            gpus = max(counts)
            found.append(_alternative("whole GPU", gpu, evaluations, server, [gpus] * len(counts), gpus))
    return min(found, key=_energy, default=None)


def own_gpus(gpu: Gpu, evaluations: Sequence[Evaluation]) -> Alternative | None:
    """Whole GPUs, each with one model only; None if no number of instances keeps every limit."""
    found = []
    for instances in INSTANCES:
        server = whole_server(gpu, instances, 1)
        counts = _fewest(evaluations, server)
        if counts is not None and all(one.demand.memory_gb * instances <= gpu.memory_gb for one in evaluations):
            found.append(_alternative("own GPU", gpu, evaluations, server, counts, sum(counts)))
    return min(found, key=_energy, default=None)


def mps(gpu: Gpu, evaluations: Sequence[Evaluation]) -> Alternative | None:
    """GPUs that several Tritons share by MPS; None if no number of parts keeps every limit."""
    found = []
    for parts in MPS_PARTS:
        server = Server(f"1/{parts}", Part.share(gpu, parts))
        counts = _fewest(evaluations, server)
        if counts is not None:
            needs = [one.demand.memory_gb for one, count in zip(evaluations, counts, strict=True) for _ in range(count)]
            gpus = _first_fit(needs, gpu.memory_gb, parts)
            found.append(_alternative("MPS", gpu, evaluations, server, counts, gpus))
    return min(found, key=_energy, default=None)


def whole_server(gpu: Gpu, instances: int, models: int) -> Server:
    """So many instances of a model on a GPU that serves so many models."""
    return Server(f"{instances} of {models}", Part.share(gpu, instances * models), instances)


def _energy(alternative: Alternative) -> float:
    return alternative.energy_mj


def _fewest(evaluations: Sequence[Evaluation], server: Server) -> list[int] | None:
    """The fewest servers for each model that keep its limit; None if a model's limit is kept at no rate."""
    rates = [evaluation.rate_max(server) for evaluation in evaluations]
    if not all(rates):
        return None
    return [math.ceil(one.demand.calls_per_s_kept / rate) for one, rate in zip(evaluations, rates, strict=True)]


def _first_fit(needs_gb: Sequence[float], memory_gb: float, parts: int) -> int:
    """GPUs for processes that need so much memory, at most `parts` on each: the largest first, where they first fit."""
    free: list[tuple[float, int]] = []
    for need_gb in sorted(needs_gb, reverse=True):
        place = next((number for number, (gb, left) in enumerate(free) if gb >= need_gb and left), None)
        if place is None:
            free.append((memory_gb, parts))
            place = len(free) - 1
        free[place] = (free[place][0] - need_gb, free[place][1] - 1)
    return len(free)


def _alternative(
    kind: str, gpu: Gpu, evaluations: Sequence[Evaluation], server: Server, counts: Sequence[int], gpus: int
) -> Alternative:
    """The figures of so many servers for each model, on so many GPUs."""
    mean = sum(found.demand.calls_per_s_mean for found in evaluations)
    dynamic_w, rows = 0.0, []
    for evaluation, count in zip(evaluations, counts, strict=True):
        demand = evaluation.demand
        queue = evaluation.queue(server, demand.calls_per_s / count)
        assert queue is not None, "fewer calls than the highest rate"  # noqa: S101
        dynamic_w += demand.calls_per_s_mean * evaluation.joules(server, demand.calls_per_s_mean / count)
        headroom = count * evaluation.rate_max(server) / demand.calls_per_s
        rows.append((headroom, evaluation.p99_s(server, demand.calls_per_s / count) * 1e3, queue.busy_share))
    headroom, p99_ms, _ = min(rows)
    return Alternative(
        kind=kind,
        gpus=gpus,
        replicas=sum(counts),
        instances=server.instances,
        p99_ms=p99_ms,
        headroom=headroom,
        busy_share=float(np.average([busy for _, _, busy in rows], weights=counts)),
        idle_mj=gpus * gpu.idle_w / mean * 1e3,
        dynamic_mj=dynamic_w / mean * 1e3,
    )


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """What MIG saves against whole GPUs in joules a call: shares of the whole GPUs' joules, negative if MIG costs more.

    at_rate: at the plan's rates. idle_share: of MIG's joules that is idle power.
    mig_calls_per_s, whole_calls_per_s: that one GPU carries within the limit; None with several models.
    quoted_from, quoted_to: the lowest and the highest rate, calls a second, up to the GPUs of the plan, at which MIG
    saves QUOTED or more; None if there is no such rate, or with several models.
    quoted_rates_share: the share of the rates between these two at which it does. At all these rates the joules of
    the work count as at the plan's own.
    filled: if other work, which needs GPUs of its own without MIG, fills all slices that the plan leaves free.
    """

    at_rate: float
    idle_share: float
    mig_calls_per_s: float | None
    whole_calls_per_s: float | None
    quoted_from: float | None
    quoted_to: float | None
    quoted_rates_share: float | None
    filled: float


def saving(planner: Planner, layout: PlannedLayout, whole: Alternative) -> Saving:
    """Compares the plan's best layout with the best whole GPUs, at its rates and at others."""
    gpu = planner.gpu
    used = sum(gpu.profile(name).sms * count for name, count in layout.replicas.items())
    # what MIG strands in any case is a cost of those who use the slices
    usable = len(layout.gpus) * (gpu.sms - min(stranded_sms(gpu, full) for full in layouts(gpu)))
    filled_mj = layout.idle_mj * used / usable + layout.dynamic_mj
    carried: tuple[float, float] | None = None
    quoted = np.empty(0)
    between = 0
    if len(planner.evaluations) == 1:
        (evaluation,) = planner.evaluations
        servers = [whole_server(gpu, count, 1) for count in INSTANCES]
        carried = planner.capacity(evaluation)[0], max(map(evaluation.rate_max, servers))
        rates = np.geomspace(min(carried) / 100.0, planner.gpus * max(carried), _RATES)
        mig_mj, whole_mj = (
            np.ceil(rates / most) * gpu.idle_w / rates * 1e3 + dynamic_mj
            for most, dynamic_mj in zip(carried, (layout.dynamic_mj, whole.dynamic_mj), strict=True)
        )
        holds = 1.0 - mig_mj / whole_mj >= QUOTED
        quoted = rates[holds]
        if len(quoted):
            between = int(np.flatnonzero(holds)[-1] - np.flatnonzero(holds)[0] + 1)
    return Saving(
        at_rate=1.0 - layout.energy_mj / whole.energy_mj,
        idle_share=layout.idle_mj / layout.energy_mj,
        mig_calls_per_s=carried[0] if carried else None,
        whole_calls_per_s=carried[1] if carried else None,
        quoted_from=float(quoted[0]) if len(quoted) else None,
        quoted_to=float(quoted[-1]) if len(quoted) else None,
        quoted_rates_share=len(quoted) / between if len(quoted) else None,
        filled=1.0 - filled_mj / whole.energy_mj,
    )
