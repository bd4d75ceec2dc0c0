"""What is written for nvidia-mig-parted and the GPU operator, read back by another YAML reader."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import DataError
from cascade.mig.gpus import GPUS, find_gpu
from cascade.mig.mig_parted import (
    mig_parted_config,
    node_configs,
    operator_commands,
    operator_config_map,
    write_gpu_configuration,
)
from cascade.mig.packing import pack
from cascade.mig.placement import Layout, counts_of, layouts, place

A100 = find_gpu("a100-40gb")
SEVEN = pack(A100, {"1g.5gb": 7})[0]
MIXED = pack(A100, {"1g.5gb": 2, "2g.10gb": 1, "3g.20gb": 1})[0]


def read(text: str) -> Any:
    return yaml.safe_load(text)


def test_equal_gpus_are_configured_together() -> None:
    assert read(mig_parted_config(node_configs("fraud", [SEVEN] * 4, 4))) == {
        "version": "v1",
        "mig-configs": {
            "all-disabled": [{"devices": "all", "mig-enabled": False}],
            "fraud": [{"devices": [0, 1, 2, 3], "mig-enabled": True, "mig-devices": {"1g.5gb": 7}}],
        },
    }


def test_a_plan_of_fewer_gpus_than_a_node_has_leaves_the_others_alone() -> None:
    entries = read(mig_parted_config(node_configs("fraud", [SEVEN], 8)))["mig-configs"]["fraud"]
    assert [entry["devices"] for entry in entries] == [[0]]


def test_gpus_with_different_layouts_are_configured_by_index() -> None:
    assert read(mig_parted_config(node_configs("fraud", [SEVEN, MIXED, SEVEN, ()], 4)))["mig-configs"]["fraud"] == [
        {"devices": [0, 2], "mig-enabled": True, "mig-devices": {"1g.5gb": 7}},
        {"devices": [1], "mig-enabled": True, "mig-devices": {"1g.5gb": 2, "2g.10gb": 1, "3g.20gb": 1}},
        {"devices": [3], "mig-enabled": False},
    ]


def test_nodes_with_different_gpus_have_configurations_of_their_own() -> None:
    configs = read(mig_parted_config(node_configs("fraud", [SEVEN, SEVEN, SEVEN, SEVEN, MIXED, SEVEN], 2)))
    assert configs["mig-configs"].keys() == {"all-disabled", "fraud-0", "fraud-1"}
    assert [entry["devices"] for entry in configs["mig-configs"]["fraud-1"]] == [[0], [1]]


def test_the_config_map_has_the_same_configuration_under_the_key_that_the_operator_reads() -> None:
    configs = node_configs("fraud", [SEVEN, MIXED], 2)
    config_map = read(operator_config_map(configs))
    assert config_map["kind"] == "ConfigMap"
    assert config_map["metadata"] == {"name": "cascade-mig-parted", "namespace": "gpu-operator"}
    assert read(config_map["data"]["config.yaml"]) == read(mig_parted_config(configs))


def test_the_commands_name_the_config_map_and_every_configuration() -> None:
    commands = [shlex.split(line) for line in operator_commands(node_configs("fraud", [SEVEN, MIXED], 1))]
    assert all(command[0] == "kubectl" for command in commands)
    patch = next(command for command in commands if command[1] == "patch")
    assert json.loads(patch[-1])["spec"] == {
        "mig": {"strategy": "mixed"},
        "migManager": {"config": {"name": "cascade-mig-parted"}},
    }
    labels = [command[4:6] for command in commands if command[1] == "label"]
    # without the first part, the wait that follows would see the state of the configuration before
    assert labels == [["nvidia.com/mig.config.state-", f"nvidia.com/mig.config=fraud-{node}"] for node in (0, 1)]


@given(data=st.data())
def test_any_layouts_are_read_back_with_their_counts(data: st.DataObject) -> None:
    gpu = data.draw(st.sampled_from(list(GPUS.values())))
    drawn: list[Layout] = data.draw(st.lists(st.sampled_from([(), *layouts(gpu)]), min_size=1, max_size=16))
    entries = read(mig_parted_config(node_configs("plan", drawn, 16)))["mig-configs"]["plan"]
    found: dict[int, dict[str, int]] = {}
    for entry in entries:
        assert entry["mig-enabled"] == ("mig-devices" in entry)
        found |= dict.fromkeys(entry["devices"], entry.get("mig-devices", {}))
    assert [found[number] for number in range(len(drawn))] == [counts_of(layout) for layout in drawn]
    assert all(place(gpu, counts) is not None for counts in found.values())


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "a" * 51, "all-disabled", "a: b", "ä"])
def test_a_name_that_cannot_be_a_label_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="use 1 to 50 of a-z"):
        node_configs(name, [SEVEN], 1)


def test_a_plan_without_gpus_or_nodes_is_refused() -> None:
    with pytest.raises(DataError, match="0 GPUs, 8 in a node"):
        node_configs("fraud", [], 8)
    with pytest.raises(DataError, match="1 GPUs, 0 in a node"):
        node_configs("fraud", [SEVEN], 0)


def test_the_files_are_written_with_the_commands(tmp_path: Path) -> None:
    commands = write_gpu_configuration(tmp_path, "fraud", [SEVEN], 8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu-operator-configmap.yaml", "mig-parted.yaml"]
    assert "kubectl apply --filename gpu-operator-configmap.yaml" in commands
    assert read((tmp_path / "mig-parted.yaml").read_text())["mig-configs"]["fraud"][0]["mig-devices"] == {"1g.5gb": 7}
