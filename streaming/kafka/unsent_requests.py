"""Retries a transaction's requests to an unreachable coordinator: kafka-python 3.0 drops them.

If the coordinator's node is down, kafka-python's sender gets a connection error, looks up the coordinator again and
drops the request that it was about to send: the transaction never ends, and the sender loops without a pause. If the
client returns "not ready" in place of the error, the sender retries the request.
"""

from __future__ import annotations

import time
from typing import Any

from kafka.errors import KafkaConnectionError

# The cluster names a dead node as coordinator for seconds, until its session expires: faster retries change nothing.
_PAUSE_S = 0.05


def retry_unsent_requests(client: Any) -> None:
    """Makes this client of a producer's sender return False, in place of a connection error, if a node is not ready."""
    await_ready = client.await_ready

    def await_ready_without_error(node: object, timeout_ms: float = 30_000) -> bool:
        try:
            return bool(await_ready(node, timeout_ms=timeout_ms))
        except KafkaConnectionError:
            time.sleep(_PAUSE_S)
            return False

    client.await_ready = await_ready_without_error
