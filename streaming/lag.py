"""Lag by partition, watched from outside the loop: records that wait while none is taken are a worker that is dead.

A consumer can stop fetching a partition and go on polling, heartbeating and looking well. Only the log's end against
the loop's position tells. The watch has a thread and a connection of its own: it must not die of the same cause. It is
also the one who notices a lost broker while nothing comes and nothing is sent.
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
from streaming.clients import ConsumerClient, Partition
from streaming.health import HealthState

log = structlog.get_logger()
INTERVAL_S = 5.0
# A broker that answers nobody for so long is lost: an election of leaders or coordinators takes less.
LOST_S = 30.0
Positions = Mapping[Partition, int]


class LagWatch:
    """Tells health of each partition's lag, and fails liveness where one has lag and no progress for `stall_s_max`.

    `positions` gives the loop's next offset by partition, empty where none is assigned. Nothing is concluded about the
    loop from a broker that does not answer; after `LOST_S` seconds of that `lost` is called with what the broker said.
    """

    def __init__(
        self,
        connect: Callable[[], ConsumerClient],
        positions: Callable[[], Positions],
        health: HealthState,
        stall_s_max: float,
        lost: Callable[[str], None],
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._positions = positions
        self._health = health
        self._stall_s_max = stall_s_max
        self._lost = lost
        self._interval_s = interval_s
        self._clock = clock
        self._moved: dict[Partition, tuple[int, float]] = {}
        self._failed: set[Partition] = set()
        self._told: set[Partition] = set()
        # replaced as a whole, so other threads may read it
        self._lags: dict[Partition, int] = {}
        self._away_since_s: float | None = None
        self._consumer: ConsumerClient | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cascade-lag", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def lags(self) -> dict[Partition, int]:
        """Records that wait, by partition that is ours; any thread may ask."""
        return self._lags

    def close(self) -> None:
        """Stop watching and release the connection."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._disconnect()

    def look(self) -> None:
        """Compare positions with the ends of the log, once."""
        positions = self._positions()
        for partition in self._told - positions.keys():
            self._health.forget(_name(partition))
            self._moved.pop(partition, None)
            self._failed.discard(partition)
        self._told = set(positions)
        if not positions:
            self._away_since_s = None
            self._lags = {}
            return
        asked_s = self._clock()
        try:
            if self._consumer is None:
                self._consumer = self._connect()
            ends = self._consumer.end_offsets(positions)
        except BrokerError as error:
            self._disconnect()
            self._is_away(str(error), asked_s)
            return
        if self._away_since_s is not None:
            self._away_since_s = None
            self._health.ok("broker")
        now_s = self._clock()
        self._lags = {
            partition: max(ends.get(partition, position) - position, 0) for partition, position in positions.items()
        }
        for partition, position in positions.items():
            self._judge(partition, position, self._lags[partition], now_s)

    def _is_away(self, reason: str, asked_s: float) -> None:
        # what the broker's absence cost is not held against the loop
        self._moved.clear()
        self._health.waiting("broker", reason)
        if self._away_since_s is None:
            self._away_since_s = asked_s
        if self._clock() - self._away_since_s > LOST_S:
            self._away_since_s = None
            self._lost(reason)

    def _judge(self, partition: Partition, position: int, lag: int, now_s: float) -> None:
        name = _name(partition)
        before, since_s = self._moved.get(partition, (-1, now_s))
        if not lag or position != before:
            self._moved[partition] = (position, now_s)
            self._failed.discard(partition)
            self._health.ok(name, f"lag {lag:,}")
        elif now_s - since_s > self._stall_s_max:
            text = f"{lag:,} records wait and none was taken for {now_s - since_s:.0f} s"
            if partition not in self._failed:
                log.error("partition stands still", partition=partition[1], lag=lag)
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
                log.debug("the watch's connection", problem=str(error))


class LagCollector(Collector):
    """The lag of each partition as a metric, as `lags` gives it."""

    def __init__(self, lags: Callable[[], Mapping[Partition, int]]) -> None:
        self._lags = lags

    def collect(self) -> Iterable[Metric]:
        """The family, at this moment."""
        family = GaugeMetricFamily(
            "cascade_partition_lag_records", "Records that wait, of the partitions that are ours.",
            labels=["topic", "partition"],
        )  # fmt: skip
        for (topic, number), lag in self._lags().items():
            family.add_metric([topic, str(number)], lag)
        yield family


def _name(partition: Partition) -> str:
    return f"partition {partition[0]}-{partition[1]}"
