"""Rolling updates and the drain of a node, by the real controllers: never more pods down than the manifests allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.k8s.manifests import find
from tests.kube import pods
from tests.kube.kubectl import Kubectl, Object
from tests.kube.manifests import node, render
from tests.timing import wait_until

pytestmark = pytest.mark.kube

NAMESPACE = "cascade-disruption"
# As in the manifests, but shorter: the workers' 10 s, Triton's 5 s.
WORKER_READY_S, TRITON_READY_S = 3, 1


class Seen(NamedTuple):
    """A state of a pod, as a watch showed it."""

    name: str
    ready: bool
    ending: bool


@pytest.fixture(scope="module", autouse=True)
def _cascade(kubectl: Kubectl) -> None:
    """Seven Tritons on the seven slices of one node, three workers on another, and an empty node."""
    kubectl.create([node("disruption-gpu", "disruption", {"1g.5gb": 7}), node("disruption-a", "disruption")])
    objects = render(kubectl, "a100-7x1g", NAMESPACE, "disruption")
    find(objects, "StatefulSet", "cascade-worker")["spec"]["minReadySeconds"] = WORKER_READY_S
    find(objects, "Deployment", "triton-1g-5gb")["spec"]["minReadySeconds"] = TRITON_READY_S
    kubectl.apply(objects)
    pods.wait_ready(kubectl, NAMESPACE, {"worker": 3, "triton": 7})


@contextmanager
def watching(kubectl: Kubectl, component: str, log: Path) -> Iterator[list[Seen]]:
    """The states of a component's pods while the block runs; complete after it."""
    seen: list[Seen] = []
    columns = (
        'NAME:.metadata.name,READY:.status.conditions[?(@.type=="Ready")].status,ENDING:.metadata.deletionTimestamp'
    )
    selector = f"--selector=app.kubernetes.io/component={component}"
    arguments = ("pods", f"--namespace={NAMESPACE}", selector, "--watch", f"--output=custom-columns={columns}")
    watch = kubectl.start(log, "get", *arguments, "--no-headers")
    try:
        wait_until(lambda: log.stat().st_size > 0, "the watch", 20.0)
        yield seen
    finally:
        watch.terminate()
        watch.wait(10)
        for line in log.read_text().splitlines():
            name, ready, ending = line.split()
            seen.append(Seen(name, ready == "True", ending != "<none>"))


def fewest_ready(seen: list[Seen], pods_all: int) -> int:
    """The smallest number of ready pods at any time, once all were."""
    ready: set[str] = set()
    fewest = pods_all
    complete = False
    for state in seen:
        if state.ready and not state.ending:
            ready.add(state.name)
        else:
            ready.discard(state.name)
        complete = complete or len(ready) == pods_all
        if complete:
            fewest = min(fewest, len(ready))
    assert complete
    return fewest


def test_workers_are_updated_one_at_a_time_from_the_last_and_each_must_stay_ready(
    kubectl: Kubectl, tmp_path: Path
) -> None:
    with watching(kubectl, "worker", tmp_path / "watch.log") as seen:
        update(kubectl, "statefulset/cascade-worker", "worker=cascade:0.1.1")

    ended = list(dict.fromkeys(state.name for state in seen if state.ending))
    assert ended == ["cascade-worker-2", "cascade-worker-1", "cascade-worker-0"]
    assert fewest_ready(seen, 3) == 2

    by_name = {pod["metadata"]["name"]: pod for pod in pods.of_component(kubectl, NAMESPACE, "worker")}
    for earlier, later in ((2, 1), (1, 0)):
        waited = created(by_name[f"cascade-worker-{later}"]) - ready_since(by_name[f"cascade-worker-{earlier}"])
        # the API's times have whole seconds
        assert waited.total_seconds() >= WORKER_READY_S - 1


def test_triton_is_updated_although_no_slice_is_free(kubectl: Kubectl, tmp_path: Path) -> None:
    with watching(kubectl, "triton", tmp_path / "watch.log") as seen:
        update(kubectl, "deployment/triton-1g-5gb", "triton=nvcr.io/nvidia/tritonserver:25.07-py3")
    assert len({state.name for state in seen}) == 14
    assert fewest_ready(seen, 7) == 6


def update(kubectl: Kubectl, workload: str, image: str) -> None:
    """Sets the image of a workload's container, and waits until all pods have it."""
    kubectl("set", "image", workload, image, f"--namespace={NAMESPACE}")
    kubectl("rollout", "status", workload, f"--namespace={NAMESPACE}", "--timeout=80s")


def test_drain_waits_until_the_budget_allows_the_next_eviction(kubectl: Kubectl, tmp_path: Path) -> None:
    def on(name: str) -> int:
        found = pods.ready(pods.of_component(kubectl, NAMESPACE, "worker"))
        return sum(pod["spec"]["nodeName"] == name for pod in found)

    assert on("disruption-a") == 3
    log = tmp_path / "drain.log"
    drain = kubectl.start(
        log, "drain", "disruption-a", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s"
    )
    refused = "Cannot evict pod as it would violate the pod's disruption budget."
    wait_until(lambda: refused in log.read_text(), "a refused eviction", 40.0, log.read_text)

    def waiting() -> dict[str, str]:
        return pods.refusals(pods.of_component(kubectl, NAMESPACE, "worker"))

    # the evicted worker is made again and finds no node: the others stay where they are
    wait_until(lambda: len(waiting()) == 1, "one worker that waits for a node", 30.0, waiting)
    assert on("disruption-a") == 2
    assert drain.poll() is None

    kubectl.create([node("disruption-b", "disruption")])
    assert drain.wait(90) == 0, log.read_text()
    pods.wait_ready(kubectl, NAMESPACE, {"worker": 3})
    assert on("disruption-b") == 3


def ready_since(pod: Object) -> datetime:
    """When the pod became ready."""
    (condition,) = (each for each in pod["status"]["conditions"] if each["type"] == "Ready")
    return datetime.fromisoformat(condition["lastTransitionTime"])


def created(pod: Object) -> datetime:
    """When the pod was created."""
    return datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
