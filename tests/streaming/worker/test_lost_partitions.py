"""What a worker loses with a partition. The worker is real; broker, clock and model are the fault simulator's."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from bench.faults.broker import SimBroker
from bench.faults.disk import SimDisk
from bench.faults.process import SimProcess
from bench.faults.world import World
from streaming.pipeline.send import Sent
from streaming.worker.loop import Worker
from tests.streaming.worker.test_spares import faultless


@pytest.fixture
def worker() -> Worker:
    """A worker with exactly-once delivery that owns partitions 0 and 1."""
    options = faultless(partitions=2)
    options = replace(options, config=msgspec.structs.replace(options.config, delivery="exactly-once"))
    world = World(seed=1)
    broker, disk = SimBroker(world, options.broker), SimDisk(world, options.disk)
    process = SimProcess(world, broker, disk, options, 0, 0)
    world.processes.append(process)
    world.wait(2.0)
    assert process.worker is not None
    assert sorted(process.worker.positions) == [("transactions", 0), ("transactions", 1)]
    return process.worker


@pytest.mark.parametrize(("lost", "pending"), [(0, 0), (1, 1)])
def test_the_dead_letters_of_labels_go_with_partition_0_whose_next_owner_sends_them(
    worker: Worker, lost: int, pending: int
) -> None:
    sent = Sent({("labels", 0): np.array([5])}, np.zeros(0), "", None)
    worker._outbox.send("dead-letters", b"k", b"v", [], sent)
    worker._on_lost([("transactions", lost)])
    assert worker._outbox.pending == pending
