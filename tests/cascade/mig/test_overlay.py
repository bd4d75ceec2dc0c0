"""The overlay of a layout: a Deployment for each profile, with one slice for each pod."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade.errors import DataError
from cascade.mig.gpus import GPUS, find_gpu
from cascade.mig.overlay import write_overlay
from tests.k8s.manifests import K8S, of_kind, render_directory
from tests.k8s.policies import violations


@pytest.mark.parametrize("key", GPUS)
def test_each_profile_of_a_gpu_becomes_a_deployment_with_its_slice(key: str, tmp_path: Path) -> None:
    gpu = find_gpu(key)
    replicas = {profile.name: number for number, profile in enumerate(gpu.profiles, 1)}
    directory = tmp_path.resolve() / "overlay"
    write_overlay(directory, replicas, gpu, os.path.relpath(K8S / "base", directory))
    objects = render_directory(directory)
    assert violations(objects) == []
    found = {}
    for deployment in of_kind(objects, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (resource,) = (name for name in container["resources"]["limits"] if name.startswith("nvidia.com/"))
        found[resource.removeprefix("nvidia.com/mig-")] = deployment["spec"]["replicas"]
    assert found == replicas


def test_an_overlay_that_is_written_again_is_the_same(tmp_path: Path) -> None:
    gpu = find_gpu("a100-40gb")
    for _ in range(2):
        write_overlay(tmp_path, {"2g.10gb": 3}, gpu)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.yaml")} == {
        "kustomization.yaml",
        "triton-2g-10gb/kustomization.yaml",
    }


def test_a_layout_that_the_gpu_does_not_have_is_refused(tmp_path: Path) -> None:
    gpu = find_gpu("h100-80gb")
    with pytest.raises(DataError, match="h100-80gb has no such profile"):
        write_overlay(tmp_path / "overlay", {"1g.5gb": 7}, gpu)
    with pytest.raises(ValueError, match="0 pods"):
        write_overlay(tmp_path / "overlay", {"1g.10gb": 0}, gpu)
    assert not (tmp_path / "overlay").exists()
