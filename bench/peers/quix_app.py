"""A quix-streams application: a stateful step by card, on the library's own state store (RocksDB with a changelog).

A script, run in an environment of its own by `bench.peers.python_peers`. Features as in `scoring`, but none of the
terminal: state belongs to the key of the messages, the card, and another key would take the stream once more through
Kafka (`group_by`). That is less work than the others do. At least once, checkpoints every five seconds.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from scoring import (  # type: ignore[import-not-found]
    CARD_FEATURES,
    TRANSACTION_FEATURES,
    Card,
    Models,
    parse_arguments,
    transaction_features,
)


def main() -> None:
    """Decide until SIGTERM."""
    from quixstreams import Application, State, message_context  # type: ignore[import-not-found]

    arguments = parse_arguments("The quix-streams application.")
    models = Models(arguments, TRANSACTION_FEATURES + CARD_FEATURES)
    app = Application(
        broker_address=arguments.bootstrap,
        consumer_group=arguments.group,
        auto_offset_reset="earliest",
        commit_interval=arguments.commit_s,
        state_dir=arguments.state,
        loglevel=logging.WARNING,
    )
    transactions = app.topic(arguments.transactions, key_deserializer="bytes", value_deserializer="json")
    decisions = app.topic(arguments.decisions, key_serializer="bytes", value_serializer="json")

    def decide(one: dict[str, Any], key: bytes, timestamp_ms: int, headers: object, state: State) -> dict[str, Any]:
        time_ms, amount = one["event_time"], one["amount"]
        kept = state.get("card", {"days": [], "steps": []})
        card = Card(kept["days"], kept["steps"])
        values = [*transaction_features(time_ms, amount), *card.features(time_ms, amount)]
        state.set("card", kept)
        context = message_context()
        place = f"{context.topic}-{context.partition}-{context.offset}"
        decision: dict[str, Any] = models.decide(one, values, card.steps, place, timestamp_ms)
        return decision

    app.dataframe(transactions).apply(decide, stateful=True, metadata=True).to_topic(decisions)
    app.run()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(f"quix-streams: {type(error).__name__}: {error}")
