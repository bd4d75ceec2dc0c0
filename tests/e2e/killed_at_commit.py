"""`python -m tests.e2e.killed_at_commit run ...`: the service, which a fault kills (SIGKILL) at its first commit of new offsets.

The broker has acknowledged decisions by then (with exactly-once delivery: in an open transaction), and no offset of
them is committed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from cascade.cli import main
from streaming.clients.kafka_consumer import KafkaPythonConsumer
from streaming.clients.kafka_transactions import KafkaPythonTransactionalProducer
from streaming.clients.rdkafka_consumer import RdkafkaConsumer
from streaming.clients.rdkafka_transactions import RdkafkaTransactionalProducer


def at_first_commit(client: type[Any]) -> None:
    """Let a consumer or transactional producer of this class kill the process at its first commit of new offsets."""
    commit = client.commit

    def die(self: Any, offsets: Any, *more: Any) -> None:
        if client in TRANSACTIONAL and offsets:
            self._producer.flush(30)
            os.kill(os.getpid(), signal.SIGKILL)
        before = {} if client in TRANSACTIONAL else self.committed(list(offsets))
        if any(offset > before.get(partition, (0, ""))[0] for partition, (offset, _) in offsets.items()):
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, offsets, *more)

    client.commit = die


TRANSACTIONAL = (KafkaPythonTransactionalProducer, RdkafkaTransactionalProducer)

if __name__ == "__main__":
    for kafka_client in (KafkaPythonConsumer, RdkafkaConsumer, *TRANSACTIONAL):
        at_first_commit(kafka_client)
    sys.exit(main())
