"""Records that were fetched before a pause are given after the resume, whatever another partition gave meanwhile."""

from __future__ import annotations

import pytest

from cascade.config import KafkaSettings
from streaming.clients import ConsumerClient
from tests.streaming.clients.helpers import fill, gather

pytestmark = pytest.mark.kafka
COUNT = 400


def test_a_partition_that_was_paused_over_fetched_records_goes_on_after_resume(
    kafka: KafkaSettings, topic: str, outsider: ConsumerClient
) -> None:
    fill(kafka, topic, COUNT)
    outsider.assign(outsider.partitions_for(topic))
    # one record: the others that were fetched with it wait in the client
    while not (given := outsider.poll(0.1, 1)):
        pass
    (first,) = given
    outsider.pause([(first.topic, first.partition)])
    others = gather(outsider, COUNT, 3.0)
    assert others
    assert all(batch.partition != first.partition for batch in others)
    outsider.resume([(first.topic, first.partition)])
    rest = gather(outsider, COUNT - 1 - sum(map(len, others)))
    assert 1 + sum(map(len, others)) + sum(map(len, rest)) == COUNT
