"""Compiles the kernels of the client on librdkafka ahead of the first record."""

from __future__ import annotations

from streaming.kafka.rdkafka_messages import MessageReader
from streaming.kafka.rdkafka_producer_handle import ProducerHandle

_NO_QUEUE = 0


def compile_client_kernels() -> None:
    """Compiles what a consumer and a producer call; no broker is needed."""
    MessageReader(_NO_QUEUE)
    ProducerHandle({"error_cb": lambda error: None}).destroy()
