"""`python -m bench.silent run ...`: the service with a ledger that records nothing, to measure what the ledger costs.

It has no other use: such a service reports no metrics, no energy and no decisions.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import streaming.service.serve
from cascade.cli import main
from cascade.ledger import Ledger
from cascade.ledger.account import MeterState


class SilentLedger(Ledger):
    """Accepts every call and records nothing."""

    def sample_energy(self) -> tuple[MeterState, ...]:
        """Returns no meters."""
        return ()


def _nothing(*_: Any, **__: Any) -> None:
    pass


for _name in vars(Ledger):
    if _name.startswith(("record_", "count_", "add_", "set_")):
        setattr(SilentLedger, _name, _nothing)


def silence() -> None:
    """Replace the service's ledger, and remove its energy sampler and its journal."""
    service: Any = streaming.service.serve
    service.Ledger = SilentLedger
    service.EnergySampler = service.journal_written = lambda *_: contextlib.nullcontext()


if __name__ == "__main__":
    silence()
    sys.exit(main())
