"""A plain loop, as most people write it: kafka-python, json, dictionaries, LightGBM's predict, a blocking Triton call.

Its features are those of `bench.peers.scoring`. Its state is in memory only and unbounded, and a restart begins with an
empty state. It delivers at least once: it commits offsets every few seconds, after the broker has acknowledged the
decisions before them.
"""

from __future__ import annotations

import json
import sys
import time

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
from bench.peers.stop import Stop


def main() -> None:
    """Decides until SIGTERM."""
    from kafka import KafkaConsumer, KafkaProducer

    stop = Stop()
    arguments = parse_arguments("The plain loop.")
    models = Models(arguments, TRANSACTION_FEATURES + TERMINAL_FEATURES + CARD_FEATURES)
    cards: dict[int, Card] = {}
    terminals: dict[int, Days] = {}
    # kafka-python's default batch of 16 KiB has room for only forty decisions
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
                transaction = json.loads(record.value)
                time_ms, amount = transaction["event_time"], transaction["amount"]
                counts, sums = add(terminals.setdefault(transaction["terminal_id"], []), time_ms, amount)
                card = cards.setdefault(transaction["card_id"], Card([], []))
                terminal_features = (*counts, *means(counts, sums))
                features = [*transaction_features(time_ms, amount), *terminal_features, *card.features(time_ms, amount)]
                decision_id = f"{record.topic}-{record.partition}-{record.offset}"
                decision = models.decide(transaction, features, card.steps, decision_id, record.timestamp)
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
