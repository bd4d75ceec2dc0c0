"""Real parts for the tests: a Kafka broker, a Triton, and a small deep model with the real contract."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from cascade.bundle import load_bundle
from cascade.config import DuplicateSettings, KafkaSettings
from cascade.local_parts import local_parts_dir
from cascade.protocols import DeepInputs
from stages.assembly import make_engine
from stages.deep import local_triton
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from stages.deep.signature import DeepSignature
from streaming import local_broker
from streaming.clients import TopicSpec, ensure_topics
from streaming.decisions import warm_up_encoder
from streaming.duplicates import FirstDecisions
from streaming.local_broker import LocalBroker

SHIPPED = Path(__file__).parents[1] / "cascade" / "bundles" / "simulator"
KAFKA_FROM_OUTSIDE = os.environ.get("KAFKA_BOOTSTRAP", "")


class Broker(Protocol):
    @property
    def bootstrap(self) -> str: ...


@dataclass(frozen=True)
class OutsideBroker:
    bootstrap: str


@dataclass(frozen=True)
class TinyDeepModel:
    path: Path
    signature: DeepSignature

    def inputs(self, rows: int, seed: int = 0) -> DeepInputs:
        chance = np.random.default_rng(seed)
        sequence = (rows, self.signature.sequence_length, self.signature.sequence_width)
        return DeepInputs(
            sequence=chance.normal(size=sequence).astype(np.float32),
            features=chance.normal(size=(rows, self.signature.features)).astype(np.float32),
        )


@pytest.fixture(scope="session")
def kernels() -> None:
    """numba's cache is full: services that start together would each compile everything, for a minute or more."""
    make_engine(load_bundle(SHIPPED)).warm_up()
    FirstDecisions(DuplicateSettings()).warm_up()
    warm_up_encoder()


@pytest.fixture(scope="session")
def kafka_parts(kernels: None) -> Path:
    """The directory of the embedded parts, Kafka among them."""
    local_broker.install(local_parts_dir(), print)
    return local_parts_dir()


@pytest.fixture(scope="session")
def triton_parts() -> Path:
    """The directory of the embedded parts, Triton among them."""
    local_triton.install(local_parts_dir(), print)
    return local_parts_dir()


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running broker: the one at $KAFKA_BOOTSTRAP, else an embedded one of one node."""
    if KAFKA_FROM_OUTSIDE:
        yield OutsideBroker(KAFKA_FROM_OUTSIDE)
        return
    parts = request.getfixturevalue("kafka_parts")
    with LocalBroker(tmp_path_factory.mktemp("broker"), parts_dir=parts) as running:
        yield running


@pytest.fixture
def new_topic(broker: Broker) -> Callable[..., str]:
    """Makes a topic that no other test knows, and returns its name."""

    def make(partitions: int = 1, **settings: str) -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        dotted = {key.replace("_", "."): value for key, value in settings.items()}
        ensure_topics(KafkaSettings(bootstrap=broker.bootstrap), [TopicSpec(name, partitions, settings=dotted)])
        return name

    return make


@pytest.fixture(scope="session")
def tiny_deep_model(tmp_path_factory: pytest.TempPathFactory) -> TinyDeepModel:
    """logit = tanh(mean of the sequence) · v + features · w, in ONNX, with the names of the real model."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    signature = DeepSignature(sequence_length=5, sequence_width=3, features=4)
    chance = np.random.default_rng(7)
    weights = {"v": chance.normal(size=(3, 1)), "w": chance.normal(size=(4, 1))}
    shapes = {"sequence": ["rows", 5, 3], "features": ["rows", 4], "logit": ["rows", 1]}
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["sequence"], ["mean"], axes=[1], keepdims=0),
            helper.make_node("Tanh", ["mean"], ["squashed"]),
            helper.make_node("MatMul", ["squashed", "v"], ["from_sequence"]),
            helper.make_node("MatMul", ["features", "w"], ["from_features"]),
            helper.make_node("Add", ["from_sequence", "from_features"], ["logit"]),
        ],
        "tiny",
        [tensors["sequence"], tensors["features"]],
        [tensors["logit"]],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", signature.opset)], ir_version=9)
    checker.check_model(model, full_check=True)
    path = tmp_path_factory.mktemp("tiny_deep_model") / "model.onnx"
    save(model, path)
    return TinyDeepModel(path, signature)


@pytest.fixture(scope="session")
def tiny_triton(
    triton_parts: Path, tiny_deep_model: TinyDeepModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalTriton]:
    """A Triton that serves the tiny model."""
    out = tmp_path_factory.mktemp("triton") / "models"
    repository = write_repository(tiny_deep_model.path, tiny_deep_model.signature, out, "cpu")
    with LocalTriton(repository, parts_dir=triton_parts) as running:
        yield running


@pytest.fixture
def triton(tiny_triton: LocalTriton) -> LocalTriton:
    """A running Triton that serves the tiny model; started again where it has crashed (decision 0003)."""
    if tiny_triton.pid is None:
        tiny_triton.start()
    return tiny_triton
