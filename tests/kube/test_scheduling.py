"""The real scheduler with the planner's layouts: what was planned is placed, and what does not fit stays Pending."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.mig.gpus import find_gpu
from cascade.mig.overlay import write_overlay
from tests.k8s.manifests import K8S
from tests.kube import pods
from tests.kube.kubectl import Kubectl
from tests.kube.manifests import move, node
from tests.timing import wait_until

pytestmark = pytest.mark.kube

GPU = "a100-40gb"
# Two GPUs' worth of calls of a model that is too large for the smallest slices.
DEMAND = ("--gpus=2", "--rate=900000", "--escalated=0.1", "--p99=20ms", "--memory-gb=8", "--layouts=20")


def planned(directory: Path) -> tuple[list[dict[str, int]], dict[str, int]]:
    """The best layout of `cascade mig plan` with two profiles: slices of each GPU, and replicas by profile."""
    file = directory / "plan.json"
    command = [
        sys.executable,
        "-m",
        "cascade",
        "mig",
        "plan",
        f"--gpu={GPU}",
        *DEMAND,
        "--simulate=0",
        f"--json={file}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for layout in json.loads(file.read_bytes())["layouts"]:
        replicas = layout["models"][0]["replicas"]
        if len(replicas) == 2:
            return layout["gpus"], replicas
    pytest.fail("no layout of the plan has two profiles; ask for another demand")


def test_plan_is_placed_one_pod_a_slice_and_a_further_pod_stays_pending(kubectl: Kubectl, tmp_path: Path) -> None:
    gpus, replicas = planned(tmp_path)
    assert len(gpus) == 2
    kubectl.create([node(f"plan-{number}", "plan", slices) for number, slices in enumerate(gpus)])
    kubectl.create([node("plan-plain", "plan")])
    overlay = tmp_path / "overlay"
    write_overlay(overlay, replicas, find_gpu(GPU), os.path.relpath(K8S / "base", overlay))
    kubectl.apply(move(kubectl.render(overlay), "cascade-plan", "plan"))
    pods.wait_ready(kubectl, "cascade-plan", {"worker": 3, "triton": sum(replicas.values())})

    assert slices_in_use(kubectl) == {f"plan-{number}": slices for number, slices in enumerate(gpus)}

    profile, count = next(iter(replicas.items()))
    name = f"triton-{profile.replace('.', '-')}"
    kubectl("scale", f"deployment/{name}", f"--replicas={count + 1}", "--namespace=cascade-plan")
    assert_pending(kubectl, 1, f"2 Insufficient nvidia.com/mig-{profile}")
    assert len(pods.ready(pods.of_component(kubectl, "cascade-plan", "triton"))) == sum(replicas.values())


def slices_in_use(kubectl: Kubectl) -> dict[str, dict[str, int]]:
    """The slices that Triton's pods ask for, by node and profile."""
    used: dict[str, dict[str, int]] = {}
    for pod in pods.of_component(kubectl, "cascade-plan", "triton"):
        on_node = used.setdefault(pod["spec"]["nodeName"], {})
        for resource, count in pod["spec"]["containers"][0]["resources"]["limits"].items():
            if resource.startswith("nvidia.com/mig-"):
                profile = resource.removeprefix("nvidia.com/mig-")
                on_node[profile] = on_node.get(profile, 0) + int(count)
    return used


def assert_pending(kubectl: Kubectl, count: int, reason: str) -> None:
    """So many Triton pods cannot be placed, each for this reason."""

    def found() -> dict[str, str]:
        return pods.refusals(pods.of_component(kubectl, "cascade-plan", "triton"))

    wait_until(lambda: len(found()) == count, f"{count} pods that cannot be placed", 30.0, found)
    assert all(reason in message for message in found().values()), found()


def test_triton_waits_for_the_gpu_operator_to_finish_the_layout(kubectl: Kubectl) -> None:
    state = "nvidia.com/mig.config.state"
    kubectl.create(
        [node("dividing", "dividing", {"1g.5gb": 7}, labels={state: "pending"}), node("dividing-plain", "dividing")]
    )
    kubectl.apply(move(kubectl.render(K8S / "overlays" / "a100-7x1g"), "cascade-dividing", "dividing"))

    def waiting() -> dict[str, str]:
        return pods.refusals(pods.of_component(kubectl, "cascade-dividing", "triton"))

    wait_until(lambda: len(waiting()) == 7, "seven pods that wait", 30.0, waiting)
    assert all("didn't match Pod's node affinity/selector" in message for message in waiting().values())

    kubectl("label", "node", "dividing", f"{state}=success", "--overwrite")
    pods.wait_ready(kubectl, "cascade-dividing", {"triton": 7})


def test_a_worker_that_decides_displaces_triton_where_a_node_is_full(kubectl: Kubectl) -> None:
    """Priority: without Triton the screener decides alone, without a worker nobody decides."""
    crowded = node("crowded", "crowded", {"1g.5gb": 7})
    crowded["spec"]["taints"] = crowded["spec"]["taints"][:1]
    crowded["status"]["allocatable"] = {**crowded["status"]["allocatable"], "cpu": "7500m"}
    kubectl.create([crowded])
    objects = move(kubectl.render(K8S / "overlays" / "a100-7x1g"), "cascade-crowded", "crowded")
    workers = [each for each in objects if each["kind"] == "StatefulSet"]
    kubectl.apply([each for each in objects if each not in workers and each["kind"] != "Job"])
    pods.wait_ready(kubectl, "cascade-crowded", {"triton": 7})
    kubectl.apply(workers)

    def ready() -> tuple[int, int]:
        found = (pods.of_component(kubectl, "cascade-crowded", name) for name in ("worker", "triton"))
        workers, tritons = (len(pods.ready(each)) for each in found)
        return workers, tritons

    wait_until(lambda: ready() == (3, 4), "3 workers and 4 of 7 Tritons on 7.5 cores", 60.0, ready)
