"""Autoscaling by KEDA's real operator, the real autoscaler and a real Kafka.

The ScaledObjects are those of the overlay `autoscaled`; the tests replace addresses and topic, and the times that a
test cannot wait for: KEDA's polls, and how long a low number must last before pods go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from cascade.config import KafkaSettings
from streaming.kafka import TopicSpec, ensure_topics
from streaming.kafka.local_broker import LocalBroker
from tests.http_answers import answering
from tests.k8s.manifests import find
from tests.kube.control_plane import ControlPlane
from tests.kube.keda import PrometheusStandIn, start_keda
from tests.kube.kubectl import Kubectl, KubectlError, Object
from tests.kube.manifests import node, render
from tests.timing import wait_until

pytestmark = [pytest.mark.kube, pytest.mark.keda]

WORKER, TRITON, GROUP = "cascade-worker", "triton-1g-5gb", "cascade"
BUSY, QUEUE, IN_FLIGHT = "cascade_stage_cpu", "nv_inference_queue", "nv_inference_request"
POLL_S = 1
# The autoscaler's period is 2 s in the tests: so long, a number that it does not reach is one that it does not want.
SETTLED_S = 8.0
SCALED_S_MAX = 60.0
PARTITIONS, WORKERS_MIN, WORKERS_MAX, LAG_OF_A_WORKER = 12, 3, 12, 1000


@dataclass(frozen=True)
class World:
    """The cluster with KEDA, a broker, and a stand-in for Prometheus whose values a test sets."""

    kubectl: Kubectl
    broker: LocalBroker
    prometheus: PrometheusStandIn
    prometheus_url: str


@pytest.fixture(scope="module")
def world(
    control_plane: ControlPlane,
    part: Callable[[str], Path],
    kafka_parts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    start_keda(control_plane, part("keda"))
    control_plane.kubectl.create([node("keda", "keda"), node("keda-gpu", "keda", {"1g.5gb": 7})])
    prometheus = PrometheusStandIn()
    with (
        LocalBroker(tmp_path_factory.mktemp("kafka"), parts_dir=kafka_parts) as broker,
        answering(prometheus.answer) as url,
    ):
        yield World(control_plane.kubectl, broker, prometheus, url)


@pytest.fixture(autouse=True)
def idle(world: World) -> None:
    """Nobody is busy, until a test says so."""
    world.prometheus.failing = False
    world.prometheus.values.update({BUSY: 0.0, QUEUE: 0.0, IN_FLIGHT: 0.0})


class Workers:
    """The workers of a namespace, scaled by the lag of a topic of its own, or of none that exists.

    `quick`: without the manifests' limit of four workers a minute.
    """

    def __init__(
        self, world: World, name: str, bootstrap: str, partitions: int = PARTITIONS, quick: bool = False
    ) -> None:
        self.kubectl, self.namespace, self.topic, self.partitions = world.kubectl, f"cascade-{name}", name, partitions
        self._bootstrap = bootstrap
        if partitions:
            ensure_topics(KafkaSettings(bootstrap=bootstrap), [TopicSpec(name, partitions)])
        objects = scaled(world, self.namespace)
        scaler = find(objects, "ScaledObject", WORKER)["spec"]
        lag = next(trigger for trigger in scaler["triggers"] if trigger["type"] == "kafka")
        lag["metadata"] |= {"bootstrapServers": bootstrap, "topic": name}
        if quick:
            behavior = scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            behavior["scaleUp"]["policies"] = [{"type": "Pods", "value": WORKERS_MAX, "periodSeconds": 1}]
        self.kubectl.apply([each for each in objects if each["metadata"]["name"] != "triton"])

    def produce(self, records: int, *partitions: int) -> None:
        """Sends so many records to each of the partitions; none: to all."""
        producer = KafkaProducer(bootstrap_servers=self._bootstrap)
        for partition in partitions or range(self.partitions):
            for _ in range(records):
                producer.send(self.topic, b"{}", partition=partition)
        producer.flush()
        producer.close()

    def commit_all(self) -> None:
        """Commits the ends of all partitions, as a group that has decided everything."""
        consumer = KafkaConsumer(bootstrap_servers=self._bootstrap, group_id=GROUP, enable_auto_commit=False)
        partitions = [TopicPartition(self.topic, number) for number in range(self.partitions)]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        consumer.commit({partition: OffsetAndMetadata(end, "", -1) for partition, end in ends.items()})
        consumer.close()

    def replicas(self) -> int:
        """The number that the autoscaler has asked for."""
        return replicas(self.kubectl, self.namespace, f"statefulset/{WORKER}")

    def wait_for(self, count: int) -> float:
        """Waits until there are so many workers; returns the seconds."""
        return wait_until(lambda: self.replicas() == count, f"{count} workers", SCALED_S_MAX, self.report)

    def report(self) -> str:
        """The state of the ScaledObject and of the autoscaler."""
        return self.kubectl("describe", "scaledobject,hpa", f"--namespace={self.namespace}")

    def lag(self) -> float:
        """The lag as KEDA gives it to the autoscaler."""
        return metric(self.kubectl, self.namespace, WORKER, f"s0-kafka-{self.topic}")


def scaled(world: World, namespace: str) -> list[Object]:
    """The overlay, with the stand-in's address and times that a test can wait for."""
    objects = render(world.kubectl, "autoscaled", namespace, "keda")
    for each in objects:
        if each["kind"] == "ScaledObject":
            spec = each["spec"]
            spec["pollingInterval"] = POLL_S
            down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
            down["stabilizationWindowSeconds"] = 0
            down["policies"][0]["periodSeconds"] = 1
            for trigger in spec["triggers"]:
                if trigger["type"] == "prometheus":
                    trigger["metadata"]["serverAddress"] = world.prometheus_url
    return [each for each in objects if each["kind"] != "Job"]


