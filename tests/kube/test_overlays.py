"""Each overlay, as the real API server takes it and the real controllers make pods of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.manifests import K8S, OVERLAYS
from tests.kube import pods
from tests.kube.kubectl import Kubectl, Object
from tests.kube.manifests import move, node, pod_spec, render_with
from tests.timing import wait_until

pytestmark = pytest.mark.kube

PLENTY = {"1g.5gb": 70, "2g.10gb": 10, "3g.20gb": 10, "1g.10gb": 10}
# What a cluster with all operators adds, one at least of each component.
COMPONENTS = ("monitoring", "keda", "keda-triton", "object-store", "strimzi")


@pytest.fixture(scope="module", autouse=True)
def _nodes(kubectl: Kubectl) -> Iterator[None]:
    kubectl.create([node("overlays-gpu", "overlays", PLENTY), node("overlays-plain", "overlays")])
    yield
    # A class that offers a slice as an extended resource would be tried for the pods of other tests too.
    kubectl("delete", "deviceclass", "--all")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_accepted_and_all_its_pods_run(kubectl: Kubectl, overlay: str) -> None:
    check(kubectl, kubectl.render(K8S / "overlays" / overlay), f"cascade-{overlay}")


def test_components_are_accepted_with_the_custom_resources_of_their_operators(kubectl: Kubectl, tmp_path: Path) -> None:
    objects = render_with(kubectl, tmp_path / "all", "a100-7x1g", COMPONENTS)
    check(kubectl, objects, "cascade-components")
    kinds = {each["kind"] for each in objects}
    assert kinds >= {"ScaledObject", "PodMonitor", "PrometheusRule", "KafkaTopic"}


def check(kubectl: Kubectl, objects: list[Object], namespace: str) -> None:
    """The API server takes the objects without a warning, and as many pods as they ask for become ready."""
    objects = move(objects, namespace, "overlays")
    # the server checks fields strictly for kubectl; Pod Security warns of a template whose pods it would refuse
    warnings = kubectl.apply(objects)
    assert warnings == ""

    wanted = sum(replicas(each) for each in objects)
    found: list[Object] = []

    def all_run() -> bool:
        found[:] = kubectl.items("pods", f"--namespace={namespace}")
        jobs = kubectl.items("jobs", f"--namespace={namespace}")
        return len(pods.ready(found)) == wanted and all(job.get("status", {}).get("succeeded") for job in jobs)

    wait_until(all_run, f"{wanted} pods in {namespace}", 60.0, lambda: pods.refusals(found))


def replicas(each: Object) -> int:
    """How many pods that stay the object makes; where it leaves that to an autoscaler, the one that it starts with."""
    if pod_spec(each) is None or each["kind"] == "Job":
        return 0
    return int(each["spec"].get("replicas", 1))
