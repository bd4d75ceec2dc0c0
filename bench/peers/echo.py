"""The echo: polls one message, produces one message with the same key, and does nothing else.

It is the floor of any service that reads and writes Kafka a message at a time: no decoding, no features, no model. Its
messages are decisions with constant values, so that an observer reads them like those of a service; only `decision_id`
names the record. It delivers at least once: it commits what the broker has acknowledged.
"""

from __future__ import annotations

import argparse
import sys
import time

from bench.peers.stop import Stop

# Partition id and offset of the record are filled in.
MESSAGE = (
    b'{"transaction_id":0,"decision":"approve","score":0.0,"stage":"screener","screener_score":0.0,"bundle":"echo",'
    b'"degraded":false,"degraded_cause":null,"decision_id":"echo-%d-%d","duplicate":false,"first_decision_id":null,'
    b'"event_time_ms":0,"decision_time_ms":0,'
    b'"latency_ms":{"queue":0.0,"features":0.0,"screener":0.0,"deep":0.0,"total":0.0}}'
)


def main() -> None:
    """Echoes until SIGTERM."""
    from confluent_kafka import Consumer, KafkaException, Producer

    stop = Stop()
    arguments = _parse_arguments()
    producer = Producer({"bootstrap.servers": arguments.bootstrap, "linger.ms": 0, "acks": "all"})
    consumer = Consumer(
        {
            "bootstrap.servers": arguments.bootstrap,
            "group.id": arguments.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([arguments.transactions])
    committed_s, uncommitted = time.monotonic(), False
    while not stop.wanted:
        message = consumer.poll(arguments.commit_s)
        if message is not None:
            if message.error() is not None:
                raise KafkaException(message.error())
            value = MESSAGE % (message.partition(), message.offset())
            producer.produce(arguments.decisions, value, message.key())
            uncommitted = True
        producer.poll(0)
        if uncommitted and time.monotonic() - committed_s >= arguments.commit_s:
            producer.flush()
            consumer.commit(asynchronous=True)
            committed_s, uncommitted = time.monotonic(), False
    producer.flush()
    if uncommitted:
        consumer.commit(asynchronous=False)
    consumer.close()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The echo.")
    for name in ("bootstrap", "transactions", "decisions", "group"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--commit-s", type=float, required=True, help="time between commits")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(f"echo: {type(error).__name__}: {error}")
