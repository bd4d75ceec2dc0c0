"""Renders the overlays of k8s/, and finds things in what was rendered."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.errors import LocalPartError
from tests.kube.build import built

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml"))
RENDER_S_MAX = 60.0

Object = dict[str, Any]
Objects = list[Object]


@cache
def kubectl() -> Path:
    """The lab's kubectl, or the one on PATH; skips the test where there is neither."""
    try:
        return built("lab") / "kubectl"
    except LocalPartError as error:
        found = shutil.which("kubectl")
        if found is None:
            pytest.skip(f"kubectl is not on PATH, and {error}")
        return Path(found)


def render(overlay: str) -> Objects:
    """The objects of an overlay of the repository; a copy, which a test may change."""
    return parse(_render(overlay))


def render_with(overlay: str, components: Sequence[str], directory: Path) -> Objects:
    """The objects of an overlay with components on top; `directory` is empty."""
    write_with(overlay, components, directory)
    return render_directory(directory)


def write_with(overlay: str, components: Sequence[str], directory: Path) -> None:
    """Writes the kustomization of an overlay with components on top."""
    place = directory.resolve()
    kustomization = {
        "resources": [os.path.relpath(K8S / "overlays" / overlay, place)],
        "components": [os.path.relpath(K8S / "components" / name, place) for name in components],
        "namespace": "cascade",
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))


def render_directory(directory: Path) -> Objects:
    """The objects of a directory with a kustomization."""
    return parse(_run(directory))


def parse(text: str) -> Objects:
    """The objects of a stream of YAML documents."""
    # the loader in C takes a tenth of the time
    return [item for item in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if item]


@cache
def _render(overlay: str) -> str:
    return _run(K8S / "overlays" / overlay)


def _run(directory: Path) -> str:
    command = [str(kubectl()), "kustomize", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RENDER_S_MAX, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def find(objects: Objects, kind: str, name: str) -> Object:
    """The only object of this kind and name."""
    (found,) = (item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


def of_kind(objects: Objects, *kinds: str) -> Objects:
    """The objects of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def workloads(objects: Objects) -> Objects:
    """What runs until it is deleted: Deployments and StatefulSets."""
    return of_kind(objects, "Deployment", "StatefulSet")


def pods(objects: Objects) -> Iterator[tuple[str, Object, Object]]:
    """Name, labels and spec of the pods of each workload and Job."""
    for item in of_kind(objects, "Deployment", "StatefulSet", "Job"):
        template = item["spec"]["template"]
        yield item["metadata"]["name"], template["metadata"]["labels"], template["spec"]


def containers(spec: Object) -> Objects:
    """All containers of a pod, those that run before the others included."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def port_names(spec: Object) -> dict[str, int]:
    """The ports of a pod by name."""
    return {port["name"]: port["containerPort"] for part in spec["containers"] for port in part.get("ports", [])}


def configuration(objects: Objects, workload: str) -> str:
    """The cascade.toml that the pods of a StatefulSet mount."""
    spec = find(objects, "StatefulSet", workload)["spec"]["template"]["spec"]
    (name,) = (volume["configMap"]["name"] for volume in spec["volumes"] if volume["name"] == "config")
    text: str = find(objects, "ConfigMap", name)["data"]["cascade.toml"]
    return text


def settings(text: str) -> dict[str, object]:
    """The settings of a TOML text by their dotted name."""
    return dict(_flat(tomllib.loads(text), ""))


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for name, content in table.items():
        if isinstance(content, dict):
            yield from _flat(content, f"{prefix}{name}.")
        else:
            yield prefix + name, content


def selects(selector: Object, labels: Object) -> bool:
    """Whether a label selector selects these labels; an empty one selects all."""
    operators = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, values: key in labels,
        "DoesNotExist": lambda key, values: key not in labels,
    }
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        operators[rule["operator"]](rule["key"], rule.get("values")) for rule in selector.get("matchExpressions", [])
    )
