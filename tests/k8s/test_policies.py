"""Each policy finds the objects that break it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s import policies as p
from tests.k8s.manifests import Objects, find, of_kind, render
from tests.k8s.policies import Policy

GONE = object()
WORKER = "StatefulSet cascade-worker"
TRITON = "Deployment triton-1g-5gb"
BUDGET = "PodDisruptionBudget cascade-worker"
NETWORK = "NetworkPolicy"
SLICE = "nvidia.com/mig-1g.5gb"
COMPONENT, TRACK = "app.kubernetes.io/component", "cascade/track"
ENFORCE = "pod-security.kubernetes.io/enforce"
DEVICES = {"name": "devices", "hostPath": {"path": "/dev"}}
SECRET = {"name": "key", "secret": {"secretName": "key"}}
TWO_SLICES: dict[str, Any] = {bound: {"cpu": 1, "memory": 1, SLICE: 2} for bound in ("requests", "limits")}
TWO_PROFILES: dict[str, Any] = {bound: {SLICE: 1, "nvidia.com/mig-2g.10gb": 1} for bound in ("requests", "limits")}
OTHERS: dict[str, Any] = {"matchLabels": {"app.kubernetes.io/name": "cascade"}}

# The policy that must find it, the object, the place in it (`pod`: of its template), and what is there then.
BROKEN: list[tuple[Policy, str, str, Any]] = [
    (p.images_have_a_version, WORKER, "pod containers 0 image", "cascade"),
    (p.images_have_a_version, WORKER, "pod containers 0 image", "registry:5000/cascade"),
    (p.images_have_a_version, WORKER, "pod initContainers 0 image", "cascade-bundle"),
    (p.images_have_a_version, TRITON, "pod containers 0 image", "registry:5000/tritonserver:latest"),
    (p.containers_have_limits, WORKER, "pod containers 0 resources limits memory", GONE),
    (p.containers_have_limits, TRITON, "pod initContainers 1 resources requests cpu", GONE),
    (p.containers_have_limits, TRITON, "pod containers 0 resources", GONE),
    (p.workloads_have_probes, WORKER, "pod containers 0 livenessProbe", GONE),
    (p.workloads_have_probes, TRITON, "pod containers 0 startupProbe", GONE),
    (p.workloads_have_probes, WORKER, "pod containers 0 readinessProbe httpGet port", "web"),
    (p.containers_are_locked, WORKER, "pod securityContext runAsNonRoot", GONE),
    (p.containers_are_locked, WORKER, "pod securityContext runAsUser", 0),
    (p.containers_are_locked, TRITON, "pod securityContext seccompProfile", GONE),
    (p.containers_are_locked, TRITON, "pod containers 0 securityContext readOnlyRootFilesystem", False),
    (p.containers_are_locked, WORKER, "pod containers 0 securityContext capabilities add", ["IPC_LOCK"]),
    (p.containers_are_locked, WORKER, "pod initContainers 0 securityContext privileged", True),
    (p.pods_stay_off_the_host, WORKER, "pod hostNetwork", True),
    (p.pods_stay_off_the_host, TRITON, "pod volumes 0", DEVICES),
    (p.pods_stay_off_the_host, WORKER, "pod containers 0 ports 0 hostPort", 9464),
    (p.pods_have_no_token, WORKER, "pod automountServiceAccountToken", GONE),
    (p.pods_have_no_token, TRITON, "pod serviceAccountName", GONE),
    (p.pods_have_no_token, "Service triton", "kind", "Role"),
    (p.slices_are_requested_as_limited, TRITON, f"pod containers 0 resources requests {SLICE}", GONE),
    (p.slices_are_requested_as_limited, TRITON, "pod containers 0 resources", TWO_SLICES),
    (p.slices_are_requested_as_limited, TRITON, "pod containers 0 resources", TWO_PROFILES),
    (p.traffic_is_denied_unless_allowed, f"{NETWORK} default-deny", "", GONE),
    (p.traffic_is_denied_unless_allowed, f"{NETWORK} default-deny", "spec policyTypes", ["Ingress"]),
    (p.traffic_is_denied_unless_allowed, f"{NETWORK} triton", "", GONE),
    (p.traffic_is_denied_unless_allowed, f"{NETWORK} worker", f"spec podSelector matchLabels {COMPONENT}", "workers"),
    (p.traffic_is_denied_unless_allowed, f"{NETWORK} triton", "spec ingress 0 ports", GONE),
    (p.traffic_is_denied_unless_allowed, f"{NETWORK} kafka-client", "spec egress 0 to", GONE),
    (p.workloads_survive_a_drain, "PodDisruptionBudget triton-1g-5gb", "", GONE),
    (p.workloads_survive_a_drain, BUDGET, "spec maxUnavailable", 0),
    (p.workloads_survive_a_drain, BUDGET, f"spec selector matchLabels {TRACK}", "canary"),
    (p.selectors_select_their_pods, WORKER, "spec selector", OTHERS),
    (p.selectors_select_their_pods, WORKER, "pod topologySpreadConstraints 0 labelSelector", OTHERS),
    (p.selectors_select_their_pods, WORKER, "spec serviceName", "workers"),
    (p.selectors_select_their_pods, "Service triton", f"spec selector {TRACK}", "none"),
    (p.selectors_select_their_pods, "Service triton", "spec ports 1 port", 8005),
    (p.selectors_select_their_pods, "PodMonitor cascade-worker", "spec podMetricsEndpoints 0 port", "http"),
    (p.selectors_select_their_pods, "PodMonitor cascade-triton", f"spec selector matchLabels {COMPONENT}", "model"),
    (p.references_exist, "PriorityClass cascade-worker", "", GONE),
    (p.references_exist, WORKER, "pod volumes 0 configMap name", "cascade-config"),
    (p.references_exist, TRITON, "pod volumes 0", SECRET),
    (p.references_exist, WORKER, "spec volumeClaimTemplates", GONE),
    (p.references_exist, "ScaledObject triton", "spec scaleTargetRef name", "triton"),
    (p.references_exist, WORKER, "spec replicas", 3),
    (p.objects_are_in_the_namespace, "Service triton", "metadata namespace", "default"),
    (p.objects_are_in_the_namespace, "Namespace cascade", f"metadata labels {ENFORCE}", "baseline"),
    (p.workers_end_in_time, WORKER, "pod terminationGracePeriodSeconds", GONE),
]


def break_object(objects: Objects, target: str, place: str, content: Any) -> None:
    item = find(objects, *target.split())
    if not place:
        objects.remove(item)
        return
    *path, last = [
        int(step) if step.isdigit() else step for step in place.replace("pod ", "spec template spec ").split()
    ]
    inner: Any = item
    for step in path:
        inner = inner[step]
    if content is GONE:
        del inner[last]
    else:
        inner[last] = content


@pytest.mark.parametrize(
    ("policy", "target", "place", "content"),
    BROKEN,
    ids=[f"{target}-{place or 'gone'}".replace(" ", ".") for _, target, place, _ in BROKEN],
)
def test_a_broken_object_is_found_by_its_policy(policy: Policy, target: str, place: str, content: Any) -> None:
    objects = render("autoscaled")
    assert list(policy(objects)) == []
    break_object(objects, target, place, content)
    assert list(policy(objects)) != []


def test_a_drain_that_is_longer_than_the_grace_period_is_found() -> None:
    objects = render("autoscaled")
    (config,) = (item for item in of_kind(objects, "ConfigMap") if "cascade.toml" in item["data"])
    config["data"]["cascade.toml"] += "\n[worker]\ndrain_timeout_ms = 40000\n"
    assert list(p.workers_end_in_time(objects)) != []


def test_each_policy_has_a_broken_object() -> None:
    assert {policy for policy, *_ in BROKEN} == set(p.POLICIES)
