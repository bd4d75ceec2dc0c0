"""The metrics of several workers as one exposition: each sample with its worker's number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

LABEL = "worker"
Groups = Mapping[str, Iterable[Metric]]


def parse_metrics(text: str) -> list[Metric]:
    """The families of an exposition, OpenMetrics or the classic text; raises ValueError where it is neither."""
    if text.endswith("# EOF\n"):
        return list(openmetrics.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    return list(text_string_to_metric_families(text))


def merge_metrics(groups: Groups) -> list[Metric]:
    """One family of each name, with the samples of all groups; the group's name is the label `worker`.

    What the groups say of a name's type and help is the first one's: they run the same code.
    """
    families: dict[str, Metric] = {}
    for worker, metrics in groups.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [_labelled(sample, worker) for sample in metric.samples]
    return list(families.values())


def _labelled(sample: Sample, worker: str) -> Sample:
    return sample._replace(labels={LABEL: worker, **sample.labels})


class WorkersCollector(Collector):
    """Asks `groups` at each scrape, and merges what they say."""

    def __init__(self, groups: Callable[[], Groups]) -> None:
        self._groups = groups

    def collect(self) -> Iterable[Metric]:
        """All families, at this moment."""
        return merge_metrics(self._groups())


def workers_registry(groups: Callable[[], Groups]) -> CollectorRegistry:
    """A registry of its own that holds the collector, for `prometheus_client.exposition`."""
    registry = CollectorRegistry()
    registry.register(WorkersCollector(groups))
    return registry
