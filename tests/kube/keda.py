"""KEDA's real operator and metrics adapter as processes beside the control plane, and the answers of a Prometheus."""

from __future__ import annotations

import http.client
import json
import shutil
from http import HTTPStatus
from pathlib import Path

from cascade.local_parts import free_ports
from tests.kube.control_plane import ADDRESS, READY_S_MAX, ControlPlane, is_ready
from tests.kube.kubectl import Object

NAMESPACE = "keda"


def start_keda(plane: ControlPlane, programs: Path) -> None:
    """Starts KEDA, which ends with the control plane. `programs`: the built part. Its CRDs must be there."""
    adapter_port, adapter_metrics, operator_metrics, operator_health, metrics_service = free_ports(5)
    kubeconfig = str(plane.kubectl.kubeconfig)
    certificates = _certificates(plane)
    environment = {
        "KUBECONFIG": kubeconfig,
        "POD_NAMESPACE": NAMESPACE,
        "KEDA_CLUSTER_OBJECT_NAMESPACE": NAMESPACE,
        "WATCH_NAMESPACE": "",
    }
    plane.kubectl.apply(_adapter_service(adapter_port))
    operator = plane.run(
        "keda-operator",
        programs / "keda-operator",
        f"--metrics-bind-address={ADDRESS}:{operator_metrics}",
        f"--health-probe-bind-address={ADDRESS}:{operator_health}",
        f"--metrics-service-bind-address={ADDRESS}:{metrics_service}",
        f"--cert-dir={certificates}",
        "--enable-cert-rotation=false",
        "--zap-log-level=info",
        **environment,
    )
    operator.wait_until(lambda: is_ready(http.client.HTTPConnection(ADDRESS, operator_health, timeout=2)), READY_S_MAX)
    plane.run(
        "keda-adapter",
        programs / "keda-adapter",
        f"--bind-address={ADDRESS}",
        f"--secure-port={adapter_port}",
        f"--port={adapter_metrics}",  # on all interfaces, whatever the options: hence a network of its own
        f"--cert-dir={certificates}",
        f"--tls-cert-file={certificates / 'tls.crt'}",
        f"--tls-private-key-file={certificates / 'tls.key'}",
        *(f"--{kind}kubeconfig={kubeconfig}" for kind in ("", "authentication-", "authorization-", "lister-")),
        f"--metrics-service-address={ADDRESS}:{metrics_service}",
        "--metrics-service-grpc-authority=localhost",
        **environment,
    )
    service = "apiservice/v1beta1.external.metrics.k8s.io"
    plane.kubectl("wait", "--for=condition=Available", service, "--timeout=60s")


def _certificates(plane: ControlPlane) -> Path:
    folder = plane.directory / "keda-certificates"
    folder.mkdir()
    certificate, key = plane.authority.issue("keda", ["localhost", ADDRESS])
    for source, name in ((certificate, "tls.crt"), (key, "tls.key"), (plane.authority.ca_file, "ca.crt")):
        shutil.copyfile(source, folder / name)
    return folder


def _adapter_service(port: int) -> list[Object]:
    service = {"name": "keda-metrics-apiserver", "namespace": NAMESPACE}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": service,
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
            "spec": {
                "service": {**service, "port": port},
                "group": "external.metrics.k8s.io",
                "version": "v1beta1",
                "insecureSkipTLSVerify": True,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
            },
        },
    ]


class PrometheusStandIn:
    """The answers of a Prometheus.

    `values`: the answer to each query that contains the key; other queries have an empty one. `failing`: every query
    gets the status 503.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.failing = False

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        """Status and content of an answer."""
        (text,) = query["query"]
        found = [{"metric": {}, "value": [0, str(value)]} for key, value in self.values.items() if key in text]
        content = json.dumps({"status": "success", "data": {"resultType": "vector", "result": found}}).encode()
        return HTTPStatus.SERVICE_UNAVAILABLE if self.failing else HTTPStatus.OK, content
