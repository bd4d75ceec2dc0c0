"""The calls of one replica of several that a single dispatcher takes in turn."""

from __future__ import annotations

import numpy as np

from cascade.mig.arrivals import ArrivalProcess, Bursts


def every_nth_call(rate_per_s: float, replicas: int, bursts: Bursts | None = None) -> ArrivalProcess:
    """Each `replicas`-th call of a stream, `rate_per_s` of them in the mean: Erlang times between them."""
    stream = ArrivalProcess.at_replica(rate_per_s * replicas, bursts)
    skipped, last_to_first = np.eye(replicas, k=1), np.zeros((replicas, replicas))
    last_to_first[-1, 0] = 1.0
    d0 = np.kron(np.eye(replicas), stream.d0) + np.kron(skipped, stream.d1)
    return ArrivalProcess(d0, np.kron(last_to_first, stream.d1))
