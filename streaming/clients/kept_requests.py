"""Requests of a transaction to a coordinator that cannot be reached, which kafka-python 3.0 drops.

Where the coordinator's node is gone, the vendor's sender gets an error while it connects, looks for the coordinator
anew, and forgets the request that it was about to send: the transaction waits for ever, and the sender turns without
rest. Where the client says that the node is not ready, instead of raising, the request is kept and tried again.
"""

from __future__ import annotations

import time
from typing import Any

from kafka.errors import KafkaConnectionError

# A node that is gone is named as coordinator until the others miss it (seconds); asking more often is no use.
_PAUSE_S = 0.05


def keep_unsent_requests(client: Any) -> None:
    """Make this client of a producer's sender say that a node is not ready where it would raise."""
    await_ready = client.await_ready

    def await_ready_quietly(node: object, timeout_ms: float = 30_000) -> bool:
        try:
            return bool(await_ready(node, timeout_ms=timeout_ms))
        except KafkaConnectionError:
            time.sleep(_PAUSE_S)
            return False

    client.await_ready = await_ready_quietly
