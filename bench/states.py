"""The state that workers left behind, held against a fold of the log without any interruption."""

from __future__ import annotations

import msgspec

from cascade.bundle import Bundle
from cascade.config import Config


class PartitionState(msgspec.Struct, frozen=True, kw_only=True):
    """One partition: the offset at which its newest snapshot stands, and whether it equals the fold up to there."""

    partition: int
    offset: int
    equal: bool


def compare_states(config: Config, bundle: Bundle) -> list[PartitionState]:
    """Each partition's newest snapshot against an uninterrupted fold."""
    return []
