"""A seeded simulator of card transactions, in which the order and the company of events matter: docs/simulator.md."""

from cascade.simulator.oracle import Ceiling, ceiling, fraud_probability, label_probability
from cascade.simulator.settings import CATEGORIES, COUNTRIES, ENTRY_MODES, PATTERNS, Kind, SimulatorSettings
from cascade.simulator.simulation import Simulation, simulate, simulate_with_states

__all__ = [
    "CATEGORIES",
    "COUNTRIES",
    "ENTRY_MODES",
    "PATTERNS",
    "Ceiling",
    "Kind",
    "Simulation",
    "SimulatorSettings",
    "ceiling",
    "fraud_probability",
    "label_probability",
    "simulate",
    "simulate_with_states",
]
