"""A quix-streams application: a stateful step by card, on the library's state store (RocksDB with a changelog).

`bench.peers.python_peers` runs this script in a separate environment. Its features are those of `scoring` without the
terminal's: state belongs to the key of the messages, the card, and another key would take the stream through Kafka a
second time (`group_by`). So it does less work than the other peers. It delivers at least once, with a checkpoint every
five seconds.
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
    """Decides until SIGTERM."""
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

    def decide(
        transaction: dict[str, Any], key: bytes, timestamp_ms: int, headers: object, state: State
    ) -> dict[str, Any]:
        time_ms, amount = transaction["event_time"], transaction["amount"]
        stored = state.get("card", {"days": [], "steps": []})
        card = Card(stored["days"], stored["steps"])
        features = [*transaction_features(time_ms, amount), *card.features(time_ms, amount)]
        state.set("card", stored)
        context = message_context()
        decision_id = f"{context.topic}-{context.partition}-{context.offset}"
        decision: dict[str, Any] = models.decide(transaction, features, card.steps, decision_id, timestamp_ms)
        return decision

    app.dataframe(transactions).apply(decide, stateful=True, metadata=True).to_topic(decisions)
    app.run()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(f"quix-streams: {type(error).__name__}: {error}")
