"""What the pods' service account may do, by the real authorizer: nothing."""

from __future__ import annotations

import pytest

from tests.k8s.manifests import K8S, find
from tests.kube import pods
from tests.kube.kubectl import Kubectl, KubectlError
from tests.kube.manifests import move, node, render

pytestmark = pytest.mark.kube

NAMESPACE = "cascade-rights"
ACCOUNT = f"--as=system:serviceaccount:{NAMESPACE}:cascade"


@pytest.fixture(scope="module", autouse=True)
def _cascade(kubectl: Kubectl) -> None:
    kubectl.create([node("rights", "rights", {"1g.5gb": 7}), node("rights-plain", "rights")])
    kubectl.apply(render(kubectl, "a100-7x1g", NAMESPACE, "rights"))


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "pods"),
        ("list", "secrets"),
        ("get", "configmaps"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("patch", "statefulsets.apps"),
        ("delete", "persistentvolumeclaims"),
        ("*", "*"),
    ],
)
def test_service_account_may_not(kubectl: Kubectl, verb: str, resource: str) -> None:
    question = ("auth", "can-i", verb, resource, f"--namespace={NAMESPACE}")
    assert kubectl(*question).strip().endswith("yes"), "the administrator may"
    with pytest.raises(KubectlError, match=r"^no$"):
        kubectl(*question, ACCOUNT)


def test_no_role_is_bound_to_the_service_account(kubectl: Kubectl) -> None:
    bindings = kubectl.items("rolebindings,clusterrolebindings", "--all-namespaces")
    subjects = [subject for binding in bindings for subject in binding.get("subjects", [])]
    assert subjects
    assert [subject for subject in subjects if subject.get("namespace") == NAMESPACE] == []


def test_no_pod_has_a_token(kubectl: Kubectl) -> None:
    pods.wait_ready(kubectl, NAMESPACE, {"worker": 3, "triton": 7})
    for pod in kubectl.items("pods", f"--namespace={NAMESPACE}"):
        assert pod["spec"]["serviceAccountName"] == "cascade"
        sources = [
            source for volume in pod["spec"]["volumes"] for source in volume.get("projected", {}).get("sources", [])
        ]
        assert [source for source in sources if "serviceAccountToken" in source] == []


def test_a_pod_without_our_setting_would_have_a_token(kubectl: Kubectl) -> None:
    objects = move(kubectl.render(K8S / "overlays" / "local"), "cascade-token", "rights")
    del find(objects, "ServiceAccount", "cascade")["automountServiceAccountToken"]
    del find(objects, "Deployment", "triton")["spec"]["template"]["spec"]["automountServiceAccountToken"]
    kubectl.apply(objects)
    pods.wait_ready(kubectl, "cascade-token", {"triton": 1})
    (pod,) = pods.of_component(kubectl, "cascade-token", "triton")
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert [name for name in volumes if name.startswith("kube-api-access-")]
