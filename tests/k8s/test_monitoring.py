"""Prometheus finds the pods, and autoscaling asks for metrics that these pods have, within the limits of Kafka."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.config import SecuritySettings
from stages.deep.local_triton import LocalTriton
from tests.k8s.manifests import K8S, Object, Objects, find, of_kind, render, render_with, settings, workloads
from tests.k8s.manifests import configuration as configuration_of

PROMTOOL = shutil.which("promtool")
RULES = K8S / "prometheus" / "cascade-rules.yaml"


def triggers(objects: Objects) -> dict[tuple[str, str], dict[str, Any]]:
    """What each trigger of a ScaledObject is configured with, by the names of both."""
    return {
        (item["metadata"]["name"], trigger["name"]): trigger["metadata"]
        for item in of_kind(objects, "ScaledObject")
        for trigger in item["spec"]["triggers"]
    }


@pytest.fixture
def objects() -> Objects:
    return render("autoscaled")


@pytest.fixture
def queries(objects: Objects) -> dict[tuple[str, str], str]:
    return {name: trigger["query"] for name, trigger in triggers(objects).items() if "query" in trigger}


def scaled(objects: Objects, name: str) -> Object:
    spec: Object = find(objects, "ScaledObject", name)["spec"]
    return spec


def test_the_prometheus_rule_has_the_rules_of_the_file(objects: Objects) -> None:
    assert find(objects, "PrometheusRule", "cascade")["spec"] == yaml.safe_load(RULES.read_text())


def test_the_dashboard_is_the_file(objects: Objects) -> None:
    dashboard = find(objects, "ConfigMap", "cascade-dashboard")
    assert dashboard["data"] == {"cascade.json": (K8S / "grafana" / "cascade.json").read_text()}
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_workers_are_scaled_by_metrics_that_they_export(
    queries: dict[tuple[str, str], str], exported_names: set[str]
) -> None:
    asked = {name for (target, _), query in queries.items() for name in re.findall(r"\bcascade_\w+", query)}
    assert asked
    assert asked <= exported_names


@pytest.mark.triton
def test_triton_is_scaled_by_metrics_that_it_exports(queries: dict[tuple[str, str], str], triton: LocalTriton) -> None:
    asked = {name for query in queries.values() for name in re.findall(r"\bnv_\w+", query)}
    with urllib.request.urlopen(triton.metrics_url, timeout=10) as answer:  # noqa: S310
        exported = set(re.findall(r"^(\w+)[{ ]", answer.read().decode(), re.MULTILINE))
    assert asked
    assert asked <= exported


def test_a_query_adds_up_the_pods_of_a_job_that_the_pod_monitors_name(
    objects: Objects, queries: dict[tuple[str, str], str]
) -> None:
    for monitor in of_kind(objects, "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        (relabelling,) = endpoint["relabelings"]
        assert relabelling["targetLabel"] == "job"
        labels = [name.removeprefix("__meta_kubernetes_pod_label_") for name in relabelling["sourceLabels"]]
        assert labels == ["app_kubernetes_io_component", "cascade_track"]
    labels_of = [item["spec"]["template"]["metadata"]["labels"] for item in workloads(objects)]
    jobs = {f"{labels['app.kubernetes.io/component']}-{labels['cascade/track']}" for labels in labels_of}
    assert {job for query in queries.values() for job in re.findall(r'job="([^"]+)"', query)} == jobs


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)")
def test_prometheus_takes_the_queries(queries: dict[tuple[str, str], str], tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries.values())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run([str(PROMTOOL), "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_never_more_workers_than_partitions(objects: Objects) -> None:
    job = find(objects, "Job", "cascade-topics")["spec"]["template"]["spec"]["containers"][0]["args"]
    partitions = int(job[job.index("--partitions") + 1])
    assert scaled(objects, "cascade-worker")["maxReplicaCount"] == partitions
    assert scaled(objects, "cascade-worker")["fallback"]["replicas"] <= partitions
    lag = triggers(objects)["cascade-worker", "lag"]
    assert lag["allowIdleConsumers"] == "false"
    assert lag["limitToPartitionsWithLag"] == "true"


def test_offsets_that_do_not_exist_do_not_add_workers(objects: Objects) -> None:
    """KEDA counts 1 for a partition without a committed offset with "latest", all its records with "earliest"."""
    lag = triggers(objects)["cascade-worker", "lag"]
    assert (lag["offsetResetPolicy"], lag["scaleToZeroOnInvalidOffset"]) == ("latest", "false")
    workers = scaled(objects, "cascade-worker")
    assert workers["maxReplicaCount"] / int(lag["lagThreshold"]) < workers["minReplicaCount"]


def test_lag_is_that_of_the_services_group(objects: Objects) -> None:
    lag = triggers(objects)["cascade-worker", "lag"]
    service = settings(configuration_of(objects, "cascade-worker"))
    assert lag["bootstrapServers"] == service["kafka.bootstrap"]
    assert lag["consumerGroup"] == service.get("kafka.group", "cascade")
    assert lag["topic"] == service.get("kafka.topics.transactions", "transactions")


def test_keda_logs_in_where_and_as_the_service_does(tmp_path: Path) -> None:
    objects = render_with("tls", ["keda", "keda-tls"], tmp_path)
    trigger = scaled(objects, "cascade-worker")["triggers"][0]
    service = settings(configuration_of(objects, "cascade-worker"))
    mechanism = service.get("kafka.security.sasl_mechanism", SecuritySettings().sasl_mechanism)
    assert trigger["metadata"]["bootstrapServers"] == service["kafka.bootstrap"]
    assert trigger["metadata"]["tls"] == "enable"
    assert trigger["metadata"]["sasl"] == {"SCRAM-SHA-512": "scram_sha512"}[str(mechanism)]
    keys = find(objects, "TriggerAuthentication", trigger["authenticationRef"]["name"])["spec"]["secretTargetRef"]
    assert {key["name"] for key in keys} == {"cascade-kafka"}


@pytest.mark.parametrize("name", ["cascade-worker", "triton"])
def test_scaling_down_takes_one_pod_at_a_time_and_never_the_last(objects: Objects, name: str) -> None:
    spec = scaled(objects, name)
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    template = next(item for item in workloads(objects) if item["metadata"]["name"] == spec["scaleTargetRef"]["name"])
    grace_s = template["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert [(policy["type"], policy["value"]) for policy in down["policies"]] == [("Pods", 1)]
    assert down["policies"][0]["periodSeconds"] > grace_s
    assert spec["minReplicaCount"] > 1
