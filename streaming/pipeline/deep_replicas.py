"""The replicas of the deep model's server, as metrics and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cascade.protocols import DeepStage, ReplicaState, Replicated


class ReplicaCollector(Collector):
    """The replicas of a deep stage as metrics: a sample for each that there is now, 64 at most.

    The counts of a replica end when its address vanishes.
    """

    def __init__(self, stage: Replicated) -> None:
        self._stage = stage

    def collect(self) -> Iterable[Metric]:
        """The families, at this moment."""
        states, labels = self._stage.replicas(), ["replica"]
        up = GaugeMetricFamily("cascade_deep_replica_up", "1 if the replica is ready for calls.", labels=labels)
        calls = CounterMetricFamily("cascade_deep_replica_calls", "Requests sent to the replica.", labels=labels)
        failures = CounterMetricFamily("cascade_deep_replica_failures", "Requests that failed there.", labels=labels)
        for state in states:
            up.add_metric([state.address], float(state.ready))
            calls.add_metric([state.address], state.calls)
            failures.add_metric([state.address], state.failures)
        yield GaugeMetricFamily(
            "cascade_deep_replicas_ready",
            "Replicas of the deep model's server that are ready for calls.",
            ready_count(states),
        )
        yield from (up, calls, failures)


def replica_states(deep: DeepStage) -> list[ReplicaState] | None:
    """The state of each replica of a deep stage; None for a stage without replicas."""
    return deep.replicas() if isinstance(deep, Replicated) else None


def ready_count(states: Sequence[ReplicaState]) -> int:
    """How many replicas are ready."""
    return sum(state.ready for state in states)


def replicas_text(states: Sequence[ReplicaState]) -> str:
    """How many replicas are ready, and the problem of the first that is not."""
    text = f"replicas ready: {ready_count(states)} of {len(states)}"
    problems = [f"{state.address}: {state.problem}" for state in states if not state.ready]
    return f"{text}; {problems[0]}" if problems else text
