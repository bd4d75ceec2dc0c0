"""Writes what is generated under k8s/: `make chart` runs it.

- `components/monitoring/prometheus-rule.yaml`: `prometheus/cascade-rules.yaml` for the Prometheus operator.
- `overlays/a100-7x1g` and the other layouts, as `cascade mig plan` writes them.
- `chart`: a Helm chart. Its templates are the rendered overlay `a100-7x1g` with the values of VALUES taken out, so the
  Kustomize base is the only place where the objects are written by hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from cascade import __version__
from cascade.mig.gpus import find_gpu
from cascade.mig.overlay import write_overlay

HERE: Final = Path(__file__).parent
LAYOUTS: Final[Mapping[str, tuple[str, Mapping[str, int]]]] = {
    "a100-7x1g": ("a100-40gb", {"1g.5gb": 7}),
    "a100-balanced": ("a100-40gb", {"3g.20gb": 1, "2g.10gb": 1, "1g.5gb": 2}),
    "h100-7x1g": ("h100-80gb", {"1g.10gb": 7}),
}
# The layout that the chart has by default.
LAYOUT: Final = "a100-7x1g"

Object = dict[str, Any]
Place = tuple[str | int, ...]
_WORKER: Final = ("StatefulSet", "cascade-worker")
_TOPICS: Final = ("Job", "cascade-topics")
_TRITON: Final = ("Deployment", "triton-1g-5gb")
_POD: Final[Place] = ("spec", "template", "spec")
_ARGUMENTS: Final[Place] = (*_POD, "containers", 0, "args")
_CLAIM: Final[Place] = ("spec", "volumeClaimTemplates", 0, "spec")

# Each value of the chart, and the places where it stands in an object (kind and name).
VALUES: Final[Mapping[str, tuple[tuple[tuple[str, str], Place], ...]]] = {
    "images.cascade": (
        (_WORKER, (*_POD, "containers", 0, "image")),
        (_TOPICS, (*_POD, "containers", 0, "image")),
        (_TRITON, (*_POD, "initContainers", 1, "image")),
    ),
    "images.bundle": (
        (_WORKER, (*_POD, "initContainers", 0, "image")),
        (_TRITON, (*_POD, "initContainers", 0, "image")),
    ),
    "images.triton": ((_TRITON, (*_POD, "containers", 0, "image")),),
    "images.pullSecrets": ((("ServiceAccount", "cascade"), ("imagePullSecrets",)),),
    "worker.replicas": ((_WORKER, ("spec", "replicas")),),
    "worker.resources": ((_WORKER, (*_POD, "containers", 0, "resources")),),
    "worker.snapshots": ((_WORKER, (*_CLAIM, "resources", "requests", "storage")),),
    "topics.partitions": ((_TOPICS, (*_ARGUMENTS, 4)),),
    "topics.replication": ((_TOPICS, (*_ARGUMENTS, 6)),),
    "triton.cpu.request": ((_TRITON, (*_POD, "containers", 0, "resources", "requests", "cpu")),),
    "triton.cpu.limit": ((_TRITON, (*_POD, "containers", 0, "resources", "limits", "cpu")),),
    "triton.memory.request": ((_TRITON, (*_POD, "containers", 0, "resources", "requests", "memory")),),
    "triton.memory.limit": ((_TRITON, (*_POD, "containers", 0, "resources", "limits", "memory")),),
    "triton.nodeSelector": ((_TRITON, (*_POD, "nodeSelector")),),
    "triton.tolerations": ((_TRITON, (*_POD, "tolerations")),),
    "network.brokers": ((("NetworkPolicy", "kafka-client"), ("spec", "egress")),),
    "network.scrapers": (
        (("NetworkPolicy", "worker"), ("spec", "ingress", 0, "from")),
        (("NetworkPolicy", "triton"), ("spec", "ingress", 1, "from")),
    ),
}
_CONFIG: Final = re.compile(r"cascade-config-[a-z0-9]{10}\b")
_CONFIG_NAME: Final = "cascade-config-{{ $.Values.config | sha256sum | trunc 10 }}"
_SLICE: Final = "{{ $slice.profile }}"
_SLICE_NAME: Final = '{{ $slice.profile | replace "." "-" }}'
_VALUES_HEAD: Final = """\
#
# config            the whole cascade.toml, with the brokers' address: --set-file config=FILE
# network.brokers   egress rules of the network policy: where the brokers are; network.scrapers: where Prometheus is
# triton.slices     a Deployment for each MIG profile; each pod has one slice
# worker.snapshots  size of each worker's volume

