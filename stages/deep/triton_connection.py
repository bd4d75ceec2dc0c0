"""The connection to one Triton: its requests, and the checks of its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from cascade.columns import Array, Float32, Float64
from cascade.errors import DeepStageError, ModelServerError
from cascade.protocols import DeepInputs
from stages.deep.answers import checked_scores, probe_inputs
from stages.deep.grpc_channel import GrpcCall, GrpcChannel, GrpcError
from stages.deep.replicas import Address
from stages.deep.signature import BATCH_ROWS_MAX, DIGEST_PARAMETER, DeepSignature

_SERVICE: Final = "/inference.GRPCInferenceService/"
_MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
# gRPC's default is two minutes, for which a restarted Triton would stay unused. A new one must have its share of the
# calls within a second of being ready.
_RECONNECT_MS_FIRST: Final = 100
_RECONNECT_MS_MAX: Final = 250
# Time limit for connecting, which gRPC names the minimum backoff (issue 33423 of grpc/grpc). A refused connection fails
# at once.
_CONNECT_MS_MAX: Final = 2_000
# Time limit for each request of a check. It is long because its end cancels the request, which this client avoids
# (decision 3).
_CHECK_S_MAX: Final = 30.0
# How long a probe may wait in the server's queue.
_PROBE_QUEUE_S_MAX: Final = 5.0
# Triton answers both with UNAVAILABLE, as gRPC reports a server that is gone. Only the text distinguishes them.
_QUEUE_FULL_TEXTS: Final = ("maximum queue size", "queue is full")
_QUEUE_TIMEOUT_TEXTS: Final = ("timeout expired",)


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """TLS and keep-alive of the connections to Triton.

    - `ssl`, `root_certificates`: whether to use TLS, and the authority that signed the server's certificate (PEM).
    - `private_key`, `certificate_chain`: the client's own certificate (PEM), for mutual TLS.
    - `keepalive_s`: seconds between pings on an idle connection.
    - `keepalive_timeout_s`: seconds without an answer to a ping after which the connection counts as dead.
    """

    ssl: bool = False
    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    # Servers refuse clients that ping an idle connection more often than every five minutes.
    keepalive_s: float = 300.0
    keepalive_timeout_s: float = 10.0

    def credentials(self) -> Any:
        """gRPC's credentials; None without TLS. Raises OSError if a file cannot be read."""
        if not self.ssl:
            return None
        import grpc

        files = (self.root_certificates, self.private_key, self.certificate_chain)
        return grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))

    def channel_arguments(self, address: Address) -> list[tuple[str, int | str]]:
        """The options under gRPC's names, for a connection to `address`."""
        arguments: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS_FIRST),
            ("grpc.min_reconnect_backoff_ms", _CONNECT_MS_MAX),
            ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS_MAX),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if address.host != address.ip:
            # the certificate and the requests name the configured host, not the address that it resolves to
            arguments.append(("grpc.default_authority", f"{address.host}:{address.port}"))
            if self.ssl:
                arguments.append(("grpc.ssl_target_name_override", address.host))
        return arguments


class ReplicaUnavailableError(DeepStageError):
    """The server did not take the request: it is gone, stops, or its queue is full. Another replica may take it."""


