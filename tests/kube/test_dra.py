"""Dynamic Resource Allocation: the real scheduler chooses MIG devices that do not overlap on a GPU's memory slices.

The ResourceSlices imitate those of NVIDIA's driver, by the placements of go-nvml's mock A100; they were not compared
with the driver's own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.k8s.manifests import K8S, find
from tests.kube import pods
from tests.kube.kubectl import Kubectl, Object
from tests.kube.manifests import move, node
from tests.timing import wait_until

pytestmark = pytest.mark.kube

NODE, NAMESPACE = "dra", "cascade-dra"
SMALL = "triton-1g-5gb"


@pytest.fixture(scope="module")
def devices(kubectl: Kubectl, part: Callable[[str], Path]) -> dict[str, set[str]]:
    """The memory slices of each device of a node with one A100."""
    kubectl.create([node(NODE, "dra", {}), node("dra-plain", "dra")])
    written = subprocess.run([part("nvml") / "dragen", NODE, "1"], check=True, capture_output=True, timeout=30)
    slices = json.loads(written.stdout)["items"]
    kubectl.apply(slices)
    return {
        device["name"]: {name for name in consumed["counters"] if name.startswith("memory-slice-")}
        for each in slices
        for device in each["spec"].get("devices", [])
        for consumed in device["consumesCounters"]
    }


def for_profile(each: Object, profile: str) -> Object:
    """The same object for another profile than 1g.5gb."""
    text = json.dumps(each).replace("1g.5gb", profile).replace("1g-5gb", profile.replace(".", "-"))
    other: Object = json.loads(text)
    return other


def test_slices_are_packed_and_wait_for_memory_of_one_another(kubectl: Kubectl, devices: dict[str, set[str]]) -> None:
    objects = move(kubectl.render(K8S / "overlays" / "mig-dra"), NAMESPACE, "dra")
    small = find(objects, "Deployment", SMALL)
    small["spec"]["replicas"] = 4
    one = {**small, "spec": {**small["spec"], "replicas": 1}}
    big, middle = for_profile(one, "3g.20gb"), for_profile(one, "2g.10gb")
    device_class = find(objects, "DeviceClass", "mig-1g-5gb")
    others = [each for each in objects if each["kind"] not in ("Deployment", "StatefulSet", "Job")]
    kubectl.apply([*others, for_profile(device_class, "3g.20gb"), for_profile(device_class, "2g.10gb")])

    for ready, each in enumerate((big, middle), start=1):
        kubectl.apply([each])
        pods.wait_ready(kubectl, NAMESPACE, {"triton": ready})
    kubectl.apply([small])

    def triton() -> list[Object]:
        return pods.of_component(kubectl, NAMESPACE, "triton")

    def settled() -> bool:
        found = triton()
        return len(found) == 6 and len(pods.ready(found)) + len(pods.refusals(found)) == 6

    wait_until(settled, "a verdict for each of six pods", 60.0, lambda: pods.refusals(triton()))
    waiting = pods.refusals(triton())
    # 3g and 2g take six of eight memory slices, and the last of the eight can begin no 1g
    assert 2 <= len(waiting) <= 3
    assert all("cannot allocate all claims" in message for message in waiting.values()), waiting
    assert_disjoint(kubectl, devices)

    kubectl("delete", "deployment", big["metadata"]["name"], f"--namespace={NAMESPACE}", "--cascade=foreground")
    pods.wait_ready(kubectl, NAMESPACE, {"triton": 5})
    assert_disjoint(kubectl, devices)


def assert_disjoint(kubectl: Kubectl, devices: dict[str, set[str]]) -> None:
    """No memory slice belongs to two of the claims' devices."""
    used: list[str] = []
    for claim in kubectl.items("resourceclaims", f"--namespace={NAMESPACE}"):
        for result in claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", []):
            used += devices[result["device"]]
    assert used
    assert len(used) == len(set(used)), sorted(used)


@pytest.fixture(scope="module", autouse=True)
def _classes_end_with_the_module(kubectl: Kubectl) -> object:
    yield
    # A class that offers a slice as an extended resource would be tried for the pods of other tests too.
    kubectl("delete", "deviceclass", "--all")
