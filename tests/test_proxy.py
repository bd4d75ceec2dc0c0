"""The tests' proxy against a plain echo server: each trouble does what it says, and nothing is left behind."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import CHUNK_BYTES, CHUNKS_MAX, Proxy


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while octets := self.request.recv(65_536):
                self.request.sendall(octets)
        except OSError:
            return


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Proxy("127.0.0.1", server.server_address[1]) as running:
            yield running
        server.shutdown()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5.0)


def receive(through: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        came = through.recv(count - len(found))
        if not came:
            raise ConnectionError("the other end is gone")
        found += came
    return bytes(found)


def send(through: socket.socket, octets: bytes) -> None:
    # where the connection is gone, the receiving side tells
    with contextlib.suppress(OSError):
        through.sendall(octets)


def echo(through: socket.socket, octets: bytes) -> float:
    """Seconds until all of it came back."""
    started_s = time.monotonic()
    sender = threading.Thread(target=send, args=[through, octets])
    sender.start()
    try:
        assert receive(through, len(octets)) == octets
    finally:
        sender.join()
    return time.monotonic() - started_s


def quickest_echo(through: socket.socket, octets: bytes, tries: int = 4) -> float:
    """A busy machine delays one or another; a fault delays each."""
    return min(echo(through, octets) for _ in range(tries))


def test_bytes_pass_unchanged_both_ways_and_the_end_of_one_side_is_told(proxy: Proxy) -> None:
    sent = bytes(range(256)) * 4_000
    with connect(proxy) as through:
        echo(through, sent)
        through.shutdown(socket.SHUT_WR)
        assert through.recv(1) == b""


def test_a_cut_resets_every_connection_and_new_ones_work(proxy: Proxy) -> None:
    with connect(proxy) as first, connect(proxy) as second:
        echo(first, b"hello")
        echo(second, b"hello")
        assert proxy.connections == 2
        proxy.cut()
        for through in (first, second):
            with pytest.raises(ConnectionError):
                echo(through, b"hello")
    with connect(proxy) as third:
        echo(third, b"hello")


def test_a_paused_proxy_accepts_and_passes_nothing_and_then_loses_nothing(proxy: Proxy) -> None:
    with connect(proxy) as before:
        echo(before, b"hello")
        proxy.pause()
        with connect(proxy) as after:
            for through in (before, after):
                through.sendall(b"later")
                through.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    through.recv(1)
                through.settimeout(5.0)
            proxy.resume()
            for through in (before, after):
                assert receive(through, 5) == b"later"


def test_a_delay_counts_each_way_and_does_not_lower_the_rate(proxy: Proxy) -> None:
    with connect(proxy) as through:
        proxy.delay(0.1)
        assert 0.2 <= quickest_echo(through, b"hello") < 0.5
        # ten chunks, each a tenth of a second later, and not one after the other
        assert 0.2 <= quickest_echo(through, b"x" * 10 * CHUNK_BYTES) < 0.8
        proxy.delay(0.0)
        assert quickest_echo(through, b"hello") < 0.1


def test_a_limit_slows_each_direction_to_its_rate(proxy: Proxy) -> None:
    with connect(proxy) as through:
        proxy.limit(100_000)
        assert 0.4 <= quickest_echo(through, b"x" * 50_000, 2) < 1.5
        proxy.limit(0)
        assert quickest_echo(through, b"x" * 50_000) < 0.2


def test_refused_means_that_nobody_listens_until_it_accepts_again(proxy: Proxy) -> None:
    with connect(proxy) as through:
        echo(through, b"hello")
        proxy.refuse()
        with pytest.raises(ConnectionError):
            echo(through, b"hello")
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as through:
        echo(through, b"hello")


def test_what_it_holds_is_bounded_and_the_sender_feels_it(proxy: Proxy) -> None:
    proxy.pause()
    with connect(proxy) as through:
        through.settimeout(0.5)
        # far more than the kernel's own buffers hold
        with pytest.raises(TimeoutError):
            through.sendall(b"x" * CHUNK_BYTES * 100 * CHUNKS_MAX)
    proxy.resume()


def test_a_target_that_is_gone_looks_like_a_reset() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with (
            Proxy("127.0.0.1", unused.getsockname()[1]) as proxy,
            pytest.raises(ConnectionResetError),
            connect(proxy) as through,
        ):
            through.recv(1)


def test_closing_leaves_no_thread_and_no_listener(proxy: Proxy) -> None:
    with Proxy("127.0.0.1", proxy.port) as outer, connect(outer) as through:
        echo(through, b"hello")
        port = outer.port
    assert not [thread for thread in threading.enumerate() if thread.name == f"proxy-{port}"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1.0)
