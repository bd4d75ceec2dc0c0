"""What every overlay of k8s/ must keep: functions from objects to a line for each object that does not."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator

from cascade.config import Config
from tests.k8s.manifests import (
    Object,
    Objects,
    configuration,
    containers,
    find,
    of_kind,
    pods,
    port_names,
    selects,
    workloads,
)

# Objects that belong to the cluster, not to a namespace.
CLUSTER_KINDS = {"Namespace", "PriorityClass", "DeviceClass"}
# Made by hand or by another program, with values that are not in the repository (k8s/README.md says how).
SECRETS = {"cascade-kafka", "cascade-worker-tls", "cascade-triton-tls", "cascade-object-store"}
# One broker for trying out: it can never have a second pod.
SINGLE = {"kafka"}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
GPU_RESOURCE = "nvidia.com/"
# A commit may take so long (cascade/config.py, HealthSettings).
COMMIT_S = 15

Violations = Iterator[str]
Policy = Callable[[Objects], Violations]


def images_have_a_version(objects: Objects) -> Violations:
    """No image without a tag, and none whose tag moves."""
    for name, _, spec in pods(objects):
        for part in containers(spec):
            tag = part["image"].rpartition("/")[2].partition(":")[2]
            if tag in ("", "latest"):
                yield f"{name}/{part['name']}: image {part['image']}"


def containers_have_limits(objects: Objects) -> Violations:
    """CPU and memory of each container are requested and limited."""
    for name, _, spec in pods(objects):
        for part in containers(spec):
            for bound in ("requests", "limits"):
                missing = {"cpu", "memory"} - part.get("resources", {}).get(bound, {}).keys()
                if missing:
                    yield f"{name}/{part['name']}: no {bound} for {', '.join(sorted(missing))}"


def workloads_have_probes(objects: Objects) -> Violations:
    """Each container that stays has all three probes, at ports that it has."""
    for item in workloads(objects):
        spec = item["spec"]["template"]["spec"]
        for part in spec["containers"]:
            for probe in PROBES:
                action = part.get(probe, {}).get("httpGet") or part.get(probe, {}).get("tcpSocket")
                if action is None:
                    yield f"{item['metadata']['name']}/{part['name']}: no {probe}"
                elif action["port"] not in port_names(spec):
                    yield f"{item['metadata']['name']}/{part['name']}: {probe} at no port of its own"


def containers_are_locked(objects: Objects) -> Violations:
    """Pods run without root, privileges, capabilities and a writable image, under the default seccomp profile."""
    for name, _, spec in pods(objects):
        pod = spec.get("securityContext", {})
        if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser"):
            yield f"{name}: may run as root"
        if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: no seccomp profile"
        for part in containers(spec):
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if part.get("securityContext") != wanted:
                yield f"{name}/{part['name']}: security context {part.get('securityContext')}"


def pods_stay_off_the_host(objects: Objects) -> Violations:
    """No network, process space, directory or port of the node."""
    for name, _, spec in pods(objects):
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{name}: {field}"
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{name}: hostPath {volume['hostPath']['path']}"
        for part in containers(spec):
            for port in part.get("ports", []):
                if "hostPort" in port:
                    yield f"{name}/{part['name']}: hostPort {port['hostPort']}"


def pods_have_no_token(objects: Objects) -> Violations:
    """No pod has the token of a service account, and all have the account without rights."""
    accounts = {item["metadata"]["name"] for item in of_kind(objects, "ServiceAccount")}
    for name, _, spec in pods(objects):
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: mounts a token"
        if spec.get("serviceAccountName") not in accounts:
            yield f"{name}: service account {spec.get('serviceAccountName')}"
    for kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        for item in of_kind(objects, kind):
            yield f"{kind} {item['metadata']['name']}: gives rights"


def slices_are_requested_as_limited(objects: Objects) -> Violations:
    """A pod with a slice of a GPU has exactly one, requested as limited: one Triton process uses one MIG device."""
    for name, _, spec in pods(objects):
        requests, limits = _slices(spec, "requests"), _slices(spec, "limits")
        if (requests or limits) and (len(limits) != 1 or limits[0][2] != 1):
            yield f"{name}: not one slice"
        if requests != limits:
            yield f"{name}: requests {requests}, limits {limits}"


def _slices(spec: Object, bound: str) -> list[tuple[str, str, int]]:
    """Container, resource and number of each GPU resource of a pod."""
    return [
        (part["name"], key, number)
        for part in containers(spec)
        for key, number in part.get("resources", {}).get(bound, {}).items()
        if key.startswith(GPU_RESOURCE)
    ]


def traffic_is_denied_unless_allowed(objects: Objects) -> Violations:
    """All traffic is denied by default, and each pod has a policy of its own; each policy selects a pod."""
    policies = of_kind(objects, "NetworkPolicy")
    own = [policy for policy in policies if policy["spec"]["podSelector"]]
    denied = {kind for policy in policies if policy not in own for kind in policy["spec"]["policyTypes"]}
    if denied != {"Ingress", "Egress"}:
        yield f"denied by default: {sorted(denied)}"
    for name, labels, _ in pods(objects):
        if not any(selects(policy["spec"]["podSelector"], labels) for policy in own):
            yield f"{name}: no network policy selects it"
    for policy in own:
        if not any(selects(policy["spec"]["podSelector"], labels) for _, labels, _ in pods(objects)):
            yield f"network policy {policy['metadata']['name']}: selects no pod"
        for rule in (*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])):
            if not rule.get("ports") or not (rule.get("from") or rule.get("to")):
                yield f"network policy {policy['metadata']['name']}: allows every peer or every port"


def workloads_survive_a_drain(objects: Objects) -> Violations:
    """Each workload that can have several pods has a disruption budget of its own, which lets a drain go on."""
    budgets = of_kind(objects, "PodDisruptionBudget")
    for item in workloads(objects):
        name, labels = item["metadata"]["name"], item["spec"]["template"]["metadata"]["labels"]
        found = [budget for budget in budgets if selects(budget["spec"]["selector"], labels)]
        if len(found) != (name not in SINGLE):
            yield f"{name}: {len(found)} disruption budgets"
        if any(budget["spec"].get("maxUnavailable") != 1 for budget in found):
            yield f"{name}: a budget that blocks a drain, or evicts several pods"


def selectors_select_their_pods(objects: Objects) -> Violations:
    """Each selector selects pods, a workload's only its own, and a Service's have the ports that it names."""
    labelled = list(pods(objects))
    for item in workloads(objects):
        name, selector = item["metadata"]["name"], item["spec"]["selector"]
        selected = [pod for pod, labels, _ in labelled if selects(selector, labels)]
        if selected != [name]:
            yield f"{name}: selects the pods of {selected}"
        for spread in item["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            if spread["labelSelector"] != selector:
                yield f"{name}: spreads other pods"
        if item["kind"] == "StatefulSet" and item["spec"]["serviceName"] not in {
            service["metadata"]["name"] for service in of_kind(objects, "Service")
        }:
            yield f"{name}: no service {item['spec']['serviceName']}"
    for service in of_kind(objects, "Service"):
        specs = [spec for _, labels, spec in labelled if service["spec"]["selector"].items() <= labels.items()]
        if not specs:
            yield f"service {service['metadata']['name']}: selects no pod"
        for port in service["spec"]["ports"]:
            if any(port_names(spec).get(port["targetPort"]) != port["port"] for spec in specs):
                yield f"service {service['metadata']['name']}: port {port['name']} is not the pods'"
    for monitor in of_kind(objects, "PodMonitor"):
        specs = [spec for _, labels, spec in labelled if selects(monitor["spec"]["selector"], labels)]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if not specs or any(endpoint["port"] not in port_names(spec) for spec in specs):
                yield f"pod monitor {monitor['metadata']['name']}: no port {endpoint['port']}"


def references_exist(objects: Objects) -> Violations:
    """What a pod or a ScaledObject names is among the objects; Secrets are those of the README."""
    classes = {item["metadata"]["name"] for item in of_kind(objects, "PriorityClass")}
    config_maps = {item["metadata"]["name"] for item in of_kind(objects, "ConfigMap")}
    for name, _, spec in pods(objects):
        if spec.get("priorityClassName") not in {None, *classes}:
            yield f"{name}: no priority class {spec['priorityClassName']}"
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for volume in spec.get("volumes", []):
            if "configMap" in volume and volume["configMap"]["name"] not in config_maps:
                yield f"{name}: no ConfigMap {volume['configMap']['name']}"
            if "secret" in volume and volume["secret"]["secretName"] not in SECRETS:
                yield f"{name}: Secret {volume['secret']['secretName']} is not in the README"
        for item in of_kind(objects, "StatefulSet"):
            if item["metadata"]["name"] == name:
                volumes |= {claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])}
        for part in containers(spec):
            for mount in part.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{name}/{part['name']}: no volume {mount['name']}"
    for item in of_kind(objects, "ScaledObject"):
        target = item["spec"]["scaleTargetRef"]
        found = [one for one in of_kind(objects, target["kind"]) if one["metadata"]["name"] == target["name"]]
        if len(found) != 1:
            yield f"scaled object {item['metadata']['name']}: no {target['kind']} {target['name']}"
        elif "replicas" in found[0]["spec"]:
            yield f"scaled object {item['metadata']['name']}: the manifest sets {target['name']}'s replicas too"


def objects_are_in_the_namespace(objects: Objects) -> Violations:
    """All objects are in `cascade`, and its Pod Security is restricted."""
    for item in objects:
        if item["kind"] not in CLUSTER_KINDS and item["metadata"].get("namespace") != "cascade":
            yield f"{item['kind']} {item['metadata']['name']}: namespace {item['metadata'].get('namespace')}"
    labels = find(objects, "Namespace", "cascade")["metadata"]["labels"]
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "namespace cascade: Pod Security is not enforced"


def workers_end_in_time(objects: Objects) -> Violations:
    """A worker has the time to drain and to commit, before it is killed."""
    for item in of_kind(objects, "StatefulSet"):
        name, spec = item["metadata"]["name"], item["spec"]["template"]["spec"]
        if item["spec"]["template"]["metadata"]["labels"].get("app.kubernetes.io/component") != "worker":
            continue
        worker = tomllib.loads(configuration(objects, name)).get("worker", {})
        drain_s = worker.get("drain_timeout_ms", Config().worker.drain_timeout_ms) / 1e3
        if spec.get("terminationGracePeriodSeconds", 30) < drain_s + COMMIT_S:
            yield f"{name}: killed before its drain of {drain_s:g} s and its commit can end"


POLICIES: tuple[Policy, ...] = (
    images_have_a_version,
    containers_have_limits,
    workloads_have_probes,
    containers_are_locked,
    pods_stay_off_the_host,
    pods_have_no_token,
    slices_are_requested_as_limited,
    traffic_is_denied_unless_allowed,
    workloads_survive_a_drain,
    selectors_select_their_pods,
    references_exist,
    objects_are_in_the_namespace,
    workers_end_in_time,
)


def violations(objects: Objects) -> list[str]:
    """All violations of all policies."""
    return [f"{policy.__name__}: {line}" for policy in POLICIES for line in policy(objects)]
