"""Exact sliding-window features, point in time, over bounded state."""

from cascade.features.engine import FeatureBatch, FeatureEngine, KeyStatistics
from cascade.features.spec import FeatureSpec, load_spec, parse_spec

__all__ = ["FeatureBatch", "FeatureEngine", "FeatureSpec", "KeyStatistics", "load_spec", "parse_spec"]
