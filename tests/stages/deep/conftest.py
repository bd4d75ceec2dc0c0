from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, save

from cascade.columns import Float64
from cascade.errors import DeepStageError
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from stages.deep.triton import TritonDeepStage
from tests.conftest import TinyDeepModel

StageMaker = Callable[..., TritonDeepStage]


def failure(future: Future[Float64]) -> DeepStageError:
    """The error of a call that fails."""
    error = future.exception(timeout=20)
    assert isinstance(error, DeepStageError)
    return error


@pytest.fixture
def stage(triton: LocalTriton, tiny_deep_model: TinyDeepModel) -> Iterator[TritonDeepStage]:
    made = TritonDeepStage(triton.grpc_url, tiny_deep_model.signature)
    made.wait_ready(20)
    yield made
    made.close()


@pytest.fixture
def new_stage(tiny_deep_model: TinyDeepModel) -> Iterator[StageMaker]:
    """Makes a stage of the tiny model by its URL and further arguments, and waits until it is ready."""
    made: list[TritonDeepStage] = []

    def make(url: str, **arguments: Any) -> TritonDeepStage:
        stage = TritonDeepStage(url, tiny_deep_model.signature, **arguments)
        made.append(stage)
        stage.wait_ready(20)
        return stage

    yield make
    for stage in made:
        stage.close()


@pytest.fixture
def repository(tiny_deep_model: TinyDeepModel, tmp_path: Path) -> Path:
    """A model repository of the tiny model, for a Triton that a test starts."""
    return write_repository(tiny_deep_model.path, tiny_deep_model.signature, tmp_path / "models", "cpu")


@pytest.fixture(scope="session")
def slow_deep_model(tiny_deep_model: TinyDeepModel, tmp_path_factory: pytest.TempPathFactory) -> TinyDeepModel:
    """A model with the contract of the tiny one that computes for some tenths of a second, whatever the batch."""
    square = np.eye(256, dtype=np.float32) * 0.5
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("MatMul", ["state", "square"], ["next_state"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [256, 256]),
        ],
    )
    signature = tiny_deep_model.signature
    shapes = {name: ["rows", *shape] for name, shape in (signature.input_shapes | signature.output_shapes).items()}
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["features"], ["total"], keepdims=0),
            helper.make_node("Mul", ["square", "total"], ["start"]),
            helper.make_node("Loop", ["steps", "", "start"], ["end"], body=body),
            helper.make_node("ReduceSum", ["end"], ["number"], keepdims=0),
            helper.make_node("ReduceMean", ["features"], ["mean"], axes=[1], keepdims=1),
            helper.make_node("ReduceMean", ["card_sequence"], ["other"], axes=[1, 2], keepdims=0),
            helper.make_node("ReduceMean", ["terminal_sequence"], ["another"], axes=[1, 2], keepdims=0),
            helper.make_node("Add", ["other", "another"], ["all"]),
            helper.make_node("ReduceSum", ["all"], ["rest"], keepdims=0),
            helper.make_node("Add", ["number", "rest"], ["both"]),
            helper.make_node("Add", ["mean", "both"], ["logit"]),
        ],
        "slow",
        [tensors[name] for name in signature.input_shapes],
        [tensors["logit"]],
        [numpy_helper.from_array(square, "square"), numpy_helper.from_array(np.int64(400), "steps")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", signature.opset)], ir_version=9)
    checker.check_model(model)
    path = tmp_path_factory.mktemp("slow_deep_model") / "model.onnx"
    save(model, path)
    return TinyDeepModel(path, signature)
