"""Stand-ins for Triton that fail on demand: gRPC servers in this process that speak Triton's protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves a model that gives each row `score`; a context manager.

    `ready`, `fault` (gRPC status and text of each inference), `goes_on` (while it is cleared, inferences wait), `cut`
    (answers end before their last byte) and `signature` may be set at any time. `rows`: of each inference that it was
    asked for. `options`: of gRPC's server.
    """

    def __init__(
        self, signature: DeepSignature, score: float = 0.0, host: str = "127.0.0.1", port: int = 0, **options: int
    ) -> None:
        self.signature, self.score = signature, score
        self.ready, self.cut = True, False
        self.fault: tuple[grpc.StatusCode, str] | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.rows: list[int] = []
        named = [("grpc.so_reuseport", 0), *((f"grpc.{name}", value) for name, value in options.items())]
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=named)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.url = f"{host}:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.goes_on.set()
        self._server.stop(None).wait()

    @property
    def calls(self) -> int:
        """The number of inferences that are no probes."""
        return sum(rows > 1 for rows in self.rows)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelMetadataResponse(name=request.name)
        for tensors, shapes in (
            (answer.inputs, self.signature.input_shapes),
            (answer.outputs, self.signature.output_shapes),
        ):
            for name, shape in shapes.items():
                tensors.add(name=name, datatype="FP32", shape=[-1, *shape])
        return answer

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = BATCH_ROWS_MAX
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:
        rows = request.inputs[0].shape[0]
        self.rows.append(rows)
        self.goes_on.wait()
        if self.fault is not None:
            context.abort(*self.fault)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name=self.signature.output, datatype="FP32", shape=[rows, 1])
        content = np.full((rows, 1), self.score, np.float32).tobytes()
        answer.raw_output_contents.append(content[:-1] if self.cut else content)
        return answer


@contextmanager
def fake_tritons(signature: DeepSignature, count: int) -> Iterator[list[FakeTriton]]:
    """Several stand-ins, whose scores are their places."""
    with ExitStack() as stack:
        yield [stack.enter_context(FakeTriton(signature, float(place))) for place in range(count)]
