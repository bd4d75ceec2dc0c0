"""`python -m tests.e2e.killed_at_commit run ...`: the service, killed (SIGKILL) at its first commit of new offsets.

The broker has acknowledged decisions by then (with exactly-once delivery: in an open transaction), and no offset of
them is committed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from cascade.cli import main
from streaming.kafka.kafka_consumer import KafkaPythonConsumer
from streaming.kafka.rdkafka_consumer import RdkafkaConsumer
from streaming.kafka.rdkafka_transactions import RdkafkaTransactionalProducer


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_offsets(client: type[Any]) -> None:
    """Let a consumer of this class kill the process when it is to commit new offsets of transactions."""
    commit = client.commit

    def commit_or_die(self: Any, offsets: Any) -> None:
        before = self.committed(list(offsets))
        for (topic, partition), (offset, _) in offsets.items():
            if topic.startswith("transactions") and offset > before.get((topic, partition), (0, ""))[0]:
                killed()
        commit(self, offsets)

    client.commit = commit_or_die


def die_in_transaction(client: type[Any]) -> None:
    """Let a producer of this class kill the process when its transaction is complete but for the commit."""

    def die(self: Any, *_: Any) -> None:
        self.flush(30)
        killed()

    client.commit = die


if __name__ == "__main__":
    for consumer in (KafkaPythonConsumer, RdkafkaConsumer):
        die_before_offsets(consumer)
    die_in_transaction(RdkafkaTransactionalProducer)
    sys.exit(main())
