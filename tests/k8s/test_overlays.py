"""Every overlay, alone and with each component: it renders, the API takes it, and it keeps the policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.k8s import manifests
from tests.k8s.manifests import COMPONENTS, OVERLAYS, Objects, find, of_kind, render, render_with
from tests.k8s.policies import violations
from tests.k8s.schemas import VERSIONS, is_custom, problem

# The other overlays are these with another cascade.toml, profile or component.
SHAPES = ("local", "a100-7x1g", "a100-balanced", "canary")
# Of these, where a component does not fit, and why.
UNFIT = {
    ("a100-balanced", "keda-triton"): "several profiles",
    ("canary", "keda-triton"): "several Deployments",
    ("local", "object-store"): "has no volume to replace",
}
# Components that change what another one adds.
NEEDS = {"keda-tls": ["keda"]}
PAIRS = [(shape, component) for component in COMPONENTS for shape in SHAPES if (shape, component) not in UNFIT]


def refused(objects: Objects) -> list[str]:
    """What an API server would refuse."""
    found = [(item, problem(item)) for item in objects]
    return [f"{item['kind']} {item['metadata']['name']}: {text}" for item, text in found if text is not None]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_what_the_last_three_versions_of_kubernetes_take(overlay: str) -> None:
    assert len(VERSIONS) == 3
    assert refused([item for item in render(overlay) if not is_custom(item)]) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_the_policies(overlay: str) -> None:
    assert violations(render(overlay)) == []


@pytest.mark.parametrize(("overlay", "component"), PAIRS)
def test_an_overlay_with_a_component_keeps_the_policies(overlay: str, component: str, tmp_path: Path) -> None:
    objects = render_with(overlay, [*NEEDS.get(component, []), component], tmp_path)
    assert refused([item for item in objects if not is_custom(item)]) == []
    assert violations(objects) == []


def test_all_components_together_keep_the_policies(tmp_path: Path) -> None:
    objects = render_with("a100-7x1g", sorted(COMPONENTS, key=lambda name: name in NEEDS), tmp_path)
    assert violations(objects) == []


@pytest.mark.parametrize("component", ["keda", "keda-tls", "keda-triton", "monitoring", "strimzi"])
def test_custom_resources_are_what_their_definitions_take(component: str, tmp_path: Path) -> None:
    objects = render_with("a100-7x1g", [*NEEDS.get(component, []), component], tmp_path)
    custom = [item for item in objects if is_custom(item)]
    assert custom
    assert refused(custom) == []


def test_an_unknown_or_wrong_field_of_a_custom_resource_is_found() -> None:
    (scaled,) = (item for item in of_kind(render("autoscaled"), "ScaledObject") if item["metadata"]["name"] == "triton")
    scaled["spec"]["maxReplicas"] = 7
    assert "maxReplicas" in str(problem(scaled))
    del scaled["spec"]["maxReplicas"]
    scaled["spec"]["maxReplicaCount"] = "seven"
    assert "maxReplicaCount" in str(problem(scaled))


def test_an_unknown_or_wrong_field_of_kubernetes_is_found() -> None:
    worker = find(render("local"), "StatefulSet", "cascade-worker")
    worker["spec"]["template"]["spec"]["containers"][0]["memory"] = "1Gi"
    assert "memory" in str(problem(worker))
    del worker["spec"]["template"]["spec"]["containers"][0]["memory"]
    worker["spec"]["replicas"] = "three"
    assert "three" in str(problem(worker))


def test_every_folder_is_tested() -> None:
    assert {"local", "a100-7x1g", "mig-dra", "canary"} < set(OVERLAYS)
    listed = {path.name for path in (manifests.K8S / "components").iterdir()}
    assert set(COMPONENTS) == listed