class TritonConnection:
    """Requests to one Triton. Create it and use it on an asyncio loop.

    - `address`: of Triton's gRPC.
    - `model`, `signature`: its name on the server, and its tensors.
    - `digest`: the SHA-256 of the bundle's ONNX file; None: not compared.
    - `options`, `credentials`: `credentials` are those of `options`, so that each connection has the same.
    - `channels`: the number of TCP connections; a request names the one that it takes.
    """

    def __init__(
        self,
        address: Address,
        model: str,
        signature: DeepSignature,
        digest: str | None,
        options: GrpcOptions,
        credentials: Any,
        channels: int = 1,
    ) -> None:
        from tritonclient.grpc import service_pb2

        self._messages = service_pb2
        self._target, self._model, self._signature, self._digest = address.target, model, signature, digest
        self._descriptions: dict[tuple[tuple[int, ...], ...], bytes] = {}
        arguments = options.channel_arguments(address)
        self._channels = [GrpcChannel(address, credentials, arguments) for _ in range(channels)]

    def start(
        self,
        inputs: DeepInputs,
        queue_s: float,
        ended: Callable[[Float64 | DeepStageError], None],
        channel: int = 0,
    ) -> GrpcCall:
        """Send a request of at most 256 rows.

        - `queue_s`: it may wait for so long in the server's queue.
        - `ended`: gets its scores or its error, once; not before this method returns, and not after `cancel`.
        """

        def answered(answer: bytes | GrpcError) -> None:
            ended(self._stage_error(answer) if isinstance(answer, GrpcError) else self._scores(answer, len(inputs)))

        return self._channels[channel].call(f"{_SERVICE}ModelInfer", self._request(inputs, queue_s), answered)

    def cancel(self, call: GrpcCall, channel: int = 0) -> None:
        """Cancel a request; no effect on one that has ended."""
        self._channels[channel].cancel(call)

    async def infer(self, inputs: DeepInputs, queue_s: float, limit_s: float, channel: int = 0) -> Float64:
        """Scores of one request as that of `start`, which is cancelled after `limit_s`. Raises DeepStageError."""
        try:
            request = self._request(inputs, queue_s)
            answer = await self._channels[channel].ask(f"{_SERVICE}ModelInfer", request, limit_s)
        except GrpcError as error:
            raise self._stage_error(error) from error
        scores = self._scores(answer, len(inputs))
        if isinstance(scores, DeepStageError):
            raise scores
        return scores

    def _request(self, inputs: DeepInputs, queue_s: float) -> bytes:
        request = self._messages.ModelInferRequest()
        # for the server's queue, in microseconds: it refuses requests for which nobody waits any more
        request.parameters["timeout"].int64_param = max(int(queue_s * 1e6), 1)
        tensors = self._signature.tensors(inputs)
        for values in tensors.values():
            request.raw_input_contents.append(values.tobytes())
        # the encodings of two messages, one after the other, are that of both together
        encoded: bytes = self._description(tensors) + request.SerializeToString()
        return encoded

    def _description(self, tensors: dict[str, Float32]) -> bytes:
        """The part of a request that depends on nothing but the shapes of its tensors, encoded."""
        shapes = tuple(values.shape for values in tensors.values())
        if shapes not in self._descriptions:
            request = self._messages.ModelInferRequest(model_name=self._model)
            for name, shape in zip(tensors, shapes, strict=True):
                request.inputs.add(name=name, datatype="FP32", shape=shape)
            request.outputs.add(name=self._signature.output)
            if len(self._descriptions) == BATCH_ROWS_MAX:
                self._descriptions.clear()
            self._descriptions[shapes] = request.SerializeToString()
        return self._descriptions[shapes]

    def _scores(self, answer: bytes, rows: int) -> Float64 | DeepStageError:
        """The scores of an answer; a DeepStageError if it has others than the model's."""
        try:
            return checked_scores(self._output(self._messages.ModelInferResponse.FromString(answer)), rows)
        except DeepStageError as error:
            return error
        except Exception as error:  # protobuf's and numpy's: what the server sent cannot be read
            return DeepStageError("error", f"Triton at {self._target}: {type(error).__name__}: {error}")

    def _output(self, answer: Any) -> Array | None:
        for tensor, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
            if tensor.name == self._signature.output:
                # raises ValueError where the content has not the length of the shape
                return np.frombuffer(content, np.float32).reshape(tensor.shape)
        return None

    def _stage_error(self, error: GrpcError) -> DeepStageError:
        lowered = error.text.lower()
        message = f"Triton at {self._target}: {error}"
        if error.status == "DEADLINE_EXCEEDED" or any(part in lowered for part in _QUEUE_TIMEOUT_TEXTS):
            return DeepStageError("deadline", message)
        full = error.status == "RESOURCE_EXHAUSTED" or any(part in lowered for part in _QUEUE_FULL_TEXTS)
        cause = "queue-full" if full else "error"
        if error.status == "UNAVAILABLE":
            return ReplicaUnavailableError(cause, message)
        return DeepStageError(cause, message)

    async def check_ready(self) -> None:
        """Returns if the server serves the model; else raises DeepStageError with the reason as text.

        May take half a minute: the caller decides earlier what that means.
        """
        answer = await self._ask("ModelReady", self._messages.ModelReadyRequest(name=self._model))
        if not self._messages.ModelReadyResponse.FromString(answer).ready:
            raise DeepStageError("error", "the model is not ready")

    async def check_model(self) -> None:
        """Returns if the server serves the bundle's model and it scores a row on each channel.

        Raises DeepStageError with the reason as text, or ModelServerError if its model has other tensors.
        """
        await self.check_ready()
        await self._check_configuration()
        for channel in range(len(self._channels)):
            try:
                await self.infer(probe_inputs(self._signature), _PROBE_QUEUE_S_MAX, _CHECK_S_MAX, channel)
            except DeepStageError as error:
                raise DeepStageError(error.cause, f"the model is ready but does not answer: {error}") from error

    async def _check_configuration(self) -> None:
        """Compare the served model's tensors, batch size and SHA-256 (if it states one) with the bundle's."""
        messages = self._messages
        answer = await self._ask("ModelMetadata", messages.ModelMetadataRequest(name=self._model))
        metadata = messages.ModelMetadataResponse.FromString(answer)
        answer = await self._ask("ModelConfig", messages.ModelConfigRequest(name=self._model))
        config = messages.ModelConfigResponse.FromString(answer).config
        tensors = (*metadata.inputs, *metadata.outputs)
        actual = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in tensors}
        shapes = self._signature.input_shapes | self._signature.output_shapes
        expected = {name: ("FP32", [-1, *shape]) for name, shape in shapes.items()}
        for name in sorted(actual.keys() | expected.keys()):
            if actual.get(name) != expected.get(name):
                raise ModelServerError(
                    f"Triton at {self._target} serves another {self._model}: tensor {name} is"
                    f" {_shown(actual.get(name))}, in the bundle {_shown(expected.get(name))}; serve the bundle's"
                    " model, or set bundle.path to the bundle of the served model"
                )
        if config.max_batch_size < BATCH_ROWS_MAX:
            raise ModelServerError(
                f"Triton at {self._target} serves {self._model} with max_batch_size {config.max_batch_size}; "
                f"set it to {BATCH_ROWS_MAX}"
            )
        served = config.parameters[DIGEST_PARAMETER].string_value
        if self._digest and served not in ("", self._digest):
            # no wrong setting, as other tensors are: during an update it may serve this bundle's later
            raise DeepStageError(
                "error", f"Triton at {self._target} serves another bundle's {self._model} (SHA-256 {served[:12]}…)"
            )

    async def _ask(self, method: str, request: Any) -> bytes:
        """The answer to a request of a check; raises DeepStageError."""
        try:
            return await self._channels[0].ask(_SERVICE + method, request.SerializeToString(), _CHECK_S_MAX)
        except GrpcError as error:
            raise DeepStageError("error", str(error)) from error

    async def close(self) -> None:
        """Closes the connection; cancels requests without an answer."""
        for channel in self._channels:
            await channel.close()


def _shown(tensor: tuple[str, list[int]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {tensor[1]}"
