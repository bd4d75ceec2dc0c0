"""Static members that are killed in mid-rebalance: when they are back, every partition is somebody's."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import msgspec
import pytest

from cascade.config import KafkaSettings
from streaming.kafka import make_consumer
from tests.streaming.kafka.helpers import Events, ignore, joined, poll_until

pytestmark = pytest.mark.kafka
# Killed when it has given a partition up, and has not joined for the round that hands it on.
KILLED = """
import os, sys
from cascade.config import KafkaSettings
from streaming.kafka import make_consumer

bootstrap, client, group, topic = sys.argv[1:]
kafka = KafkaSettings(bootstrap=bootstrap, client=client, group=group, instance="first")
consumer = make_consumer(kafka, group)
consumer.subscribe([topic], lambda partitions: print(len(partitions), flush=True), lambda partitions: os._exit(1))
while True:
    consumer.poll(0.05, 100)
"""


def member(kafka: KafkaSettings, name: str) -> KafkaSettings:
    return msgspec.structs.replace(kafka, instance=name)


def test_a_partition_that_was_on_its_way_when_its_owner_was_killed_is_handed_on(
    kafka: KafkaSettings, topic: str
) -> None:
    command = [sys.executable, "-c", KILLED, kafka.bootstrap, kafka.client, kafka.group, topic]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed,
        closing(make_consumer(member(kafka, "second"), kafka.group)) as second,
    ):
        assert killed.stdout is not None
        assert killed.stdout.readline() == "2\n"
        second.subscribe([topic], ignore, ignore)
        poll_until([second], lambda: killed.poll() is not None)
        # back well before its session is over
        with joined(member(kafka, "first"), topic) as first:
            poll_until([first, second], lambda: len(first.assignment()) == len(second.assignment()) == 1)


def test_a_member_of_a_settled_group_that_is_back_gets_its_partitions_without_a_rebalance(
    kafka: KafkaSettings, topic: str
) -> None:
    events = Events()
    with closing(make_consumer(member(kafka, "second"), kafka.group)) as second:
        with joined(member(kafka, "first"), topic) as first:
            second.subscribe([topic], events.note("assigned"), events.note("revoked"), events.note("lost"))
            poll_until([first, second], lambda: len(first.assignment()) == len(second.assignment()) == 1)
            had = first.assignment()
        with joined(member(kafka, "first"), topic) as again:
            poll_until([again, second], lambda: again.assignment() == had)
            assert len(events.seen) == 1
