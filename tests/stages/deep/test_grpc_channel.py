"""Calls to an address: who connects, and what happens where there is no server, or one that ends connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from tritonclient.grpc import service_pb2

from cascade.local_parts import free_ports
from stages.deep.grpc_channel import GrpcChannel, GrpcError
from stages.deep.replicas import Address
from stages.deep.triton_connection import GrpcOptions
from tests.conftest import TinyDeepModel
from tests.stages.deep.fake_triton import FakeTriton
from tests.timing import wait_until

READY = "/inference.GRPCInferenceService/ModelReady"
INFER = "/inference.GRPCInferenceService/ModelInfer"


def made_channel(port: int) -> GrpcChannel:
    address = Address("127.0.0.1", port, "127.0.0.1")
    return GrpcChannel(address, None, GrpcOptions().channel_arguments(address))


@asynccontextmanager
async def channel_to(port: int) -> AsyncIterator[GrpcChannel]:
    channel = made_channel(port)
    yield channel
    await channel.close()


async def ready(channel: GrpcChannel) -> bool:
    request = service_pb2.ModelReadyRequest(name="fraud_deep")
    answer = await channel.ask(READY, request.SerializeToString(), 20)
    return bool(service_pb2.ModelReadyResponse.FromString(answer).ready)


async def infer(channel: GrpcChannel, model: TinyDeepModel) -> int:
    """The length of an answer for two rows."""
    request = service_pb2.ModelInferRequest(model_name="fraud_deep")
    request.inputs.add(name="features", datatype="FP32", shape=[2, model.signature.features])
    return len(await channel.ask(INFER, request.SerializeToString(), 20))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


async def ready_within(channel: GrpcChannel, seconds: float) -> bool:
    """Asks again while there is no connection; gRPC pauses between two attempts."""
    give_up_s = time.monotonic() + seconds
    while True:
        try:
            return await ready(channel)
        except GrpcError as error:
            if error.status != "UNAVAILABLE" or time.monotonic() > give_up_s:
                raise
        await asyncio.sleep(0.02)


def test_without_a_server_a_call_fails_at_once_and_soon_after_its_start_it_is_answered(
    tiny_deep_model: TinyDeepModel,
) -> None:
    (port,) = free_ports(1)

    async def test() -> None:
        async with channel_to(port) as channel:
            for _ in range(3):
                with pytest.raises(GrpcError, match=r"^UNAVAILABLE: .*Connection refused"):
                    await ready(channel)
            with FakeTriton(tiny_deep_model.signature, port=port):
                assert await ready_within(channel, 2.0)
            with pytest.raises(GrpcError, match=r"^UNAVAILABLE"):
                await ready(channel)
            with FakeTriton(tiny_deep_model.signature, port=port):
                assert await ready_within(channel, 2.0)

    run(test)


def test_a_server_that_ends_each_connection_after_a_while_loses_no_call(tiny_deep_model: TinyDeepModel) -> None:
    age = {"max_connection_age_ms": 100, "max_connection_age_grace_ms": 5_000}

    async def test() -> None:
        with FakeTriton(tiny_deep_model.signature, **age) as server:
            async with channel_to(server.port) as channel:
                until_s = time.monotonic() + 1.5
                while time.monotonic() < until_s:
                    await asyncio.gather(*(infer(channel, tiny_deep_model) for _ in range(4)))

    run(test)


def test_the_end_of_a_channel_fails_its_calls_and_later_ones(tiny_deep_model: TinyDeepModel) -> None:
    async def test() -> None:
        with FakeTriton(tiny_deep_model.signature) as server:
            channel = made_channel(server.port)
            assert await ready(channel)
            server.goes_on.clear()
            waiting = asyncio.create_task(infer(channel, tiny_deep_model))
            await asyncio.to_thread(wait_until, lambda: len(server.rows) == 1, "the call is there", 20)
            await channel.close()
            for call in (waiting, infer(channel, tiny_deep_model)):
                with pytest.raises(GrpcError, match="the connection was closed"):
                    await call
            assert not channel._open

    run(test)
