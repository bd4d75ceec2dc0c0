"""Layouts as configuration of `nvidia-mig-parted`, of the GPU operator that runs it, and of the nodes.

mig-parted configures one node by the name of a configuration, which says for each of its GPUs, by index, whether MIG is
on and how many instances of each profile it has. Placements are mig-parted's own choice. The GPU operator runs it on a
node when the node's label `nvidia.com/mig.config` changes; its configurations are those of a ConfigMap that the
ClusterPolicy names (NVIDIA GPU Operator documentation, "GPU Operator with MIG", custom MIG configuration).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Final

from cascade.errors import DataError
from cascade.mig.placement import Layout, counts_of

NAMESPACE: Final = "gpu-operator"
CONFIG_MAP: Final = "cascade-mig-parted"
# The operator's own name for "MIG off", which its ClusterPolicy has as default; so each ConfigMap must have it.
ALL_DISABLED: Final = "all-disabled"
# The value of a node's label. Kubernetes allows 63 letters; the rest is for a node's number.
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,48}[a-z0-9])?")

_DISABLED: Final = f"""\
  {ALL_DISABLED}:
    - devices: all
      mig-enabled: false
"""

_CONFIG_MAP: Final = Template("""\
apiVersion: v1
kind: ConfigMap
metadata:
  name: $name
  namespace: $namespace
data:
  config.yaml: |
$config""")


def node_configs(name: str, layouts_by_gpu: Sequence[Layout], gpus_per_node: int) -> dict[str, tuple[Layout, ...]]:
    """The layouts of each kind of node, by the name of its configuration: `name`, or `name-0`, `name-1`, …

    Nodes get the GPUs in their order; nodes with the same layouts share a configuration. Raises DataError for a name
    that cannot be the value of a label, and for a plan without GPUs.
    """
    if not _NAME.fullmatch(name) or name == ALL_DISABLED:
        raise DataError(f"configuration {name!r}: use 1 to 50 of a-z, 0-9, '.' and '-', other than {ALL_DISABLED}")
    if not layouts_by_gpu or gpus_per_node < 1:
        raise DataError(f"configuration {name}: {len(layouts_by_gpu)} GPUs, {gpus_per_node} in a node; use 1 or more")
    starts = range(0, len(layouts_by_gpu), gpus_per_node)
    nodes = dict.fromkeys(tuple(layouts_by_gpu[start : start + gpus_per_node]) for start in starts)
    names = [name] if len(nodes) == 1 else [f"{name}-{number}" for number in range(len(nodes))]
    return dict(zip(names, nodes, strict=True))


def mig_parted_config(configs: Mapping[str, Sequence[Layout]]) -> str:
    """The YAML of nvidia-mig-parted: the configurations of `node_configs`, and one that switches MIG off.

    A GPU with an empty layout has MIG off.
    """
    entries = "".join(f"  {name}:\n{_devices(layouts_by_gpu)}" for name, layouts_by_gpu in configs.items())
    return f"version: v1\nmig-configs:\n{_DISABLED}{entries}"


def _devices(layouts_by_gpu: Sequence[Layout]) -> str:
    """The entries of a node: one for each set of equal GPUs. Always by index: a node may have more than the plan."""
    by_counts: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for number, layout in enumerate(layouts_by_gpu):
        by_counts.setdefault(tuple(sorted(counts_of(layout).items())), []).append(number)
    entries = []
    for counts, numbers in by_counts.items():
        lines = [
            f"    - devices: [{', '.join(map(str, numbers))}]",
            f"      mig-enabled: {'true' if counts else 'false'}",
        ]
        if counts:
            lines += ["      mig-devices:", *(f'        "{profile}": {count}' for profile, count in counts)]
        entries.append("\n".join(lines) + "\n")
    return "".join(entries)


def operator_config_map(configs: Mapping[str, Sequence[Layout]]) -> str:
    """The YAML of the ConfigMap from which the GPU operator's MIG manager takes its configurations."""
    config = indent(mig_parted_config(configs), "    ")
    return _CONFIG_MAP.substitute(name=CONFIG_MAP, namespace=NAMESPACE, config=config)


def operator_commands(configs: Mapping[str, Sequence[Layout]]) -> list[str]:
    """The command lines that make the GPU operator configure nodes; `NODE` stands for a node's name.

    The MIG manager does not wait for pods: it must find the GPUs unused, hence the drain. The state of an earlier
    configuration is removed with the same command that asks for the new one, so that no wait ends with the old state.
    """
    policy = f'{{"spec":{{"mig":{{"strategy":"mixed"}},"migManager":{{"config":{{"name":"{CONFIG_MAP}"}}}}}}}}'
    commands = [
        "kubectl apply --filename gpu-operator-configmap.yaml",
        f"kubectl patch clusterpolicies.nvidia.com/cluster-policy --type merge --patch '{policy}'",
    ]
    for name in configs:
        commands += [
            "kubectl drain NODE --ignore-daemonsets --delete-emptydir-data",
            f"kubectl label node NODE nvidia.com/mig.config.state- nvidia.com/mig.config={name} --overwrite",
            "kubectl wait node/NODE --for=jsonpath='{.metadata.labels.nvidia\\.com/mig\\.config\\.state}'=success"
            " --timeout=15m",
            "kubectl uncordon NODE",
        ]
    return commands


def write_gpu_configuration(
    directory: Path, name: str, layouts_by_gpu: Sequence[Layout], gpus_per_node: int
) -> list[str]:
    """Writes `mig-parted.yaml` and `gpu-operator-configmap.yaml` to `directory`, which exists.

    Returns the command lines for the GPU operator; without it, mig-parted applies the first file on a node itself:
    `nvidia-mig-parted apply --config-file mig-parted.yaml --selected-config NAME`. Raises DataError as `node_configs`.
    """
    configs = node_configs(name, layouts_by_gpu, gpus_per_node)
    (directory / "mig-parted.yaml").write_text(mig_parted_config(configs))
    (directory / "gpu-operator-configmap.yaml").write_text(operator_config_map(configs))
    return operator_commands(configs)
