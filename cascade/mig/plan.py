"""Layouts of MIG slices for the deep calls of one or several models, ranked by joules a call within the service level.

A layout keeps the service level if each of its replicas does: clients take the replicas in turn, so each gets the same
share of the calls, whatever its size. Joules a call are those of whole GPUs: the idle power of every GPU in use, with
its stranded SMs and free slices, and the joules of the work. GPUs that the plan does not use can be left off; their
idle power is not counted.

Only layouts with the fewest GPUs are ranked: a further GPU adds its idle power, and smaller batches add joules too.
With one model, all layouts of one GPU are tried, and all combinations of them on up to `_COMBINED_MAX` GPUs; with more
GPUs, one layout on all but one of them and any layout on the last. With several models each one has slices of one
profile, as few as it needs, and all combinations of profiles are packed exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final

import msgspec
import numpy as np

from cascade.columns import Int64
from cascade.errors import DataError
from cascade.mig.evaluation import QUANTILE, Evaluation, Server
from cascade.mig.gpus import Gpu, Profile
from cascade.mig.packing import GPUS_MAX, pack
from cascade.mig.placement import Layout, counts_of, layouts, stranded_sms
from cascade.mig.queueing import mix
from cascade.mig.service_time import Basis, Part, least_certain

# 14,026 combinations of an A100's layouts on four GPUs take a second; on five there are 39,837.
_COMBINED_MAX: Final = 4


class PlannedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model on its replicas, at its peak; `dynamic_mj` is of a call at the mean rate.

    replicas: by profile. p50_ms, p99_ms: of a call at the server. headroom: the rate at which the limit breaks ÷ the
    rate at the peak. busy_share: mean over the replicas. batch_calls: calls in a batch, mean.
    basis, energy_basis: of times and of joules, the least certain of the profiles.
    """

    name: str
    replicas: dict[str, int]
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    p99_ms_max: float
    headroom: float
    busy_share: float
    batch_calls: float
    dynamic_mj: float
    basis: Basis
    energy_basis: Basis


class PlannedLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A layout of all GPUs in use.

    gpus: slices by profile, for each GPU. stranded_sms: in no slice, of all GPUs in use.
    idle_mj, dynamic_mj: of a call, mean over all models; their sum is `energy_mj`.
    """

    gpus: tuple[dict[str, int], ...]
    models: tuple[PlannedModel, ...]
    stranded_sms: int
    sms: int
    idle_mj: float
    dynamic_mj: float

    @property
    def energy_mj(self) -> float:
        """Joules of a call, in mJ."""
        return self.idle_mj + self.dynamic_mj

    @property
    def replicas(self) -> dict[str, int]:
        """Slices by profile, of all models together."""
        found: dict[str, int] = {}
        for model in self.models:
            for profile, count in model.replicas.items():
                found[profile] = found.get(profile, 0) + count
        return dict(sorted(found.items()))


class Planner:
    """Plans the models of `evaluations` on at most `gpus` of a GPU."""

    def __init__(self, gpu: Gpu, gpus: int, evaluations: Sequence[Evaluation]) -> None:
        self.gpu, self.gpus, self.evaluations = gpu, gpus, tuple(evaluations)
        self.servers = {profile.name: Server(profile.name, Part.of(gpu, profile)) for profile in gpu.profiles}
        self.calls_per_s_mean = sum(found.demand.calls_per_s_mean for found in evaluations)

    def best(self, count: int) -> list[PlannedLayout]:
        """The `count` layouts with the fewest joules a call. Raises DataError, which names the limit, without any."""
        for evaluation in self.evaluations:
            self._check(evaluation)
        if len(self.evaluations) == 1:
            packed = self._of_one_model(self.evaluations[0], count)
        else:
            packed = self._of_several_models(count)
        return [self.describe(gpus, replicas) for gpus, replicas in packed]

    def describe(self, gpus: Sequence[Layout], replicas: Sequence[Mapping[str, int]]) -> PlannedLayout:
        """The figures of a layout. replicas: of each model, by profile."""
        models = tuple(
            self._model(found, dict(counts)) for found, counts in zip(self.evaluations, replicas, strict=True)
        )
        watts = sum(
            model.dynamic_mj * found.demand.calls_per_s_mean
            for model, found in zip(models, self.evaluations, strict=True)
        )
        return PlannedLayout(
            gpus=tuple(counts_of(layout) for layout in gpus),
            models=models,
            stranded_sms=sum(stranded_sms(self.gpu, layout) for layout in gpus),
            sms=self.gpu.sms * len(gpus),
            idle_mj=len(gpus) * self.gpu.idle_w / self.calls_per_s_mean * 1e3,
            dynamic_mj=watts / self.calls_per_s_mean,
        )

    def allowed(self, evaluation: Evaluation) -> list[Profile]:
        """The profiles with enough memory for the model that keep its limit at some rate."""
        return [
            profile
            for profile in self.gpu.profiles
            if profile.memory_gb >= evaluation.demand.memory_gb and evaluation.rate_max(self.servers[profile.name]) > 0
        ]

    def capacity(self, evaluation: Evaluation) -> tuple[float, Layout]:
        """The most calls a second that one GPU carries within the limit, and its layout."""
        rates = {profile.name: evaluation.rate_max(self.servers[profile.name]) for profile in self.allowed(evaluation)}
        found = [
            (sum(counts.values()) * min(rates[name] for name in counts), layout)
            for layout in layouts(self.gpu)
            if (counts := counts_of(layout)).keys() <= rates.keys()
        ]
        return max(found, key=lambda pair: pair[0])

    def _check(self, evaluation: Evaluation) -> None:
        """Raises DataError if no layout of any number of GPUs keeps the model's limit."""
        demand, gpu = evaluation.demand, self.gpu
        largest = max(gpu.profiles, key=lambda profile: profile.memory_gb)
        if demand.memory_gb > largest.memory_gb:
            raise DataError(
                f"{demand.name}: needs {demand.memory_gb:g} GB; the largest slice of {gpu.key}, {largest.name}, has"
                f" {largest.memory_gb} GB: take a GPU with more memory"
            )
        if self.allowed(evaluation):
            return
        roomy = [self.servers[profile.name] for profile in gpu.profiles if profile.memory_gb >= demand.memory_gb]
        fastest = min(roomy, key=evaluation.least_s)
        least_ms, delay_ms = evaluation.least_s(fastest) * 1e3, evaluation.batching.delay_s * 1e3
        if least_ms > demand.p99_s * 1e3:
            raise DataError(
                f"{demand.name}: p99 of {demand.p99_s * 1e3:g} ms: a call that meets no other takes {least_ms:.2f} ms"
                f" on {fastest.name}, the fastest slice ({delay_ms:g} ms of it is the batch's delay): raise --p99 or"
                " lower the delay"
            )
        raise DataError(
            f"{demand.name}: p99 of {demand.p99_s * 1e3:g} ms: no slice of {gpu.key} keeps it at any rate, because two"
            f" calls that meet take longer; {least_ms:.2f} ms is a call alone on {fastest.name}: raise --p99"
        )

    def _of_one_model(self, evaluation: Evaluation, count: int) -> list[tuple[list[Layout], list[dict[str, int]]]]:
        demand = evaluation.demand
        names = [profile.name for profile in self.gpu.profiles]
        allowed = {profile.name for profile in self.allowed(evaluation)}
        rates = np.array([evaluation.rate_max(self.servers[name]) if name in allowed else 0.0 for name in names])
        for gpus in range(1, self.gpus + 1):
            counts = self._combinations(gpus)
            slowest = np.where(counts > 0, rates, np.inf).min(axis=1)
            kept = counts[counts.sum(axis=1) * slowest >= demand.calls_per_s_kept]
            if len(kept):
                break
        else:
            raise DataError(self._too_few(evaluation))
        joules = {
            (name, replicas): evaluation.joules(self.servers[name], demand.calls_per_s_mean / replicas)
            for replicas in {int(found.sum()) for found in kept}
            for name in {names[column] for found in kept if found.sum() == replicas for column in np.flatnonzero(found)}
        }
        memory = np.array([profile.memory_slices for profile in self.gpu.profiles])

        def order(found: Int64) -> tuple[float, int, int]:
            replicas = int(found.sum())
            total = sum(int(found[column]) * joules[names[column], replicas] for column in np.flatnonzero(found))
            return total / replicas, int(found @ memory), replicas

        best = sorted(kept, key=order)[:count]
        replicas = [{names[column]: int(found[column]) for column in np.flatnonzero(found)} for found in best]
        return [(list(pack(self.gpu, slices)), [slices]) for slices in replicas]

    def _combinations(self, gpus: int) -> Int64:
        """Int64 [combinations, profiles]: the slices of each profile on `gpus` GPUs together, none of them empty."""
        names = [profile.name for profile in self.gpu.profiles]
        single = np.array(
            [[counts_of(layout).get(name, 0) for name in names] for layout in layouts(self.gpu)], np.int64
        )
        if gpus > _COMBINED_MAX:
            uniform = single * (gpus - 1)
            return np.unique((uniform[:, None] + single).reshape(-1, len(names)), axis=0)
        found = single
        for _ in range(gpus - 1):
            found = np.unique((found[:, None] + single).reshape(-1, len(names)), axis=0)
        return found

    def _of_several_models(self, count: int) -> list[tuple[list[Layout], list[dict[str, int]]]]:
        options = [
            {
                profile.name: math.ceil(found.demand.calls_per_s_kept / found.rate_max(self.servers[profile.name]))
                for profile in self.allowed(found)
            }
            for found in self.evaluations
        ]
        found, packed = [], dict[tuple[tuple[str, int], ...], list[Layout] | None]()
        for chosen in product(*options):
            replicas = [{name: by_name[name]} for name, by_name in zip(chosen, options, strict=True)]
            total = sum(map(Counter, replicas), Counter[str]())
            key = tuple(sorted(total.items()))
            if key not in packed:
                packed[key] = self._packed(total)
            found.append((packed[key], replicas))
        fitting = [(gpus, replicas) for gpus, replicas in found if gpus is not None and len(gpus) <= self.gpus]
        if not fitting:
            needed = min((len(gpus) for gpus, _ in found if gpus is not None), default=None)
            if needed is None:
                raise DataError(f"the models together need more than {GPUS_MAX} GPUs: divide the demand")
            raise DataError(f"--gpus {self.gpus}: too few; the models together need {needed} × {self.gpu.key}")

        work_w = [
            {name: self._work_w(found, name, number) for name, number in by_name.items()}
            for found, by_name in zip(self.evaluations, options, strict=True)
        ]

        def order(pair: tuple[list[Layout], list[dict[str, int]]]) -> tuple[float, int]:
            gpus, replicas = pair
            work = sum(by_name[name] for by_name, slices in zip(work_w, replicas, strict=True) for name in slices)
            return len(gpus) * self.gpu.idle_w + work, -sum(stranded_sms(self.gpu, layout) for layout in gpus)

        return sorted(fitting, key=order)[:count]

    def _work_w(self, evaluation: Evaluation, name: str, replicas: int) -> float:
        """Watts above idle of a model on so many slices of a profile, at its mean rate."""
        mean = evaluation.demand.calls_per_s_mean
        return mean * evaluation.joules(self.servers[name], mean / replicas)

    def _packed(self, total: Mapping[str, int]) -> list[Layout] | None:
        try:
            return list(pack(self.gpu, total))
        except DataError:  # more than GPUS_MAX
            return None

    def _too_few(self, evaluation: Evaluation) -> str:
        """Why the plan's GPUs are too few for its only model, and what it needs with slices of one profile."""
        demand = evaluation.demand
        found = []
        for profile in self.allowed(evaluation):
            replicas = math.ceil(demand.calls_per_s_kept / evaluation.rate_max(self.servers[profile.name]))
            found.append((math.ceil(replicas / profile.count_max), f"{replicas:,} × {profile.name}"))
        gpus, slices = min(found)
        enough = f"--gpus {gpus} is enough" if gpus <= GPUS_MAX else f"more than {GPUS_MAX} GPUs are needed"
        carried, _ = self.capacity(evaluation)
        return (
            f"--gpus {self.gpus}: too few for {demand.name}: one {self.gpu.key} carries {carried:,.0f} calls/s within"
            f" p99 {demand.p99_s * 1e3:g} ms, asked are {demand.calls_per_s:,.0f} × reserve {demand.reserve:g};"
            f" {enough} ({slices})"
        )

    def _model(self, evaluation: Evaluation, replicas: dict[str, int]) -> PlannedModel:
        demand, number = evaluation.demand, sum(replicas.values())
        servers = [self.servers[name] for name in replicas]
        shares = [count / number for count in replicas.values()]
        queues = [found for server in servers if (found := evaluation.queue(server, demand.calls_per_s / number))]
        together = mix(queues, shares, shares)
        services = [evaluation.service(server.part) for server in servers]
        mean = demand.calls_per_s_mean / number
        return PlannedModel(
            name=demand.name,
            replicas=replicas,
            calls_per_s=demand.calls_per_s,
            p50_ms=together.tail_s(0.5) * 1e3,
            p99_ms=together.tail_s(QUANTILE) * 1e3,
            p99_ms_max=demand.p99_s * 1e3,
            headroom=number * min(evaluation.rate_max(server) for server in servers) / demand.calls_per_s,
            busy_share=together.busy_share,
            batch_calls=together.batch_mean,
            dynamic_mj=1e3
            * sum(share * evaluation.joules(server, mean) for share, server in zip(shares, servers, strict=True)),
            basis=least_certain(service.basis for service in services),
            energy_basis=least_certain(service.energy_basis for service in services),
        )
