"""`python -m bench.silent run ...`: the service with a ledger that keeps nothing, to measure what the ledger costs.

For nothing else: such a service has no metrics, no energy and no accounts.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import streaming.service
from cascade.cli import main
from cascade.ledger import Ledger
from cascade.ledger.account import MeterState


class SilentLedger(Ledger):
    """Is told everything and keeps nothing."""

    def sample_energy(self) -> tuple[MeterState, ...]:
        """Without a meter."""
        return ()


def _nothing(*_: Any, **__: Any) -> None:
    pass


for _name in vars(Ledger):
    if _name.startswith(("record_", "count_", "add_", "set_")):
        setattr(SilentLedger, _name, _nothing)


def silence() -> None:
    """Give the service such a ledger, and neither a sampler of energy nor a journal."""
    service: Any = streaming.service
    service.Ledger = SilentLedger
    service.EnergySampler = service.journal_kept = lambda *_: contextlib.nullcontext()


if __name__ == "__main__":
    silence()
    sys.exit(main())
