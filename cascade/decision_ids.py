"""The id of a decision."""

from __future__ import annotations


def decision_id(topic: str, partition_id: int, offset: int) -> str:
    """Returns `topic-partition-offset` of the transaction's record.

    A record that is decided again after a crash gets the same id, even from another bundle, so that a consumer can drop
    the repeated decision.

    >>> decision_id("transactions", 3, 7)
    'transactions-3-7'
    """
    return f"{topic}-{partition_id}-{offset}"
