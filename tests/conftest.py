"""Real parts for the tests: a Kafka broker, a Triton, and a small deep model with the real contract."""

from __future__ import annotations

import os

# Threads of OpenMP spin while they wait for each other: where the cores are busy, training takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import settings

from cascade import local_parts
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.config import DeepSettings, KafkaSettings
from cascade.local_parts import local_parts_dir
from cascade.protocols import DeepInputs, DeepStage
from stages.assembly import make_deep_stage
from stages.deep import local_triton
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from stages.deep.signature import DeepSignature
from streaming.kafka import TopicSpec, ensure_topics, local_broker
from tests.shared_parts import PartsServer, SharedParts, connect

# The same examples in each run: `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("certain", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("certain")

# Each process of a run chooses its ports from a sixth of them: the workers gw0 to gw3, and the owner of the run.
# Otherwise one process could take the port of a service that another process is about to start again.
_SIXTH = (local_parts.PORT_LAST - local_parts.PORT_FIRST) // 6
local_parts.PORT_FIRST += _SIXTH * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw4").removeprefix("gw")) % 6)
local_parts.PORT_LAST = local_parts.PORT_FIRST + _SIXTH

KAFKA_FROM_OUTSIDE = os.environ.get("KAFKA_BOOTSTRAP", "")


class Broker(Protocol):
    @property
    def bootstrap(self) -> str: ...


@dataclass(frozen=True)
class OutsideBroker:
    bootstrap: str


OWNED_PARTS = pytest.StashKey[SharedParts]()
PARTS_SERVER = pytest.StashKey[PartsServer]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.stash[OWNED_PARTS] = SharedParts()


def pytest_unconfigure(config: pytest.Config) -> None:
    if OWNED_PARTS in config.stash:
        config.stash[OWNED_PARTS].close()


def pytest_configure_node(node: Any) -> None:
    """A hook of pytest-xdist, in the process that owns the run: how its worker `node` reaches the shared parts."""
    stash = node.config.stash
    if PARTS_SERVER not in stash:
        stash[PARTS_SERVER] = PartsServer(stash[OWNED_PARTS])
    node.workerinput["shared_parts"] = stash[PARTS_SERVER].address


@pytest.fixture(scope="session")
def shared_parts(request: pytest.FixtureRequest) -> SharedParts:
    """The parts that all workers of this run share."""
    if OWNED_PARTS in request.config.stash:
        return request.config.stash[OWNED_PARTS]
    return connect(request.config.workerinput["shared_parts"])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TinyDeepModel:
    path: Path
    signature: DeepSignature

    def inputs(self, rows: int, seed: int = 0) -> DeepInputs:
        chance = np.random.default_rng(seed)
        sequences = {
            name: chance.normal(size=(rows, *shape)).astype(np.float32)
            for name, shape in self.signature.sequences.items()
        }
        return DeepInputs(sequences, chance.normal(size=(rows, self.signature.features)).astype(np.float32))


@pytest.fixture(scope="session")
def kafka_parts() -> Path:
    """The directory of the embedded parts, Kafka among them."""
    local_broker.install(local_parts_dir(), print)
    return local_parts_dir()


@pytest.fixture(scope="session")
def triton_parts() -> Path:
    """The directory of the embedded parts, Triton among them."""
    local_triton.install(local_parts_dir(), print)
    return local_parts_dir()


@pytest.fixture(scope="session")
def broker(shared_parts: SharedParts) -> Broker:
    """A running broker: the one at $KAFKA_BOOTSTRAP, else the embedded one that the whole run shares."""
    return OutsideBroker(KAFKA_FROM_OUTSIDE) if KAFKA_FROM_OUTSIDE else shared_parts.broker()


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
    """logit = tanh(mean of the card's sequence) · v + mean of the terminal's · u + features · w, in ONNX."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    signature = DeepSignature(sequences={"card_sequence": (5, 3), "terminal_sequence": (2, 6)}, features=4)
    chance = np.random.default_rng(7)
    weights = {"v": chance.normal(size=(3, 1)), "w": chance.normal(size=(4, 1)), "u": chance.normal(size=(6, 1))}
    shapes = {name: ["rows", *shape] for name, shape in (signature.input_shapes | signature.output_shapes).items()}
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["card_sequence"], ["mean"], axes=[1], keepdims=0),
            helper.make_node("ReduceMean", ["terminal_sequence"], ["terminal_mean"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["terminal_mean", "u"], ["from_terminal"]),
            helper.make_node("Tanh", ["mean"], ["squashed"]),
            helper.make_node("MatMul", ["squashed", "v"], ["from_card"]),
            helper.make_node("MatMul", ["features", "w"], ["from_features"]),
            helper.make_node("Add", ["from_card", "from_terminal"], ["from_sequences"]),
            helper.make_node("Add", ["from_sequences", "from_features"], ["logit"]),
        ],
        "tiny",
        [tensors[name] for name in signature.input_shapes],
        [tensors["logit"]],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", signature.opset)], ir_version=9)
    checker.check_model(model, full_check=True)
    path = tmp_path_factory.mktemp("tiny_deep_model") / "model.onnx"
    save(model, path)
    return TinyDeepModel(path, signature)


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The shipped bundle."""
    return load_bundle(SHIPPED_BUNDLE)


@pytest.fixture(scope="session")
def deep(bundle: Bundle) -> Iterator[DeepStage]:
    """The deep model of the shipped bundle, in this process."""
    with closing(make_deep_stage(bundle, DeepSettings(backend="onnxruntime"))) as stage:
        yield stage


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
