"""A plain loop, as most people write it: kafka-python, json, dictionaries, LightGBM's predict; a Triton call in line.

Features as in `bench.peers.scoring`, state in memory only and unbounded: a restart begins with none. At least once:
offsets are committed every few seconds, after the decisions before them were acknowledged.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from types import FrameType

from bench.peers.scoring import (
    CARD_FEATURES,
    TERMINAL_FEATURES,
    TRANSACTION_FEATURES,
    Card,
    Days,
    Models,
    add,
    means,
    parse_arguments,
    transaction_features,
)


class Stop:
    """Set by SIGTERM and SIGINT."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True


def main() -> None:
    """Decide until SIGTERM."""
    from kafka import KafkaConsumer, KafkaProducer

    stop = Stop()
    arguments = parse_arguments("The plain loop.")
    models = Models(arguments, TRANSACTION_FEATURES + TERMINAL_FEATURES + CARD_FEATURES)
    cards: dict[int, Card] = {}
    terminals: dict[int, Days] = {}
    # its default batch holds forty decisions only
    producer = KafkaProducer(bootstrap_servers=arguments.bootstrap.split(","), linger_ms=5, batch_size=131_072)
    consumer = KafkaConsumer(
        arguments.transactions,
        bootstrap_servers=arguments.bootstrap.split(","),
        group_id=arguments.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    committed_s = time.monotonic()
    while not stop.wanted:
        for records in consumer.poll(timeout_ms=100).values():
            for record in records:
                one = json.loads(record.value)
                time_ms, amount = one["event_time"], one["amount"]
                counts, sums = add(terminals.setdefault(one["terminal_id"], []), time_ms, amount)
                card = cards.setdefault(one["card_id"], Card([], []))
                values = [
                    *transaction_features(time_ms, amount), *counts, *means(counts, sums),
                    *card.features(time_ms, amount),
                ]  # fmt: skip
                place = f"{record.topic}-{record.partition}-{record.offset}"
                decision = models.decide(one, values, card.steps, place, record.timestamp)
                producer.send(arguments.decisions, key=record.key, value=json.dumps(decision).encode())
        if time.monotonic() - committed_s > arguments.commit_s:
            producer.flush()
            consumer.commit()
            committed_s = time.monotonic()
    producer.flush()
    consumer.commit()
    producer.close()
    consumer.close()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(f"plain loop: {type(error).__name__}: {error}")
