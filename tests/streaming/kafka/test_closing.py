"""Closing in mid-rebalance, in a process of its own: a client that hangs holds the interpreter's lock."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cascade.config import KafkaSettings
from tests.streaming.kafka.helpers import fill

pytestmark = pytest.mark.kafka
PROGRAM = """
import sys, time
from cascade.config import KafkaSettings
from streaming.kafka import make_consumer
from tests.streaming.kafka.helpers import poll_until

bootstrap, client, group, topic = sys.argv[1:]
kafka = KafkaSettings(bootstrap=bootstrap, client=client, group=group)
first, second = make_consumer(kafka, group), make_consumer(kafka, group)

def revoked(partitions):
    first.commit(dict.fromkeys(partitions, (3, "on revoke")))
    print("revoked", [number for _, number in partitions])

first.subscribe([topic], lambda partitions: print("assigned", [number for _, number in partitions]), revoked)
poll_until([first], lambda: len(first.assignment()) == 2)
second.subscribe([topic], lambda partitions: None, lambda partitions: None)
poll_until([first, second], lambda: len(first.assignment()) == len(second.assignment()) == 1)
second.close()
# its partition is given to the first meanwhile, which does not take it
time.sleep(5.0)
print("closing")
first.close()
print("closed")
"""


def test_a_consumer_that_closes_before_it_took_an_assignment_still_commits_and_does_not_wait(
    kafka: KafkaSettings, topic: str
) -> None:
    fill(kafka, topic, 10)
    command = [sys.executable, "-c", PROGRAM, kafka.bootstrap, kafka.client, kafka.group, topic]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout.splitlines()
    owned = next(number for number in (0, 1) if f"revoked [{number}]" not in lines[: lines.index("closing")])
    assert lines[lines.index("closing") :] == ["closing", f"revoked [{owned}]", "closed"]
