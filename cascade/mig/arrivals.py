"""How deep calls arrive: at a steady rate, with bursts, and at one replica of several."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Self

import msgspec
import numpy as np

from cascade.columns import Float64


class Bursts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bursts that begin at random: the rate is `factor` times higher in a burst than between two.

    share: of the time that is in bursts. mean_s: mean length of a burst; the lengths are exponential.
    """

    factor: Annotated[float, msgspec.Meta(ge=1, le=1_000)]
    share: Annotated[float, msgspec.Meta(ge=0.001, le=0.9)] = 0.05
    mean_s: Annotated[float, msgspec.Meta(ge=0.001, le=86_400)] = 1.0

    @property
    def peak(self) -> float:
        """The rate in a burst ÷ the mean rate."""
        return self.factor / (1.0 - self.share + self.factor * self.share)


@dataclass(frozen=True, eq=False)
class ArrivalProcess:
    """A Markovian arrival process (Lucantoni, "New results on the single server queue with a batch Markovian arrival
    process", Stochastic Models 7, 1991).

    d0, d1: float64 [phases, phases], transitions a second without and with an arrival. The rows of d0 + d1 add up to 0.

    >>> process = ArrivalProcess.at_replica(100.0, Bursts(factor=3.0, share=0.1, mean_s=0.5))
    >>> round(process.rate_per_s, 6), round(process.dispersion, 2)
    (100.0, 23.5)
    """

    d0: Float64
    d1: Float64

    @classmethod
    def at_replica(cls, rate_per_s: float, bursts: Bursts | None = None) -> Self:
        """The calls of one replica, `rate_per_s` in the mean: a Poisson process.

        With bursts, two phases switch its rate (a Markov-modulated Poisson process).
        """
        if bursts is None:
            return cls(np.array([[-rate_per_s]]), np.array([[rate_per_s]]))
        ending = 1.0 / bursts.mean_s
        beginning = ending * bursts.share / (1.0 - bursts.share)
        switches = np.array([[-beginning, beginning], [ending, -ending]])
        rates = np.diag([bursts.peak / bursts.factor, bursts.peak]) * rate_per_s
        return cls(switches - rates, rates)

    @cached_property
    def stationary(self) -> Float64:
        """Float64 [phases]: the share of time in each phase."""
        phases = len(self.d0)
        equations = np.vstack([(self.d0 + self.d1).T, np.ones(phases)])
        solution: Float64 = np.linalg.lstsq(equations, np.append(np.zeros(phases), 1.0))[0]
        return solution

    @cached_property
    def rate_per_s(self) -> float:
        """Arrivals a second in the mean."""
        return float((self.stationary @ self.d1).sum())

    @property
    def rate_per_s_max(self) -> float:
        """Arrivals a second in the busiest phase."""
        return float(self.d1.sum(axis=1).max())

    @cached_property
    def dispersion(self) -> float:
        """Index of dispersion for counts: variance ÷ mean of the arrivals in a long time; 1 is Poisson.

        Source: Fischer, Meier-Hellstern, "The Markov-modulated Poisson process (MMPP) cookbook", Performance
        Evaluation 18, 1993, for the general process.
        """
        phases = len(self.d0)
        deviation = np.linalg.inv(np.outer(np.ones(phases), self.stationary) - self.d0 - self.d1)
        spread = float((self.stationary @ self.d1 @ deviation @ self.d1).sum())
        return 1.0 - 2.0 * self.rate_per_s + 2.0 * spread / self.rate_per_s


def draw_arrivals_s(rate_per_s: float, bursts: Bursts | None, calls: int, chance: np.random.Generator) -> Float64:
    """Float64 [calls], ascending: drawn times of the calls of a stream, `rate_per_s` in the mean."""
    # in units of the mean rate, the calls are a Poisson process; bursts only stretch and squeeze its time
    work = np.cumsum(chance.exponential(1.0, calls))
    if bursts is None:
        return work / rate_per_s
    quiet_per_s = rate_per_s / (1.0 - bursts.share + bursts.factor * bursts.share)
    quiet_mean_s = bursts.mean_s * (1.0 - bursts.share) / bursts.share
    pairs = int(work[-1] / (quiet_per_s * quiet_mean_s)) + 1
    lengths = chance.exponential(np.tile([quiet_mean_s, bursts.mean_s], pairs))
    lengths[-2] += work[-1] / quiet_per_s  # the stretches must last as long as the calls do
    rates = np.tile([quiet_per_s, quiet_per_s * bursts.factor], pairs)
    starts_s, starts_work = np.cumsum(np.append(0.0, lengths)), np.cumsum(np.append(0.0, lengths * rates))
    times: Float64 = np.interp(work, starts_work, starts_s)
    return times
