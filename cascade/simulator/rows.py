"""Transactions and campaigns while they are made, as plain columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cascade.columns import Bool, Float64, Int64

Int8 = NDArray[np.int8]


class _Table:
    """Columns of equal length; the subclass is a dataclass of arrays."""

    __slots__ = ()

    def take(self, index: Int64 | Bool) -> Self:
        """The rows at these positions, or where a mask is true."""
        return type(self)(**{name: getattr(self, name)[index] for name in self._names()})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All rows of the parts, in their order."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls._names()})

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Rows(_Table):
    """Transactions in any order, each column [rows].

    - `time_ms`: since the start of the simulation. `amount`: EUR, not rounded.
    - `device`: number of the device, 0 where there is none. `kind` int8: see Kind.
    """

    card: Int64
    terminal: Int64
    time_ms: Int64
    amount: Float64
    device: Int64
    kind: Int8


@dataclass(frozen=True, slots=True)
class Campaigns(_Table):
    """Hidden states: what runs on which card or terminal, and with which parameters; each column [campaigns].

    The rows of a campaign lie in start_ms ≤ time < end_ms. Their amounts are of two lognormal parts.

    - `kind` int8: see Kind. `card`, `terminal`: -1 where any may be hit.
    - `rows` float64: the number of transactions that the campaign makes.
    - `share` float64: where the campaign turns purchases at `terminal` into frauds, the probability for each; else 0.
    - `pool`, `pool_other`: pools of terminals, each drawn with probability ½; -1 where `terminal` is given.
    - `device`: number of the device online; in shops there is none.
    - `log_amount`, `log_spread`: of the first part of the amounts; `log_amount_other`, `log_spread_other`: of the
      second one, which has the probability `other_share`.
    """

    kind: Int8
    card: Int64
    terminal: Int64
    start_ms: Int64
    end_ms: Int64
    rows: Float64
    share: Float64
    pool: Int64
    pool_other: Int64
    device: Int64
    log_amount: Float64
    log_spread: Float64
    log_amount_other: Float64
    log_spread_other: Float64
    other_share: Float64


_ABSENT: dict[str, Any] = {
    "card": -1,
    "terminal": -1,
    "rows": 0.0,
    "share": 0.0,
    "pool": -1,
    "pool_other": -1,
    "device": 0,
    "log_amount": 0.0,
    "log_spread": 1.0,
    "log_amount_other": 0.0,
    "log_spread_other": 1.0,
    "other_share": 0.0,
}
_INTEGERS = {"card", "terminal", "start_ms", "end_ms", "pool", "pool_other", "device"}


def make_campaigns(kind: int, count: int, **columns: Any) -> Campaigns:
    """`count` campaigns of a kind; a column that is not given has its value for `absent` throughout."""
    full: dict[str, Any] = {"kind": np.full(count, kind, np.int8)}
    for name, value in (_ABSENT | columns).items():
        dtype = np.int64 if name in _INTEGERS else np.float64
        full[name] = np.broadcast_to(np.asarray(value, dtype), (count,)).copy()
    return Campaigns(**full)
