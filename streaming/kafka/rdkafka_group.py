"""A consumer's membership in its group, as librdkafka's transactional producers take it."""

from __future__ import annotations

import ctypes
import weakref

from streaming.kafka.rdkafka_library import rdkafka


class GroupMetadata:
    """A membership (rd_kafka_consumer_group_metadata_t), which lives as long as this object.

    `client`: the address of the consumer's rd_kafka_t.
    """

    def __init__(self, client: int) -> None:
        self.address: int = rdkafka.consumer_group_metadata(client)
        weakref.finalize(self, rdkafka.consumer_group_metadata_destroy, self.address)


def member_id(client: int) -> str:
    """The id that the coordinator has given to a consumer; empty before it has joined, and when it is no member."""
    text = rdkafka.memberid(client)
    if text is None:
        return ""
    found = ctypes.string_at(text).decode()
    rdkafka.mem_free(client, text)
    return found
