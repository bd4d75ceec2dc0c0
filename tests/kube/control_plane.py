"""A real control plane on 127.0.0.1: etcd, kube-apiserver, kube-controller-manager, kube-scheduler.

KWOK acts as the kubelet of nodes that are only objects: its pods run nothing, and are ready at once.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from cascade.local_parts import OwnedProcess, free_ports
from tests.certificates import make_authority
from tests.kube.kubectl import Kubectl, KubectlError
from tests.timing import wait_until

READY_S_MAX = 90.0
ADDRESS = "127.0.0.1"
SERVICE_RANGE, API_SERVICE = "10.96.0.0/16", "10.96.0.1"
KWOK_ANNOTATION = "kwok.x-k8s.io/node"


class ControlPlane:
    """A control plane with KWOK; a context manager. `authority` signs the certificates of all who take part.

    - `directory`: for keys, data and logs.
    - `lab`, `stages`: the built parts.
    - `hosts`: further names and addresses of the API server.
    - `api_options`: further options of kube-apiserver; a later option replaces an earlier one.
    """

    def __init__(
        self, directory: Path, lab: Path, stages: Path, hosts: Sequence[str] = (), api_options: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.authority = make_authority(directory / "certificates")
        self.api_port, *self._ports = free_ports(6)
        self._lab, self._stages = lab, stages
        self._hosts, self._api_options = hosts, api_options
        self._running = ExitStack()
        self._logs: list[Path] = []
        self.kubectl = Kubectl(lab / "kubectl", self.kubeconfig("admin", "system:masters"), directory / "kubectl-cache")

    def kubeconfig(self, user: str, group: str = "") -> Path:
        """A file with which `user`, a member of `group`, reaches the API server."""
        certificate, key = self.authority.issue(user, [], group)
        configuration = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "clusters": [
                {
                    "name": "tests",
                    "cluster": {
                        "server": f"https://{ADDRESS}:{self.api_port}",
                        "certificate-authority": str(self.authority.ca_file),
                    },
                }
            ],
            "users": [{"name": "tests", "user": {"client-certificate": str(certificate), "client-key": str(key)}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
        }
        path = self.directory / f"{user}.kubeconfig"
        path.write_text(json.dumps(configuration))
        return path

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def run(self, name: str, program: Path, *options: str, **environment: str) -> OwnedProcess:
        """Starts a program that ends before this control plane does; its log is `<name>.log`."""
        log = self.directory / f"{name}.log"
        self._logs.append(log)
        process = OwnedProcess(name, [str(program), *options], log, {**os.environ, **environment})
        return self._running.enter_context(process)

    def log_tails(self, lines: int = 8) -> str:
        """The last lines of each program's log."""
        tails = (f"{log.name}:\n{_tail(log, lines)}" for log in self._logs)
        return "\n".join(tails)

    def _start(self) -> None:
        etcd_port, peer_port, manager_port, scheduler_port, kwok_port = self._ports
        etcd, peer = (f"http://{ADDRESS}:{port}" for port in (etcd_port, peer_port))
        self.run(
            "etcd",
            self._lab / "etcd",
            "--name=tests",
            f"--data-dir={self.directory / 'etcd'}",
            "--unsafe-no-fsync",
            "--log-level=warn",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=tests={peer}",
        )
        api_server = self._start_api_server(etcd)
        api_server.wait_until(self._api_is_ready, READY_S_MAX)
        self._start_controllers(manager_port, scheduler_port)
        self._start_kwok(kwok_port)
        wait_until(self._has_default_account, "the default service account", READY_S_MAX, self.log_tails)

    def _start_api_server(self, etcd: str) -> OwnedProcess:
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", API_SERVICE, ADDRESS]
        certificate, key = self.authority.issue("kube-apiserver", [*names, *self._hosts])
        proxy_certificate, proxy_key = self.authority.issue("front-proxy", [])
        accounts_certificate, accounts_key = self.authority.issue("service-accounts", [])
        ca_file = self.authority.ca_file
        return self.run(
            "kube-apiserver",
            self._lab / "kube-apiserver",
            f"--etcd-servers={etcd}",
            f"--bind-address={ADDRESS}",
            f"--advertise-address={ADDRESS}",
            f"--secure-port={self.api_port}",
            "--endpoint-reconciler-type=none",  # a loopback address may not be an endpoint
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged=true",  # what refuses a privileged pod is Pod Security
            "--profiling=false",
            f"--client-ca-file={ca_file}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={accounts_certificate}",
            f"--service-account-signing-key-file={accounts_key}",
            f"--requestheader-client-ca-file={ca_file}",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={proxy_certificate}",
            f"--proxy-client-key-file={proxy_key}",
            *self._api_options,
        )

    def _start_controllers(self, manager_port: int, scheduler_port: int) -> None:
        manager = self.kubeconfig("system:kube-controller-manager")
        self.run(
            "kube-controller-manager",
            self._lab / "kube-controller-manager",
            f"--kubeconfig={manager}",
            f"--authentication-kubeconfig={manager}",
            f"--authorization-kubeconfig={manager}",
            f"--bind-address={ADDRESS}",
            f"--secure-port={manager_port}",
            f"--cert-dir={self.directory / 'manager-certificates'}",
            f"--root-ca-file={self.authority.ca_file}",
            f"--service-account-private-key-file={self.authority.directory / 'service-accounts.key'}",
            "--use-service-account-credentials=true",  # otherwise it may not do what its controllers do
            "--leader-elect=false",
            "--profiling=false",
            # an autoscaler that a test can wait for; the rules by which it scales are the default ones
            "--horizontal-pod-autoscaler-sync-period=2s",
            "--horizontal-pod-autoscaler-downscale-stabilization=10s",
            "--horizontal-pod-autoscaler-initial-readiness-delay=1s",
            "--horizontal-pod-autoscaler-cpu-initialization-period=1s",
        )
        scheduler = self.kubeconfig("system:kube-scheduler")
        self.run(
            "kube-scheduler",
            self._lab / "kube-scheduler",
            f"--kubeconfig={scheduler}",
            f"--authentication-kubeconfig={scheduler}",
            f"--authorization-kubeconfig={scheduler}",
            f"--bind-address={ADDRESS}",
            f"--secure-port={scheduler_port}",
            f"--cert-dir={self.directory / 'scheduler-certificates'}",
            "--leader-elect=false",
            "--profiling=false",
        )

    def _start_kwok(self, port: int) -> None:
        certificate, key = (self.authority.directory / f"kube-apiserver.{suffix}" for suffix in ("pem", "key"))
        self.run(
            "kwok",
            self._lab / "kwok",
            f"--kubeconfig={self.kubectl.kubeconfig}",
            f"--config={self._stages / 'stages.yaml'}",  # without it kwok ends at once
            "--manage-all-nodes=false",
            f"--manage-nodes-with-annotation-selector={KWOK_ANNOTATION}=fake",
            f"--server-address={ADDRESS}:{port}",
            f"--node-ip={ADDRESS}",
            f"--node-port={port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            "--cidr=10.0.0.0/16",
            "--node-lease-duration-seconds=40",
        )

    def _api_is_ready(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.authority.ca_file))
        return is_ready(http.client.HTTPSConnection(ADDRESS, self.api_port, timeout=2, context=context))

    def _has_default_account(self) -> bool:
        try:
            self.kubectl("get", "serviceaccount", "default")
        except KubectlError:
            return False
        return True


def is_ready(connection: http.client.HTTPConnection) -> bool:
    """Whether a server answers that it is ready; closes the connection."""
    try:
        with closing(connection):
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
