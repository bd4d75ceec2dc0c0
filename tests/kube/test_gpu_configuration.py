"""The commands of a plan for the GPU operator, by the real kubectl and API server; the operator itself is not there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from cascade.mig.gpus import find_gpu
from cascade.mig.mig_parted import NAMESPACE, write_gpu_configuration
from cascade.mig.packing import pack
from tests.kube.kubectl import Kubectl, KubectlError
from tests.kube.manifests import GPU_LABELS, node

pytestmark = pytest.mark.kube

NODE = "gpu-configuration"
STATE = "nvidia.com/mig.config.state"


def labels(kubectl: Kubectl) -> dict[str, str]:
    found: dict[str, str] = kubectl.get("node", NODE)["metadata"]["labels"]
    return found


def test_commands_ask_for_the_layout_and_wait_for_its_own_state(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl("create", "namespace", NAMESPACE)
    kubectl.create([node(NODE, NODE, {"1g.5gb": 7})])
    assert labels(kubectl)[STATE] == GPU_LABELS[STATE] == "success"  # of the layout before

    (layout,) = pack(find_gpu("a100-40gb"), {"3g.20gb": 1, "1g.5gb": 4})
    lines = write_gpu_configuration(tmp_path, "fraud", [layout], gpus_per_node=1)
    text = (tmp_path / "gpu-operator-configmap.yaml").as_posix()
    commands = [
        [word.replace("NODE", NODE).replace("gpu-operator-configmap.yaml", text).replace("15m", "2s") for word in words]
        for _, *words in map(shlex.split, lines)
    ]
    apply, patch, drain, label, wait, uncordon = commands
    assert patch[0] == "patch"  # there is no ClusterPolicy to patch

    kubectl(*apply)
    config_map = kubectl.get("configmap", "cascade-mig-parted", f"--namespace={NAMESPACE}")
    (entry,) = yaml.safe_load(config_map["data"]["config.yaml"])["mig-configs"]["fraud"]
    assert entry["mig-devices"] == {"1g.5gb": 4, "3g.20gb": 1}

    kubectl(*drain)
    assert kubectl.get("node", NODE)["spec"]["unschedulable"]
    kubectl(*label)
    assert labels(kubectl)["nvidia.com/mig.config"] == "fraud"
    with pytest.raises(KubectlError, match="timed out"):
        kubectl(*wait)  # the state of the layout before does not count
    kubectl("label", "node", NODE, f"{STATE}=success")
    kubectl(*wait)
    kubectl(*uncordon)
    assert "unschedulable" not in kubectl.get("node", NODE)["spec"]
