"""The ledger's own error: a meter that cannot be read."""

from __future__ import annotations

from cascade.errors import CascadeError


class MeterError(CascadeError):
    """An energy counter is absent, forbidden or lost; the message names it and the remedy."""

    def __init__(self, meter: str, problem: str, remedy: str) -> None:
        self.meter, self.problem, self.remedy = meter, problem, remedy
        super().__init__(f"{meter}: {problem}; {remedy}")
