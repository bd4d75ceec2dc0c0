"""What a transaction costs, in a cascade and in deep-only, and the factor between them: one formula for all of Cascade.

    cascade   = c0 + s + e · D      c0: what every transaction costs, s: the screener, D: a deep decision
    deep-only = c0 + D              e: the share of the transactions that is escalated
    saving    = (c0 + D) ÷ (c0 + s + e · D)

Deep-only fills its calls better than the cascade, so D has two values here. Both services cost the same at the share

    e = (D of deep-only − s) ÷ D of the cascade
"""

from __future__ import annotations

from itertools import product

import msgspec

from cascade.ledger.deep_cost import Estimate


class UnitCosts(msgspec.Struct, frozen=True, kw_only=True):
    """mJ a transaction, of one kind of energy.

    shared_mj: c0, in both services, with their idle power.
    idle_mj: the part of c0 that is idle power, as far as it is known.
    screener_mj: s.
    deep_only_mj: D of a transaction in deep-only's calls.
    own_deep_mj: D of an escalated transaction in the cascade's own calls; None if it made none.

    >>> exact = lambda mj: Estimate(mj, mj, mj)
    >>> costs = UnitCosts(
    ...     shared_mj=exact(1.0),
    ...     idle_mj=exact(0.0),
    ...     screener_mj=0.5,
    ...     deep_only_mj=exact(49.0),
    ...     own_deep_mj=exact(50.0),
    ... )
    >>> costs.saving(0.01).value
    25.0
    """

    shared_mj: Estimate
    idle_mj: Estimate
    screener_mj: float
    deep_only_mj: Estimate
    own_deep_mj: Estimate | None

    def cascade_mj(self, share: float) -> Estimate:
        """mJ of a transaction in a cascade that escalates `share` of them; with none, of the screener alone."""
        own = self.own_deep_mj if share else None
        deep = (0.0, 0.0, 0.0) if own is None else (own.value, own.low, own.high)
        shared, fixed = self.shared_mj, self.screener_mj
        value, low, high = (
            base + fixed + share * of_deep
            for base, of_deep in zip((shared.value, shared.low, shared.high), deep, strict=True)
        )
        return Estimate(value, low, high)

    @property
    def whole_mj(self) -> Estimate:
        """mJ of a transaction in deep-only."""
        shared, deep = self.shared_mj, self.deep_only_mj
        return Estimate(shared.value + deep.value, shared.low + deep.low, shared.high + deep.high)

    def saving(self, share: float) -> Estimate:
        """How many times the cascade's energy deep-only needs, if the cascade escalates `share`; below 1: less.

        The ends combine the intervals, each at its less favourable end. c0 is on both sides, so it has one value in
        each combination. Raises ZeroDivisionError if the cascade costs nothing.
        """
        own = self.own_deep_mj if share and self.own_deep_mj is not None else Estimate(0.0, 0.0, 0.0)

        def factor(shared_mj: float, deep_mj: float, own_mj: float) -> float:
            return (shared_mj + deep_mj) / (shared_mj + self.screener_mj + share * own_mj)

        inputs = (self.shared_mj, self.deep_only_mj, own)
        ends = [factor(*corner) for corner in product(*((given.low, given.high) for given in inputs))]
        return Estimate(factor(*(given.value for given in inputs)), min(ends), max(ends))

    def saving_without_idle(self, share: float) -> Estimate | None:
        """The same, with idle power on neither side; None if the cascade then costs nothing surely above zero."""
        shared, idle = self.shared_mj, self.idle_mj
        ends = sorted((shared.low - idle.low, shared.high - idle.high))
        active = msgspec.structs.replace(self, shared_mj=Estimate(shared.value - idle.value, *ends))
        return active.saving(share) if active.cascade_mj(share).low > 0 else None

    def even_share(self) -> Estimate | None:
        """The escalated share at which both services cost the same; None if the cascade's own calls show no cost."""
        own, deep = self.own_deep_mj, self.deep_only_mj
        if own is None or own.low <= 0:
            return None

        def share(deep_mj: float, own_mj: float) -> float:
            return (deep_mj - self.screener_mj) / own_mj

        ends = [share(*corner) for corner in product((deep.low, deep.high), (own.low, own.high))]
        return Estimate(share(deep.value, own.value), min(ends), max(ends))
