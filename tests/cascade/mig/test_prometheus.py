"""Prometheus's API: what is asked, and every answer that is not one."""

from __future__ import annotations

import math
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.mig import prometheus
from cascade.mig.prometheus import PrometheusError, Sample, read_series
from tests.http_answers import answering

GOOD = (
    b'{"status":"success","data":{"resultType":"matrix","result":['
    b'{"metric":{"__name__":"watts","UUID":"GPU-1"},"values":[[30,"2"],[15.5,"1.5"],[45,"NaN"]]}]}}'
)


def read(content: bytes, status: int = 200) -> list[prometheus.Series]:
    with answering(lambda path, query: (status, content)) as base:
        return read_series(base, ["watts"], 60.0, 60.0)


def test_samples_come_in_the_order_of_time_with_their_labels() -> None:
    (series,) = read(GOOD)
    assert (series.name, series.labels["UUID"]) == ("watts", "GPU-1")
    assert series.samples[:2] == (Sample(15.5, 1.5), Sample(30.0, 2.0))
    assert math.isnan(series.samples[2].value)


def test_labels_cannot_command_the_terminal_or_grow_without_end() -> None:
    (series,) = read(GOOD.replace(b"GPU-1", b"\\u001b[2J" + b"x" * 10_000))
    assert series.labels["UUID"] == "�[2J" + "x" * 96


def test_one_query_asks_for_all_names_over_the_range_up_to_the_moment() -> None:
    asked: list[tuple[str, dict[str, list[str]]]] = []

    def answer(path: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        asked.append((path, query))
        return 200, GOOD

    with answering(answer) as base:
        read_series(f"{base}/prefix/", ["a_b", "c"], 65.0, 64.5)
    assert asked == [("/prefix/api/v1/query", {"query": ['{__name__=~"a_b|c"}[65s]'], "time": ["64.500"]})]


HOSTILE = [
    (500, b"boom", "the answer has the status 500"),
    (400, b'{"status":"error","errorType":"bad_data","error":"parse\\nerror"}', r"status 400 \(parse error\)"),
    (404, b"<html>", "status 404"),
    (200, b"", "not that of Prometheus's API"),
    (200, b"<html>hello</html>", "not that of Prometheus's API"),
    (200, b"\xff\xfe\x00", "not that of Prometheus's API"),
    (200, b"null", "not that of Prometheus's API"),
    (200, b"[" * 100_000, "not that of Prometheus's API"),
    (200, b'{"status":"error","error":"query timed out"}', r"query failed \(query timed out\)"),
    (200, b'{"status":"success"}', "the query failed"),
    (200, b'{"status":"success","data":{"resultType":"vector","result":[]}}', "resultType"),
    (200, b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{}}]}}', "values"),
    (200, GOOD.replace(b'"1.5"', b"1.5"), "Expected `str`"),
    (200, GOOD.replace(b'"1.5"', b'"one"'), "a sample is not a number"),
    (200, GOOD.replace(b"15.5", b"null"), "Expected `float`"),
    (200, GOOD.replace(b"15.5", b"1e300"), "samples from outside the 60 s"),
    (200, GOOD.replace(b"15.5", b"-90"), "samples from outside the 60 s"),
]


@pytest.mark.parametrize(("status", "content", "problem"), HOSTILE, ids=[problem for *_, problem in HOSTILE])
def test_any_other_answer_is_an_error_of_one_line(status: int, content: bytes, problem: str) -> None:
    with pytest.raises(PrometheusError, match=problem) as error:
        read(content, status)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@given(content=st.binary(max_size=200))
@settings(max_examples=200)
def test_arbitrary_bytes_raise_nothing_else(content: bytes) -> None:
    with pytest.raises(PrometheusError):
        prometheus._decoded(content, "http://x")


def test_too_many_series_and_too_long_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "SERIES_MAX", 0)
    with pytest.raises(PrometheusError, match="1 series, the maximum is 0"):
        read(GOOD)
    monkeypatch.setattr(prometheus, "ANSWER_BYTES_MAX", 1 << 20)
    with pytest.raises(PrometheusError, match="longer than 1 MiB"):
        read(b" " * (2 << 20))


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_an_answer_that_is_not_whole_or_not_http_is_an_error(answer: bytes) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener, pytest.raises(PrometheusError, match=r"no answer|not that of"):
        read_series(f"http://127.0.0.1:{listener.getsockname()[1]}", ["watts"], 60.0, 100.0)
    thread.join()


def test_an_answer_that_drips_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "ANSWER_S_MAX", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(200):
                if stopped.wait(0.05):
                    return
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(PrometheusError, match=r"takes more than 0\.5 s"):
            read_series(f"http://127.0.0.1:{listener.getsockname()[1]}", ["watts"], 60.0, 100.0)
        assert time.monotonic() - started < 5.0
    finally:
        stopped.set()
        listener.close()
        thread.join()


def test_a_server_that_is_silent_or_absent_is_an_error_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "ANSWER_S_MAX", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(PrometheusError, match=f"{base}: no answer"):
            read_series(base, ["watts"], 60.0, 100.0)
    with pytest.raises(PrometheusError, match="refused"):
        read_series(base, ["watts"], 60.0, 100.0)
    for other in ("file:///etc/passwd", "127.0.0.1:9090", ""):
        with pytest.raises(PrometheusError, match="not an address"):
            read_series(other, ["watts"], 60.0, 100.0)
