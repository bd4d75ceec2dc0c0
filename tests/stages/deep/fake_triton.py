"""Stand-ins for Triton that fail on demand: gRPC servers in this process that speak Triton's protocol."""

from __future__ import annotations

import threading
from concurrent import futures
from contextlib import ExitStack
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves a model that gives each row `score`; a context manager.

    `ready`, `fault` (gRPC status and text of each inference), `hangs` (an inference waits until it is cleared) and
    `signature` may be set at any time. `rows`: of each inference that it was asked for.
    """

    def __init__(self, signature: DeepSignature, score: float = 0.0, host: str = "127.0.0.1", port: int = 0) -> None:
        self.signature, self.score = signature, score
        self.ready = True
        self.fault: tuple[grpc.StatusCode, str] | None = None
        self.hangs = threading.Event()
        self.rows: list[int] = []
        self._goes_on = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.url = f"{host}:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._goes_on.set()
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
        if self.hangs.is_set():
            self._goes_on.wait()
        if self.fault is not None:
            context.abort(*self.fault)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name=self.signature.output, datatype="FP32", shape=[rows, 1])
        answer.raw_output_contents.append(np.full((rows, 1), self.score, np.float32).tobytes())
        return answer


class FakeTritons:
    """Several stand-ins, whose scores are their places; a context manager."""

    def __init__(self, signature: DeepSignature, count: int) -> None:
        self.servers = [FakeTriton(signature, score=float(place)) for place in range(count)]
        self.url = ",".join(server.url for server in self.servers)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for server in self.servers:
            self._stack.enter_context(server)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
