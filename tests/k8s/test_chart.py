"""What is generated under k8s/ is current, and the Helm chart makes the objects of the Kustomize overlays."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cascade import __version__
from cascade.errors import LocalPartError
from tests.k8s.manifests import K8S, Object, Objects, containers, find, kubectl, of_kind, parse, pods, render
from tests.kube.build import built

CHART = K8S / "chart"
CONFIG = re.compile(r"cascade-config-[a-z0-9]{10}\b")


def template(*options: str) -> str:
    """What Helm makes of the chart; skips where Helm is not built."""
    try:
        program = built("helm") / "helm"
    except LocalPartError as error:
        pytest.skip(str(error))
    command = [str(program), "template", "cascade", str(CHART), "--namespace", "cascade", "--kube-version", "1.36.0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def helm(*options: str) -> Objects:
    """The objects of the chart, without the hash of the configuration in its name."""
    return parse(CONFIG.sub("cascade-config", template(*options)))


def by_name(objects: Objects) -> dict[tuple[str, str], Object]:
    found = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    assert len(found) == len(objects)
    return found


def overlay(name: str) -> dict[tuple[str, str], Object]:
    """The objects of an overlay as the chart has them: no namespace, no hash, a ConfigMap that Helm never deletes."""
    objects = parse(CONFIG.sub("cascade-config", yaml.safe_dump_all(render(name))))
    found = by_name([item for item in objects if item["kind"] != "Namespace"])
    found["ConfigMap", "cascade-config"]["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    return found


def test_what_is_generated_is_current(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{kubectl().parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(K8S / "generate.py"), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=60)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(K8S) for path in CHART.rglob("*") if path.is_file()} < written
    stale = [str(path) for path in sorted(written) if (K8S / path).read_text() != (tmp_path / path).read_text()]
    assert stale == [], "run `make chart`"


def test_the_chart_makes_the_objects_of_the_default_overlay() -> None:
    assert by_name(helm()) == overlay("a100-7x1g")


def test_the_chart_makes_other_layouts_by_its_values() -> None:
    slices = [{"profile": profile, "pods": pods} for profile, pods in (("3g.20gb", 1), ("2g.10gb", 1), ("1g.5gb", 2))]
    assert by_name(helm("--set-json", f"triton.slices={json.dumps(slices)}")) == overlay("a100-balanced")


def test_each_value_of_the_chart_changes_what_it_names(tmp_path: Path) -> None:
    values = {
        "images": {
            "cascade": "r/cascade:2",
            "bundle": "r/bundle:3",
            "triton": "r/triton:4",
            "pullSecrets": [{"name": "registry"}],
        },
        "worker": {"replicas": 5, "resources": {"limits": {"cpu": "3"}}, "snapshots": "20Gi"},
        "topics": {"partitions": 24, "replication": 2},
        "triton": {"cpu": {"request": 1, "limit": "4"}, "memory": {"request": "3Gi", "limit": "4Gi"}},
        "network": {
            "brokers": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 9096}]}],
            "scrapers": [{"podSelector": {}}],
        },
        "config": 'delivery = "exactly-once"\n',
    }
    (tmp_path / "values.yaml").write_text(json.dumps(values))
    objects = helm("--values", str(tmp_path / "values.yaml"))
    images = {part["image"] for _, _, spec in pods(objects) for part in containers(spec)}
    assert images == {"r/cascade:2", "r/bundle:3", "r/triton:4"}
    assert find(objects, "ServiceAccount", "cascade")["imagePullSecrets"] == [{"name": "registry"}]
    worker = find(objects, "StatefulSet", "cascade-worker")["spec"]
    assert worker["replicas"] == 5
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "3"
    assert worker["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "20Gi"
    arguments = find(objects, "Job", "cascade-topics")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [arguments[4], arguments[6]] == ["24", "2"]
    triton = find(objects, "Deployment", "triton-1g-5gb")["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert triton["requests"] == {"cpu": "1", "memory": "3Gi", "nvidia.com/mig-1g.5gb": 1}
    brokers = find(objects, "NetworkPolicy", "kafka-client")["spec"]["egress"]
    assert brokers == values["network"]["brokers"]
    scraped = [rule["from"] for rule in find(objects, "NetworkPolicy", "triton")["spec"]["ingress"]]
    assert scraped[1] == values["network"]["scrapers"]
    (config,) = of_kind(objects, "ConfigMap")
    assert config["data"]["cascade.toml"] == values["config"]


def test_another_configuration_has_another_name() -> None:
    """Else old pods would read it, and no update would begin."""
    first, second = ({*CONFIG.findall(template("--set", option))} for option in ("config=a", "config=b"))
    assert len(first) == len(second) == 1
    assert first != second


def test_the_images_have_the_version_of_the_package() -> None:
    images = {part["image"] for _, _, spec in pods(render("a100-7x1g")) for part in containers(spec)}
    assert {image for image in images if image.startswith("cascade")} == {
        f"cascade:{__version__}",
        f"cascade-bundle:{__version__}",
    }
