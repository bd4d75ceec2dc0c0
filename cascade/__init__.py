"""Cascade: real-time fraud detection that spends deep-model compute only where it is needed."""

__version__ = "0.1.0"
