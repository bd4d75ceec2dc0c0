"""A real node beside a control plane: containerd, kubelet, kube-proxy, CoreDNS. Runs inside `in-node.sh`."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO, Self

from cascade.local_parts import OwnedProcess
from tests.kube.control_plane import ControlPlane
from tests.kube.kubectl import Kubectl
from tests.timing import wait_until

NAME = "node"
SOCKET = "/run/containerd/containerd.sock"
CONTAINERS = Path("/var/lib/containerd")
READY_S_MAX, IMPORT_S_MAX = 90.0, 300.0
_NODE_USER = f"system:node:{NAME}"
_KUBELET_CLIENT = "apiserver-kubelet"
_DNS_READY, _PROXY_HEALTH = 8181, 10256


class Node:
    """The node NAME of a control plane of its own, as a context manager; `kubectl` is the administrator's.

    - `directory`: for settings, keys and logs.
    - `lab`, `dns`, `stages`: the built parts.
    - `images`: the folder of the images, as `images.py` writes it; containerd's copies of them stay there.
    """

    def __init__(self, directory: Path, lab: Path, dns: Path, stages: Path, images: Path) -> None:
        self._directory, self._lab, self._dns, self._images = directory, lab, dns, images
        self._address, self._cgroup = os.environ["NODE_ADDRESS"], os.environ["NODE_CGROUP"]
        keys = directory / "certificates"
        self._plane = ControlPlane(
            directory,
            lab,
            stages,
            api_options=(
                f"--kubelet-client-certificate={keys / _KUBELET_CLIENT}.pem",
                f"--kubelet-client-key={keys / _KUBELET_CLIENT}.key",
                f"--kubelet-certificate-authority={keys / 'ca.pem'}",
                "--kubelet-preferred-address-types=InternalIP",
            ),
        )
        self._plane.authority.issue(_KUBELET_CLIENT, [], "system:masters")
        self.kubectl: Kubectl = self._plane.kubectl

    def __enter__(self) -> Self:
        self._plane.__enter__()
        try:
            self._start_containerd()
            self._start_kubelet()
            self._start_names()
        except BaseException:
            self._plane.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Pods end with the process namespace; what containerd still knows of them is removed at the next start.
        self._plane.__exit__(None, None, None)

    def signal(self, container: str, name: str) -> None:
        """Sends the signal `name` to the first process of a container, by the id in its pod's status."""
        _ctr("tasks", "kill", "--signal", name, container.removeprefix("containerd://"))

    def run(self, name: str, program: str, *options: str) -> OwnedProcess:
        """Starts a program of the part `lab` that ends with the node."""
        return self._plane.run(name, self._lab / program, *options)

    def log_tails(self, lines: int) -> str:
        """The last lines of each program's log."""
        return self._plane.log_tails(lines)

    def _start_containerd(self) -> None:
        for folder in (CONTAINERS, self._images / "containerd", Path("/run/containerd"), Path("/var/log/pods")):
            folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", str(self._images / "containerd"), str(CONTAINERS)], check=True)
        self._write("cni/10-bridge.conflist", json.dumps(_BRIDGE))
        settings = self._write("containerd.toml", _CONTAINERD.format(cni=self._directory / "cni"))
        containerd = self._plane.run("containerd", Path("/usr/bin/containerd"), f"--config={settings}")
        containerd.wait_until(_containerd_answers, READY_S_MAX)
        for container in _ctr("containers", "ls", "--quiet").split():  # of the last run; the kubelet would find them
            _ctr("containers", "rm", container)
        imported = self._images / "imported"
        if not imported.exists():
            with subprocess.Popen(["tar", "-c", "-C", self._images / "layout", "."], stdout=subprocess.PIPE) as layout:
                _ctr("images", "import", "-", stdin=layout.stdout)
            imported.touch()

    def _start_kubelet(self) -> None:
        authority = self._plane.authority
        certificate, key = authority.issue("kubelet", [self._address, NAME])
        user = self._plane.kubeconfig(_NODE_USER, "system:nodes")
        self._write("resolv.conf", f"nameserver {self._address}\n")
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,  # version 1 is refused otherwise
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "address": self._address,
            "healthzBindAddress": "127.0.0.1",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(authority.ca_file)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "protectKernelDefaults": True,
            "makeIPTablesUtilChains": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "resolvConf": str(self._directory / "resolv.conf"),
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1Gi", "imagefs.available": "1Gi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "syncFrequency": "5s",  # also how soon a changed ConfigMap is noticed
            "nodeStatusUpdateFrequency": "5s",
            "clusterDNS": [self._address],
            "clusterDomain": "cluster.local",
        }
        self.run(
            "kubelet",
            "kubelet",
            f"--config={self._write('kubelet.json', json.dumps(settings))}",
            f"--kubeconfig={user}",
            f"--hostname-override={NAME}",
            f"--node-ip={self._address}",
            "--root-dir=/var/lib/kubelet",
        )
        wait_until(self._is_ready, "the node", READY_S_MAX, lambda: self.log_tails(12))

    def _start_names(self) -> None:
        """Services by address (kube-proxy) and by name (CoreDNS)."""
        self.kubectl(
            "create", "clusterrolebinding", "proxy", "--clusterrole=system:node-proxier", f"--user={_NODE_USER}"
        )
        proxy = self.run(
            "kube-proxy",
            "kube-proxy",
            f"--kubeconfig={self._directory / _NODE_USER}.kubeconfig",
            f"--hostname-override={NAME}",
            "--proxy-mode=iptables",
            f"--bind-address={self._address}",
            "--cluster-cidr=10.244.0.0/16",
            f"--healthz-bind-address=127.0.0.1:{_PROXY_HEALTH}",
            "--metrics-bind-address=127.0.0.1:10249",
            # settings of the whole machine
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
        )
        zone = _COREFILE.format(address=self._address, kubeconfig=self.kubectl.kubeconfig, port=_DNS_READY)
        dns = self._plane.run("coredns", self._dns / "coredns", "-conf", str(self._write("Corefile", zone)))
        dns.wait_until(lambda: http_get("127.0.0.1", _DNS_READY, "/ready") is not None, READY_S_MAX)
        proxy.wait_until(lambda: http_get("127.0.0.1", _PROXY_HEALTH, "/healthz") is not None, READY_S_MAX)

    def _is_ready(self) -> bool:
        nodes = self.kubectl.items("nodes")
        return any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for node in nodes
            for condition in node["status"].get("conditions", [])
        )

    def _write(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def _ctr(*arguments: str, stdin: IO[bytes] | None = None) -> str:
    command = ["ctr", "--address", SOCKET, "--namespace", "k8s.io", *arguments]
    source = stdin or subprocess.DEVNULL
    done = subprocess.run(command, stdin=source, capture_output=True, text=True, timeout=IMPORT_S_MAX, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _containerd_answers() -> bool:
    with closing(socket.socket(socket.AF_UNIX)) as client:
        return client.connect_ex(SOCKET) == 0


def http_get(host: str, port: int, path: str) -> bytes | None:
    """What a server answers to a request; None if it cannot be reached, or answers with another status than 200."""
    with closing(http.client.HTTPConnection(host, port, timeout=2.0)) as connection:
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.read() if response.status == http.HTTPStatus.OK else None
        except (OSError, http.client.HTTPException):
            return None


_BRIDGE = {
    "cniVersion": "1.0.0",
    "name": "bridge",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.244.0.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

# restrict_oom_score_adj: without CAP_SYS_RESOURCE a score can be raised, not lowered.
_CONTAINERD = """\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "/usr/sbin/runc"
      SystemdCgroup = false
"""

_COREFILE = """\
.:53 {{
  bind {address}
  ready 127.0.0.1:{port}
  errors
  cache 2
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig}
    ttl 2
  }}
}}
"""
