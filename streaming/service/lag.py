"""Watches the lag of each partition beside the loop: a partition with lag and no progress has failed.

A consumer may stop fetching a partition while it polls and sends heartbeats. Only the end of the log, compared with the
loop's position, shows this. The watch has its own thread and connection, so that the same fault does not stop it. It
also detects a lost broker while no records arrive and none are sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cascade.errors import BrokerError
from streaming.health_state import HealthState
from streaming.kafka import ConsumerClient, Partition

log = structlog.get_logger()
INTERVAL_S = 5.0
# A broker that does not answer for this long is lost; elections of leaders and coordinators take less.
LOST_S = 30.0
Positions = Mapping[Partition, int]
# The partition that a worker without partitions asks for, to see whether the broker answers.
SPARE_PARTITION_ID = 0


class LagWatch:
    """Shows each partition's lag in health, and fails liveness if a partition has lag and no progress.

    connect: makes the consumer of the watch. topic: of the partitions. positions: returns the loop's next offset by
    partition; empty if none is assigned, None while no worker runs. health: shows a component for each partition.
    stall_s_max: seconds with lag and no progress until the component fails; time without an answer of the broker does
    not count. lost: called with the broker's error after LOST_S without an answer. interval_s: between two comparisons.
    clock: monotonic seconds.
    """

    def __init__(
        self,
        connect: Callable[[], ConsumerClient],
        topic: str,
        positions: Callable[[], Positions | None],
        health: HealthState,
        stall_s_max: float,
        lost: Callable[[str], None],
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._topic = topic
        self._positions = positions
        self._health = health
        self._stall_s_max = stall_s_max
        self._lost = lost
        self._interval_s = interval_s
        self._clock = clock
        self._moved: dict[Partition, tuple[int, float]] = {}
        self._failed: set[Partition] = set()
        self._shown: set[Partition] = set()
        # replaced as a whole, so other threads may read it
        self._lags: dict[Partition, int] = {}
        self._no_answer_since_s: float | None = None
        self._consumer: ConsumerClient | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cascade-lag", daemon=True)

    def start(self) -> None:
        """Starts the watch."""
        self._thread.start()

    def lags(self) -> dict[Partition, int]:
        """The number of records that wait, by assigned partition; for any thread."""
        return self._lags

    def close(self) -> None:
        """Stops the watch and closes its connection."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._disconnect()

    def look(self) -> None:
        """Compares the positions with the ends of the log once."""
        found = self._positions()
        positions = found or {}
        for partition in self._shown - positions.keys():
            self._health.forget(_name(partition))
            self._moved.pop(partition, None)
            self._failed.discard(partition)
        self._shown = set(positions)
        if found is None:
            self._no_answer_since_s = None
            self._lags = {}
            return
        asked_s = self._clock()
        try:
            if self._consumer is None:
                self._consumer = self._connect()
            ends = self._consumer.end_offsets(positions or [(self._topic, SPARE_PARTITION_ID)])
        except BrokerError as error:
            self._disconnect()
            self._no_answer(str(error), asked_s)
            return
        if self._no_answer_since_s is not None:
            self._no_answer_since_s = None
            self._health.ok("broker")
        now_s = self._clock()
        self._lags = {
            partition: max(ends.get(partition, position) - position, 0) for partition, position in positions.items()
        }
        for partition, position in positions.items():
            self._judge(partition, position, self._lags[partition], now_s)

    def _no_answer(self, reason: str, asked_s: float) -> None:
        # time without the broker does not count as a stall of the loop
        self._moved.clear()
        self._health.waiting("broker", reason)
        if self._no_answer_since_s is None:
            self._no_answer_since_s = asked_s
        if self._clock() - self._no_answer_since_s > LOST_S:
            self._no_answer_since_s = None
            self._lost(reason)

    def _judge(self, partition: Partition, position: int, lag: int, now_s: float) -> None:
        name = _name(partition)
        before, since_s = self._moved.get(partition, (-1, now_s))
        if not lag or position != before:
            self._moved[partition] = (position, now_s)
            self._failed.discard(partition)
            self._health.ok(name, f"lag {lag:,}")
        elif now_s - since_s > self._stall_s_max:
            text = f"no progress for {now_s - since_s:.0f} s with {lag:,} records waiting"
            if partition not in self._failed:
                log.error("partition makes no progress", partition=partition[1], lag=lag)
            self._failed.add(partition)
            self._health.failed(name, text)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()

    def _disconnect(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            try:
                consumer.close()
            except BrokerError as error:
                log.debug("connection of the lag watch not closed in order", reason=str(error))


class LagCollector(Collector):
    """The assigned partitions and their lag as metrics; `positions` and `lags` as those of the LagWatch."""

    def __init__(self, positions: Callable[[], Positions | None], lags: Callable[[], Mapping[Partition, int]]) -> None:
        self._positions, self._lags = positions, lags

    def collect(self) -> Iterable[Metric]:
        """The families, at this moment."""
        yield GaugeMetricFamily(
            "cascade_assigned_partitions",
            "Partitions of this worker; a spare has none.",
            float(len(self._positions() or {})),
        )
        family = GaugeMetricFamily(
            "cascade_partition_lag_records",
            "Records that wait in the partitions of this worker.",
            labels=["topic", "partition"],
        )
        for (topic, number), lag in self._lags().items():
            family.add_metric([topic, str(number)], lag)
        yield family


def _name(partition: Partition) -> str:
    return f"partition {partition[0]}-{partition[1]}"
