"""The project's manifests for the tests: what an overlay renders, put where a test wants it, and nodes for its pods."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.k8s.manifests import K8S, write_with
from tests.kube.control_plane import KWOK_ANNOTATION
from tests.kube.kubectl import Kubectl, Object

# The label and taint of a group of nodes, so that a test's pods run on its own nodes.
GROUP = "tests.cascade/nodes"
# Labels that the GPU operator and its feature discovery write.
GPU_LABELS = {
    "nvidia.com/gpu.present": "true",
    "nvidia.com/mig.strategy": "mixed",
    "nvidia.com/mig.config": "layout",
    "nvidia.com/mig.config.state": "success",
}


def render(kubectl: Kubectl, overlay: str, namespace: str, nodes: str) -> list[Object]:
    """The objects of an overlay in the namespace `namespace`, with their pods on the group `nodes`."""
    return move(kubectl.render(K8S / "overlays" / overlay), namespace, nodes)


def render_with(kubectl: Kubectl, directory: Path, overlay: str, components: Sequence[str]) -> list[Object]:
    """The objects of an overlay with components, by a kustomization that this writes to `directory`."""
    directory.mkdir()
    write_with(overlay, components, directory)
    return kubectl.render(directory)


def move(objects: Sequence[Object], namespace: str, nodes: str) -> list[Object]:
    """Copies of the objects in the namespace `namespace`, with their pods on the group `nodes`."""
    moved = copy.deepcopy(list(objects))
    for each in moved:
        metadata = each["metadata"]
        if each["kind"] == "Namespace":
            metadata["name"] = namespace
        elif "namespace" in metadata:
            metadata["namespace"] = namespace
        spec = pod_spec(each)
        if spec is not None:
            spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), GROUP: nodes}
            spec["tolerations"] = [*(spec.get("tolerations") or []), {"key": GROUP, "operator": "Exists"}]
    return moved


def pod_spec(each: Object) -> Object | None:
    """The specification of the pods that an object makes; None for an object that makes none."""
    template: Object | None = each.get("spec", {}).get("template")
    return template["spec"] if template is not None and each["kind"] in ("Deployment", "StatefulSet", "Job") else None


def node(
    name: str, group: str, slices: Mapping[str, int] | None = None, labels: Mapping[str, str] | None = None
) -> Object:
    """A node of KWOK's. `slices`: MIG slices by profile, as the device plugin would offer them. `labels`: further ones.

    A node with slices has the taint of GPU nodes, one with `slices={}` too: its slices are not the device plugin's.
    """
    resources = {f"nvidia.com/mig-{profile}": str(count) for profile, count in (slices or {}).items()}
    capacity = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "500Gi", **resources}
    taints = [{"key": GROUP, "value": group, "effect": "NoSchedule"}]
    if slices is not None:
        taints.append({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"})
        labels = {**GPU_LABELS, **(labels or {})}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {KWOK_ANNOTATION: "fake"},
            "labels": {"kubernetes.io/hostname": name, GROUP: group, **(labels or {})},
        },
        "spec": {"taints": taints},
        "status": {"phase": "Running", "capacity": capacity, "allocatable": capacity},
    }


def volumes(count: int) -> list[Object]:
    """A default storage class, and volumes that the control plane binds to claims of it: no provisioner runs here."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "tests", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
    }
    made = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"volume-{number}"},
            "spec": {
                "storageClassName": "tests",
                "capacity": {"storage": "10Gi"},
                "accessModes": ["ReadWriteOnce"],
                "hostPath": {"path": f"/volumes/{number}"},
            },
        }
        for number in range(count)
    ]
    return [storage_class, *made]
