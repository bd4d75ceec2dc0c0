"""The overlays that the documents show: they render, keep the policies, and change what the text says."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

import pytest

from cascade.mig.gpus import find_gpu
from cascade.mig.overlay import write_overlay
from tests.k8s.manifests import K8S, Object, Objects, containers, find, pods, render_directory
from tests.k8s.policies import violations

DEPLOY = K8S.parent / "docs" / "deploy.md"
README = K8S / "README.md"
BLOCK = re.compile(r"^( *)```yaml\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def example(document: Path) -> str:
    """The only block of YAML in a document."""
    ((_, text),) = BLOCK.findall(document.read_text())
    return textwrap.dedent(text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `k8s`, with a plan's overlay and the documents' overlays beside it."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(K8S, root / "k8s")
    write_overlay(root / "plan" / "overlay", {"1g.5gb": 9}, find_gpu("a100-40gb"), "../../k8s/base")
    for name, document in (("my-cluster", DEPLOY), ("with-canary", README)):
        (root / name).mkdir()
        (root / name / "kustomization.yaml").write_text(example(document))
    shutil.copy(K8S / "overlays" / "tls" / "cascade.toml", root / "my-cluster")
    return root


@pytest.fixture
def objects(checkout: Path) -> Objects:
    return render_directory(checkout / "my-cluster")


def test_the_overlay_of_a_cluster_keeps_the_policies(objects: Objects) -> None:
    assert violations(objects) == []


def test_the_overlay_of_a_cluster_has_what_its_comments_say(objects: Objects) -> None:
    images = {part["image"] for _, _, spec in pods(objects) for part in containers(spec)}
    assert {image for image in images if "tritonserver" not in image} == {
        "registry.example/cascade@sha256:...",
        "registry.example/cascade-bundle@sha256:...",
    }
    assert find(objects, "StatefulSet", "cascade-worker")["spec"]["replicas"] == 4
    arguments = find(objects, "Job", "cascade-topics")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--partitions") + 1] == "24"
    assert "ipBlock" in find(objects, "NetworkPolicy", "kafka-client")["spec"]["egress"][0]["to"][0]
    assert find(objects, "ServiceAccount", "cascade")["imagePullSecrets"] == [{"name": "registry"}]


def test_a_canary_beside_the_cluster_has_a_bundle_of_its_own(checkout: Path) -> None:
    readme = checkout / "with-canary" / "kustomization.yaml"
    readme.write_text(readme.read_text().replace("sha256:...", "sha256:new"))
    objects = render_directory(checkout / "with-canary")
    assert violations(objects) == []
    stable, canary = (bundle(find(objects, "StatefulSet", f"cascade-worker{end}")) for end in ("", "-canary"))
    assert (stable, canary) == (
        "registry.example/cascade-bundle@sha256:...",
        "registry.example/cascade-bundle@sha256:new",
    )
    assert bundle(find(objects, "Deployment", "triton-1g-5gb")) == stable
    assert bundle(find(objects, "Deployment", "triton-1g-5gb-canary")) == canary


def bundle(workload: Object) -> str:
    """The image of the bundle that a workload's pods copy."""
    image: str = workload["spec"]["template"]["spec"]["initContainers"][0]["image"]
    return image
