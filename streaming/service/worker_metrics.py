"""Merges the metrics of several workers into an exposition whose samples have the worker's number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

LABEL = "worker"
Groups = Mapping[str, Iterable[Metric]]


class WorkersCollector(Collector):
    """Collects `groups` at each scrape, and returns a family for each name; the group's name is the label `worker`.

    Type and help are those of the first group: all groups run the same code.
    """

    def __init__(self, groups: Callable[[], Groups]) -> None:
        self._groups = groups

    def collect(self) -> Iterable[Metric]:
        """All families, at this moment."""
        families: dict[str, Metric] = {}
        for worker, metrics in self._groups().items():
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples += [
                    sample._replace(labels={LABEL: worker, **sample.labels}) for sample in metric.samples
                ]
        return families.values()


def workers_registry(groups: Callable[[], Groups]) -> CollectorRegistry:
    """Returns a separate registry with the collector, for `prometheus_client.exposition`."""
    registry = CollectorRegistry()
    registry.register(WorkersCollector(groups))
    return registry