"""
_NOTES: Final = """\
Cascade {{ .Chart.AppVersion }} in the namespace {{ .Release.Namespace }}: {{ .Values.worker.replicas }} workers.

A chart cannot label its namespace. Let the API server enforce the restricted Pod Security that these pods keep:

  kubectl label namespace {{ .Release.Namespace }} pod-security.kubernetes.io/enforce=restricted
"""


def main(root: Path = HERE) -> None:
    """Writes all generated files below `root`."""
    for layout, (gpu, replicas) in LAYOUTS.items():
        write_overlay(root / "overlays" / layout, replicas, find_gpu(gpu))
    rules = yaml.safe_load((HERE / "prometheus" / "cascade-rules.yaml").read_text())
    _write(root / "components" / "monitoring" / "prometheus-rule.yaml", _dump(_prometheus_rule(rules)))
    for name, text in chart(render(HERE / "overlays" / LAYOUT)).items():
        _write(root / "chart" / name, text)


def render(overlay: Path) -> list[Object]:
    """The objects of an overlay, by kubectl."""
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


def chart(objects: Iterable[Object]) -> dict[str, str]:
    """The files of the chart, by path."""
    # the namespace is the release's, which Helm makes
    found = {_key(item): item for item in objects if item["kind"] != "Namespace"}
    values: Object = {}
    for value, places in VALUES.items():
        for key, place in places:
            _set_value(values, value, _take_out(found[key], place, value))
    config = next(item for key, item in found.items() if _CONFIG.fullmatch(key[1]))
    values["config"] = _take_out(config, ("data", "cascade.toml"), "config")
    # else an upgrade would delete the file that pods of the old revision still need
    config["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    profile, pods = next(iter(LAYOUTS[LAYOUT][1].items()))
    values["triton"]["slices"] = [{"profile": profile, "pods": pods}]
    found[_TRITON]["spec"]["replicas"] = "__slice.pods__"

    about = {
        "apiVersion": "v2",
        "name": "cascade",
        "description": "Real-time fraud detection with its deep model on MIG slices",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
        "kubeVersion": ">=1.35.0-0",
    }
    head = "# Written by k8s/generate.py from the Kustomize base (`make chart`).\n"
    files = {
        "Chart.yaml": head + _dump(about),
        "values.yaml": head + _VALUES_HEAD + _dump(values),
        "templates/NOTES.txt": _NOTES,
    }
    for item in found.values():
        item["metadata"] = {
            name: "__namespace__" if name == "namespace" else content for name, content in item["metadata"].items()
        }
        text = _template(_dump(item))
        name = f"templates/{item['kind'].lower()}-{_CONFIG.sub('cascade-config', item['metadata']['name'])}.yaml"
        if profile in text:
            text = text.replace(profile, _SLICE).replace(profile.replace(".", "-"), _SLICE_NAME)
            text = "{{- range $slice := $.Values.triton.slices }}\n---\n" + text + "{{- end }}\n"
            name = name.replace("-" + profile.replace(".", "-"), "")
        files[name] = text
    return files


def _prometheus_rule(rules: Object) -> Object:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "cascade"},
        "spec": rules,
    }


def _key(item: Object) -> tuple[str, str]:
    return item["kind"], item["metadata"]["name"]


def _take_out(item: Object, place: Place, value: str) -> Any:
    """Puts a mark in the place of a value, and returns the value."""
    inner: Any = item
    for step in place[:-1]:
        inner = inner[step]
    found = inner[place[-1]]
    # a number that stands for a text (an argument, a quantity) becomes a text again
    inner[place[-1]] = f"__{value} | toString__" if isinstance(found, str) else f"__{value}__"
    return found


def _set_value(values: Object, name: str, content: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    if values.setdefault(last, content) != content:
        raise ValueError(f"{name}: {content} here, {values[last]} elsewhere; it must be the same in all its places")


def _template(text: str) -> str:
    text = text.replace("__namespace__", "{{ $.Release.Namespace }}").replace("__slice.pods__", "{{ $slice.pods }}")
    text = re.sub(r"__([a-zA-Z.]+(?: \| toString)?)__", r"{{ $.Values.\1 | toJson }}", text)
    return _CONFIG.sub(_CONFIG_NAME, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _dump(content: Object) -> str:
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
