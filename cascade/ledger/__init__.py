"""What each decision cost: latency, energy and carbon, and whether the service level is met."""

from cascade.ledger.account import Account, CertifiedRecall, merge_accounts
from cascade.ledger.attribution import Books, MixedEnergyError, attribute
from cascade.ledger.carbon import Carbon, make_carbon
from cascade.ledger.energy import CpuIdleMeter, CpuModelMeter, EnergySampler, find_meters, watts_per_core
from cascade.ledger.errors import MeterError
from cascade.ledger.exemplars import DecidedRecords
from cascade.ledger.export import energy_metrics, ledger_registry
from cascade.ledger.figures import summarise
from cascade.ledger.journal import Journal, Run, merged_between, read_journal
from cascade.ledger.ledger import Ledger
from cascade.ledger.render import render
from cascade.ledger.sla import LatencyObjective, Path, ServiceLevel
from cascade.ledger.stage_clock import StageLaps
from cascade.ledger.summary import LedgerSummary, ModelQuality, QualityComparison

__all__ = [
    "Account",
    "Books",
    "Carbon",
    "CertifiedRecall",
    "CpuIdleMeter",
    "CpuModelMeter",
    "DecidedRecords",
    "EnergySampler",
    "Journal",
    "LatencyObjective",
    "Ledger",
    "LedgerSummary",
    "MeterError",
    "MixedEnergyError",
    "ModelQuality",
    "Path",
    "QualityComparison",
    "Run",
    "ServiceLevel",
    "StageLaps",
    "attribute",
    "energy_metrics",
    "find_meters",
    "ledger_registry",
    "make_carbon",
    "merge_accounts",
    "merged_between",
    "read_journal",
    "render",
    "summarise",
    "watts_per_core",
]
