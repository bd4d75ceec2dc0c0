"""The autoscaling that `k8s/components/keda-triton` and `k8s/components/keda` ship. A test compares it with them."""

from __future__ import annotations

from typing import Final

from cascade.mig.hpa import Behavior, Limit

# Of a Triton: calls that wait, and calls in flight.
WAITING: Final = 5.0
IN_FLIGHT: Final = 10.0
# Of a worker: records that wait in its partitions, and the share of its core that its loop may use (docs/scaling.md).
LAG: Final = 1_000.0
BUSY: Final = 0.6


def triton_behavior(replicas_min: int, replicas_max: int) -> Behavior:
    """How `keda-triton` scales the Tritons of a layout with one profile."""
    return Behavior(
        replicas_min=replicas_min,
        replicas_max=replicas_max,
        up=(Limit(pods=4),),
        down=(Limit(pods=1, period_s=60.0),),
        down_window_s=600.0,
    )


def worker_behavior(replicas_min: int, replicas_max: int) -> Behavior:
    """How `keda` scales the workers."""
    return Behavior(
        replicas_min=replicas_min,
        replicas_max=replicas_max,
        up=(Limit(pods=4, period_s=60.0),),
        down=(Limit(pods=1, period_s=120.0),),
        down_window_s=600.0,
    )
