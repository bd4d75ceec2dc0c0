"""Kubernetes' HorizontalPodAutoscaler as an algorithm: the replicas that it asks for, from metrics of all pods.

Source: Kubernetes documentation, "Horizontal Pod Autoscaling", algorithm details and configurable scaling behavior
(`autoscaling/v2`); metrics are external ones with an average value per pod, as KEDA makes them:

    wanted = ⌈metric ÷ target⌉   unless metric ÷ (target · replicas) is within 10 % of 1; the largest over the metrics

Then come the behavior's limits. A stabilization window takes the largest wish within it before it scales down. A policy
limits the change in a period: so many pods, or so many per cent of the replicas at its beginning; several policies of
one direction allow what the most generous one does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec

# `--horizontal-pod-autoscaler-tolerance` and `--horizontal-pod-autoscaler-sync-period` of the controller manager.
TOLERANCE = 0.1
SYNC_S = 15.0


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """A policy of one direction; `pods` or `percent` in `period_s`."""

    pods: int | None = None
    percent: float | None = None
    period_s: float = 15.0

    def change(self, replicas: int) -> int:
        """Pods by which so many replicas may change in a period."""
        return self.pods if self.pods is not None else math.ceil(replicas * (self.percent or 0.0) / 100.0)


class Behavior(msgspec.Struct, frozen=True, kw_only=True):
    """`behavior` of an autoscaler; by default what Kubernetes does without one."""

    replicas_min: int
    replicas_max: int
    up: tuple[Limit, ...] = (Limit(pods=4), Limit(percent=100.0))
    down: tuple[Limit, ...] = (Limit(percent=100.0),)
    down_window_s: float = 300.0


class Autoscaler:
    """Decides the replicas at each sync; `replicas`: those at the beginning."""

    def __init__(self, behavior: Behavior, replicas: int) -> None:
        self._behavior = behavior
        self._period_s_max = max(limit.period_s for limit in (*behavior.up, *behavior.down))
        self.replicas = replicas
        self._wishes: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def sync(self, now_s: float, metrics: Sequence[tuple[float, float]]) -> int:
        """The replicas from now on. metrics: pairs of the total over all pods, and the target for one pod."""
        behavior = self._behavior
        wish = max(self._wanted(total, target) for total, target in metrics)
        wish = min(max(wish, behavior.replicas_min), behavior.replicas_max)
        if not self._wishes:
            self._wishes.append((now_s, self.replicas))
        while self._wishes and self._wishes[0][0] <= now_s - behavior.down_window_s:
            self._wishes.popleft()
        self._wishes.append((now_s, wish))
        if wish < self.replicas:
            wish = min(self.replicas, max(found for _, found in self._wishes))
        while self._changes and self._changes[0][0] <= now_s - self._period_s_max:
            self._changes.popleft()
        if wish > self.replicas:
            allowed = max(self._allowed(now_s, limit, +1) for limit in behavior.up)
            wish = min(wish, max(allowed, self.replicas))
        elif wish < self.replicas:
            allowed = min(self._allowed(now_s, limit, -1) for limit in behavior.down)
            wish = max(wish, min(allowed, self.replicas))
        if wish != self.replicas:
            self._changes.append((now_s, wish - self.replicas))
            self.replicas = wish
        return self.replicas

    def _wanted(self, total: float, target: float) -> int:
        ratio = total / (target * self.replicas)
        return self.replicas if abs(ratio - 1.0) <= TOLERANCE else math.ceil(total / target)

    def _allowed(self, now_s: float, limit: Limit, sign: int) -> int:
        """The replicas that a policy allows now, counted from those at the beginning of its period."""
        start = self.replicas - sum(change for at_s, change in self._changes if at_s > now_s - limit.period_s)
        return start + sign * limit.change(start)
