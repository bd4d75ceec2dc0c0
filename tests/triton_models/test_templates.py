"""The model repositories: both targets serve the same contract, and Triton's own schema reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stages.deep.repository import ServingLimits, Target, write_repository
from stages.deep.signature import BATCH_ROWS_MAX, DIGEST_PARAMETER, MODEL_NAME
from tests.conftest import TinyDeepModel


def config_of(model: TinyDeepModel, out: Path, target: Target, limits: ServingLimits | None = None) -> Any:
    repository = write_repository(model.path, model.signature, out, target, limits or ServingLimits())
    text = (repository / MODEL_NAME / "config.pbtxt").read_text()
    assert "$" not in text
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_both_targets_have_the_same_contract_on_their_backend_and_device(
    tiny_deep_model: TinyDeepModel, tmp_path: Path
) -> None:
    cpu, gpu = (config_of(tiny_deep_model, tmp_path / target, target) for target in ("cpu", "gpu"))
    for part in ("name", "max_batch_size", "input", "output", "dynamic_batching", "model_warmup"):
        assert getattr(cpu, part) == getattr(gpu, part)
    assert cpu.name == MODEL_NAME
    assert cpu.max_batch_size == BATCH_ROWS_MAX
    shapes = {"card_sequence": [5, 3], "terminal_sequence": [2, 6], "features": [4]}
    assert {tensor.name: list(tensor.dims) for tensor in cpu.input} == shapes
    for warmup in cpu.model_warmup:
        assert {name: list(value.dims) for name, value in warmup.inputs.items()} == shapes
    assert {tensor.name: list(tensor.dims) for tensor in cpu.output} == {"logit": [1]}
    assert sorted(warmup.batch_size for warmup in cpu.model_warmup) == [1, BATCH_ROWS_MAX]
    group = model_config_pb2.ModelInstanceGroup
    assert (cpu.backend, cpu.instance_group[0].kind) == ("python", group.KIND_CPU)
    assert (gpu.backend, gpu.instance_group[0].kind) == ("onnxruntime", group.KIND_GPU)
    assert (tmp_path / "cpu" / MODEL_NAME / "1" / "model.py").is_file()
    assert not (tmp_path / "gpu" / MODEL_NAME / "1" / "model.py").exists()
    assert (tmp_path / "gpu" / MODEL_NAME / "1" / "model.onnx").read_bytes() == tiny_deep_model.path.read_bytes()
    digest = hashlib.sha256(tiny_deep_model.path.read_bytes()).hexdigest()
    assert {config.parameters[DIGEST_PARAMETER].string_value for config in (cpu, gpu)} == {digest}
    assert gpu.HasField("dynamic_batching")
    assert gpu.dynamic_batching == model_config_pb2.ModelDynamicBatching(), "neither delay nor queue policy by default"


def test_limits_reach_the_queue(tiny_deep_model: TinyDeepModel, tmp_path: Path) -> None:
    limits = ServingLimits(instances=2, threads=3, batch_delay_us=300, queue_requests_max=64, queue_timeout_us=40_000)
    config = config_of(tiny_deep_model, tmp_path / "models", "cpu", limits)
    policy = config.dynamic_batching.default_queue_policy
    assert config.dynamic_batching.max_queue_delay_microseconds == 300
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 40_000)
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert config.instance_group[0].count == 2
    assert config.parameters["threads"].string_value == "3"


@pytest.mark.parametrize("wrong", [{"instances": 0}, {"threads": 0}, {"queue_timeout_us": -1}])
def test_limits_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServingLimits(**wrong)


def test_a_repository_that_cannot_be_written_leaves_the_old_one(tiny_deep_model: TinyDeepModel, tmp_path: Path) -> None:
    out = write_repository(tiny_deep_model.path, tiny_deep_model.signature, tmp_path / "models", "cpu")
    with pytest.raises(OSError, match=r"absent\.onnx"):
        write_repository(tmp_path / "absent.onnx", tiny_deep_model.signature, out, "gpu")
    assert (out / MODEL_NAME / "1" / "model.py").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["models"]