def replicas(kubectl: Kubectl, namespace: str, workload: str) -> int:
    """The number of pods that a workload is asked to have."""
    return int(kubectl.get(workload, f"--namespace={namespace}")["spec"]["replicas"])


def metric(kubectl: Kubectl, namespace: str, scaler: str, name: str) -> float:
    """The value of a trigger, by the API that the autoscaler asks."""
    selector = f"labelSelector=scaledobject.keda.sh%2Fname%3D{scaler}"
    path = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{name}?{selector}"
    (item,) = json.loads(kubectl("get", "--raw", path))["items"]
    return quantity(item["value"])


def quantity(text: str) -> float:
    """A number as Kubernetes writes it: 1500m, 2, 9k."""
    scales = {"m": 1e-3, "k": 1e3, "M": 1e6}
    return float(text[:-1]) * scales[text[-1]] if text[-1] in scales else float(text)


def seen_within(count: Callable[[], int], seconds: float) -> set[int]:
    """The numbers that were seen within so many seconds."""
    seen, end_s = {count()}, time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(0.2)
        seen.add(count())
    return seen


def test_lag_adds_workers_four_a_minute_and_no_lag_takes_them_away(world: World) -> None:
    workers = Workers(world, "lag", world.broker.bootstrap)
    workers.commit_all()
    workers.wait_for(WORKERS_MIN)

    workers.produce(5 * LAG_OF_A_WORKER // PARTITIONS)
    assert workers.wait_for(5) < 30
    # eleven would be wanted now; the manifests allow two more in this minute
    workers.produce(6 * LAG_OF_A_WORKER // PARTITIONS)
    workers.wait_for(7)
    assert seen_within(workers.replicas, SETTLED_S) == {7}
    assert workers.lag() > 10 * LAG_OF_A_WORKER

    workers.commit_all()
    workers.wait_for(WORKERS_MIN)
    assert workers.lag() == 0


def test_there_are_never_more_workers_than_partitions(world: World) -> None:
    workers = Workers(world, "few-partitions", world.broker.bootstrap, partitions=4, quick=True)
    workers.commit_all()
    workers.produce(3 * LAG_OF_A_WORKER)
    workers.wait_for(4)
    assert seen_within(workers.replicas, SETTLED_S) == {4}


def test_there_are_never_more_workers_than_the_maximum(world: World) -> None:
    workers = Workers(world, "many-partitions", world.broker.bootstrap, partitions=WORKERS_MAX + 4, quick=True)
    workers.commit_all()
    workers.produce(2 * LAG_OF_A_WORKER)
    workers.wait_for(WORKERS_MAX)
    assert seen_within(workers.replicas, SETTLED_S) == {WORKERS_MAX}


def test_one_hot_partition_adds_no_worker(world: World) -> None:
    workers = Workers(world, "hot-partition", world.broker.bootstrap, quick=True)
    workers.commit_all()
    workers.produce(10 * LAG_OF_A_WORKER, 3)
    workers.wait_for(WORKERS_MIN)
    assert seen_within(workers.replicas, SETTLED_S) == {WORKERS_MIN}


def test_a_group_without_offsets_does_not_jump_to_the_maximum(world: World) -> None:
    workers = Workers(world, "no-offsets", world.broker.bootstrap, quick=True)
    workers.produce(LAG_OF_A_WORKER)
    workers.wait_for(WORKERS_MIN)
    assert seen_within(workers.replicas, SETTLED_S) == {WORKERS_MIN}
    assert workers.lag() <= PARTITIONS


def test_an_unreachable_broker_is_named_and_adds_no_worker(world: World) -> None:
    workers = Workers(world, "unreachable", "127.0.0.1:1", partitions=0, quick=True)
    wait_until(lambda: trouble(workers) != "", "Ready=False", SCALED_S_MAX, workers.report)
    assert "dial tcp 127.0.0.1:1: connect: connection refused" in trouble(workers)
    # without an autoscaler the number stays that of the new StatefulSet
    assert seen_within(workers.replicas, SETTLED_S) == {1}
    with pytest.raises(KubectlError, match="not found"):
        world.kubectl("get", "hpa", f"keda-hpa-{WORKER}", f"--namespace={workers.namespace}")


def trouble(workers: Workers) -> str:
    """Why the ScaledObject is not ready; empty while it is, or is new."""
    found = workers.kubectl.get("scaledobject", WORKER, f"--namespace={workers.namespace}").get("status", {})
    conditions = [each for each in found.get("conditions", []) if each["type"] == "Ready"]
    return "".join(each["message"] for each in conditions if each["status"] == "False")


def test_a_broker_that_goes_away_leaves_the_number_as_it_is(world: World, kafka_parts: Path, tmp_path: Path) -> None:
    """KEDA makes no Kafka client then, so it gives the autoscaler no figure at all, not even the fallback's."""
    with LocalBroker(tmp_path / "other", parts_dir=kafka_parts) as broker:
        workers = Workers(world, "gone", broker.bootstrap, quick=True)
        workers.commit_all()
        workers.produce(5 * LAG_OF_A_WORKER // PARTITIONS)
        workers.wait_for(5)

    def blind() -> bool:
        found = world.kubectl.get("hpa", f"keda-hpa-{WORKER}", f"--namespace={workers.namespace}")["status"]
        return any(each["reason"] == "FailedGetExternalMetric" for each in found["conditions"])

    wait_until(blind, "an autoscaler without figures", SCALED_S_MAX, workers.report)
    assert seen_within(workers.replicas, 2 * SETTLED_S) == {5}


def test_without_prometheus_the_fallback_holds(world: World) -> None:
    workers = Workers(world, "no-prometheus", world.broker.bootstrap, quick=True)
    workers.commit_all()
    workers.wait_for(WORKERS_MIN)
    world.prometheus.failing = True
    workers.wait_for(6)
    assert seen_within(workers.replicas, SETTLED_S) == {6}


def test_busy_workers_are_joined_by_others_without_any_lag(world: World) -> None:
    workers = Workers(world, "busy", world.broker.bootstrap, quick=True)
    workers.commit_all()
    workers.wait_for(WORKERS_MIN)
    world.prometheus.values[BUSY] = 4.2
    workers.wait_for(7)


@pytest.mark.parametrize(("name", "value", "count"), [(QUEUE, 20.0, 4), (IN_FLIGHT, 60.0, 6), (QUEUE, 500.0, 7)])
def test_triton_follows_queue_time_and_requests_in_flight(world: World, name: str, value: float, count: int) -> None:
    namespace = "cascade-triton"
    kubectl = world.kubectl
    try:
        kubectl("get", "scaledobject", "triton", f"--namespace={namespace}")
    except KubectlError:
        objects = scaled(world, namespace)
        kubectl.apply([each for each in objects if each["metadata"]["name"] != WORKER])

    def found() -> int:
        return replicas(kubectl, namespace, f"deployment/{TRITON}")

    wait_until(lambda: found() == 2, "the smallest number", SCALED_S_MAX, found)
    world.prometheus.values[name] = value
    wait_until(lambda: found() == count, f"{count} Tritons", SCALED_S_MAX, found)
