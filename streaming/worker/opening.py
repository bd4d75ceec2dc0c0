"""Opens a worker: its connections in their order, and what to close after it. Everything outside it is passed in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields

import structlog

from cascade.errors import BrokerError
from streaming.kafka import ConsumerClient, ProducerClient
from streaming.worker.boundaries import InvariantError
from streaming.worker.loop import Parts, Surroundings, Worker

log = structlog.get_logger()
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports(Surroundings):
    """What lies outside a worker, for all its sessions, and what makes its connections.

    `make_producer`: a transactional one if `config.delivery` is exactly-once. `make_member`: a consumer in the worker's
    group. `make_reader`: a consumer outside any group.
    """

    make_producer: Callable[[], ProducerClient]
    make_member: Callable[[], ConsumerClient]
    make_reader: Callable[[], ConsumerClient]


def open_worker(ports: Ports, session: ExitStack) -> Worker:
    """Connects a new worker; `session` closes its connections. Raises BrokerError if one cannot be made."""

    def reader() -> ConsumerClient:
        made = ports.make_reader()
        session.callback(_quietly, made.close)
        return made

    # first of all: it ends a transaction that an earlier run of this worker left open
    producer = ports.make_producer()
    session.callback(_quietly, lambda: producer.close(CLOSE_S))
    consumer = ports.make_member()
    session.callback(_quietly, consumer.close)
    return Worker(
        Parts(
            **{field.name: getattr(ports, field.name) for field in fields(Surroundings)},
            producer=producer,
            consumer=consumer,
            label_consumer=reader(),
            summary_consumer=reader() if ports.config.terminals.share else None,
            open_consumer=ports.make_reader,
        )
    )


def _quietly(close: Callable[[], None]) -> None:
    """Closes a connection; logs the error of a lost broker, since the session's own error explains more.

    The same for a check that fails: a consumer that closes revokes its partitions, and the worker tries to commit.
    """
    try:
        close()
    except (BrokerError, InvariantError) as error:
        log.debug("connection not closed in order", reason=str(error))
