"""Exact sliding-window features, point in time, over bounded state."""

from cascade.features.buffers import FeatureBuffers
from cascade.features.engine import FeatureBatch, FeatureEngine, KeyStatistics
from cascade.features.layout import PARTITIONS_MAX, STATE_LAYOUT
from cascade.features.spec import FeatureSpec, load_spec, parse_spec
from cascade.features.summaries import Summaries

__all__ = [
    "PARTITIONS_MAX",
    "STATE_LAYOUT",
    "FeatureBatch",
    "FeatureBuffers",
    "FeatureEngine",
    "FeatureSpec",
    "KeyStatistics",
    "Summaries",
    "load_spec",
    "parse_spec",
]
