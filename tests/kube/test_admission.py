"""What the real API server refuses: pods that Pod Security forbids, and objects with the mistakes that people make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.k8s.manifests import find
from tests.kube.kubectl import Kubectl, KubectlError, Object
from tests.kube.manifests import move, render_with

pytestmark = pytest.mark.kube

NAMESPACE = "cascade-admission"
SLICE = "nvidia.com/mig-1g.5gb"
TRITON = "triton-1g-5gb"
COMPONENTS = ("monitoring", "keda", "strimzi")


@pytest.fixture(scope="module")
def applied(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """A layout with components, applied; its pods stay Pending, for want of nodes."""
    rendered = render_with(kubectl, tmp_path_factory.mktemp("admission") / "all", "a100-7x1g", COMPONENTS)
    objects = move(rendered, NAMESPACE, "none")
    kubectl.apply(objects)
    return objects


def refusal(kubectl: Kubectl, each: Object) -> str:
    """Why the server refuses the object; nothing is stored."""
    with pytest.raises(KubectlError) as caught:
        # kubectl would find some mistakes itself
        kubectl.apply([each], "--dry-run=server", "--validate=false")
    return str(caught.value)


def pod_of(objects: list[Object], kind: str, name: str) -> Object:
    """A pod as the workload makes it."""
    template = find(objects, kind, name)["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": NAMESPACE}, **template}
    pod["metadata"] = {"name": "pod", "namespace": NAMESPACE, **template["metadata"]}
    return copy.deepcopy(pod)


@pytest.mark.parametrize(("kind", "name"), [("Deployment", TRITON), ("Job", "cascade-topics")])
def test_restricted_pod_security_admits_our_pods(
    kubectl: Kubectl, applied: list[Object], kind: str, name: str, tmp_path: Path
) -> None:
    if kind == "Job":  # Strimzi's topics replace it in `applied`
        applied = move(render_with(kubectl, tmp_path / "job", "a100-7x1g", ("monitoring",)), NAMESPACE, "none")
    assert kubectl.apply([pod_of(applied, kind, name)], "--dry-run=server") == ""


def privileged(spec: Object) -> None:
    spec["containers"][0]["securityContext"]["privileged"] = True
    del spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def escalating(spec: Object) -> None:
    del spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def with_capabilities(spec: Object) -> None:
    del spec["initContainers"][0]["securityContext"]["capabilities"]


def as_root(spec: Object) -> None:
    spec["securityContext"]["runAsUser"] = 0


def maybe_root(spec: Object) -> None:
    del spec["securityContext"]["runAsNonRoot"]


def without_seccomp(spec: Object) -> None:
    del spec["securityContext"]["seccompProfile"]


def with_host_path(spec: Object) -> None:
    spec["volumes"][0] = {"name": spec["volumes"][0]["name"], "hostPath": {"path": "/var/lib/cascade"}}


def on_host_network(spec: Object) -> None:
    spec["hostNetwork"] = True


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (privileged, 'privileged (container "triton" must not set securityContext.privileged=true)'),
        (
            escalating,
            'allowPrivilegeEscalation != false (container "triton" must set '
            "securityContext.allowPrivilegeEscalation=false)",
        ),
        (
            with_capabilities,
            'unrestricted capabilities (container "bundle" must set securityContext.capabilities.drop=["ALL"])',
        ),
        (as_root, "runAsUser=0 (pod must not set runAsUser=0)"),
        (maybe_root, "runAsNonRoot != true (pod or containers"),
        (without_seccomp, "seccompProfile (pod or containers"),
        (with_host_path, 'restricted volume types (volume "work" uses restricted volume type "hostPath")'),
        (on_host_network, "host namespaces (hostNetwork=true)"),
    ],
)
def test_restricted_pod_security_refuses_a_pod_that_gives_up_one_of_our_settings(
    kubectl: Kubectl, applied: list[Object], spoil: Callable[[Object], None], reason: str
) -> None:
    pod = pod_of(applied, "Deployment", TRITON)
    spoil(pod["spec"])
    message = refusal(kubectl, pod)
    assert 'violates PodSecurity "restricted:latest"' in message
    assert reason in message


def test_a_deployment_whose_pods_would_be_refused_is_warned_of(kubectl: Kubectl, applied: list[Object]) -> None:
    deployment = copy.deepcopy(find(applied, "Deployment", TRITON))
    privileged(deployment["spec"]["template"]["spec"])
    warning = kubectl.apply([deployment], "--dry-run=server")
    assert 'would violate PodSecurity "restricted:latest": privileged' in warning


class Mistake(NamedTuple):
    """A mistake in one of our objects: `value` at the end of the path `keys`, or None to leave the key out."""

    kind: str
    name: str
    keys: tuple[str | int, ...]
    value: Any
    message: str


CONTAINER = ("spec", "template", "spec", "containers", 0)

MISTAKES = [
    Mistake(
        "StatefulSet",
        "cascade-worker",
        (*CONTAINER, "livenesProbe"),
        {},
        '.spec.template.spec.containers[name="worker"].livenesProbe: field not declared in schema',
    ),
    Mistake(
        "Deployment",
        TRITON,
        (*CONTAINER, "resources", "requests", SLICE),
        2,
        f'spec.template.spec.containers[0].resources.requests: Invalid value: "2": must be equal to {SLICE} limit of 1',
    ),
    Mistake(
        "Deployment",
        TRITON,
        (*CONTAINER, "resources", "limits", SLICE),
        "500m",
        f'spec.template.spec.containers[0].resources.limits[{SLICE}]: Invalid value: "500m": must be an integer',
    ),
    Mistake(
        "PodMonitor",
        "cascade-worker",
        ("spec", "podMetricsEndpoints", 0, "interval"),
        "15 s",
        'spec.podMetricsEndpoints[0].interval: Invalid value: "15 s"',
    ),
    Mistake(
        "ScaledObject",
        "cascade-worker",
        ("spec", "maxReplicaCount"),
        "twelve",
        ".spec.maxReplicaCount: expected numeric (int or float), got string",
    ),
    Mistake("ScaledObject", "cascade-worker", ("spec", "scaleTargetRef"), None, "spec.scaleTargetRef: Required value"),
    Mistake(
        "StatefulSet",
        "cascade-worker",
        (*CONTAINER, "readinessProbe", "httpGet"),
        None,
        "spec.template.spec.containers[0].readinessProbe: Required value: must specify a handler type",
    ),
    Mistake(
        "Deployment",
        TRITON,
        ("spec", "replicas"),
        -1,
        "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
    ),
    Mistake(
        "StatefulSet",
        "cascade-worker",
        ("spec", "volumeClaimTemplates", 0, "spec", "resources", "requests", "storage"),
        "20Gi",
        "spec: Forbidden: updates to statefulset spec for fields other than",
    ),
    Mistake(
        "NetworkPolicy",
        "kafka-client",
        ("spec", "egress", 0, "to"),
        [{"ipBlock": {"cidr": "10.0.0.0/33"}}],
        'spec.egress[0].to[0].ipBlock.cidr: Invalid value: "10.0.0.0/33"',
    ),
    Mistake(
        "PodDisruptionBudget",
        "cascade-worker",
        ("spec", "minAvailable"),
        2,
        "minAvailable and maxUnavailable cannot be both set",
    ),
    Mistake(
        "PriorityClass",
        "cascade-worker",
        ("value",),
        2_000_000,
        "value: Forbidden: may not be changed in an update",
    ),
    Mistake(
        "Deployment",
        TRITON,
        ("spec", "selector", "matchLabels", "cascade/track"),
        "canary",
        "`selector` does not match template `labels`",
    ),
    Mistake(
        "KafkaTopic",
        "transactions",
        ("spec", "partitions"),
        0,
        "spec.partitions: Invalid value: 0",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.kind}-{mistake.keys[-1]}")
def test_object_with_a_mistake_is_refused(kubectl: Kubectl, applied: list[Object], mistake: Mistake) -> None:
    wrong = copy.deepcopy(find(applied, mistake.kind, mistake.name))
    *path, last = mistake.keys
    parent: Any = wrong
    for key in path:
        parent = parent[key]
    if mistake.value is None:
        del parent[last]
    else:
        parent[last] = mistake.value
    assert mistake.message in refusal(kubectl, wrong)


def test_an_apply_after_a_scale_is_refused_until_both_have_the_same_number(
    kubectl: Kubectl, applied: list[Object]
) -> None:
    def scale(number: int) -> None:
        kubectl("scale", f"deployment/{TRITON}", f"--replicas={number}", f"--namespace={NAMESPACE}")

    scale(6)
    with pytest.raises(KubectlError, match=r"conflict with .*\.spec\.replicas"):
        kubectl.apply(applied)
    scale(find(applied, "Deployment", TRITON)["spec"]["replicas"])
    assert kubectl.apply(applied) == ""
