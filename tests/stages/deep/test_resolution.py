"""The addresses behind a name, with a resolver that the test controls."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stages.deep import resolution
from stages.deep.replicas import Address
from stages.deep.resolution import AddressWatch, resolve_host
from tests.timing import wait_until


class Names:
    """A name server: addresses by name; a name that it does not know is an error."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.asked = 0

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked += 1
        if host not in self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.addresses[host]


@contextmanager
def watched(servers: list[tuple[str, int]], resolve: Any) -> Iterator[tuple[AddressWatch, list[list[Address]]]]:
    reports: list[list[Address]] = []
    watch = AddressWatch(servers, resolve, reports.append)
    watch.start()
    try:
        yield watch, reports
    finally:
        watch.close()


def test_addresses_that_need_no_resolution_are_reported_once_without_a_thread() -> None:
    names = Names()
    before = threading.active_count()
    with watched([("127.0.0.1", 8001), ("::1", 8002)], names.resolve) as (_, reports):
        assert reports == [[Address("127.0.0.1", 8001, "127.0.0.1"), Address("::1", 8002, "::1")]]
        assert threading.active_count() == before
    assert names.asked == 0


def test_changes_are_reported_and_equal_answers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution, "RESOLVE_EVERY_S", 0.005)
    names = Names()
    names.addresses["triton"] = ["10.0.0.2", "10.0.0.1"]
    with watched([("triton", 8001), ("10.9.9.9", 7)], names.resolve) as (_, reports):
        wait_until(lambda: names.asked > 3)
        names.addresses["triton"] = ["10.0.0.1", "10.0.0.2", "10.0.0.1"]  # another order
        wait_until(lambda: names.asked > 6)
        assert len(reports) == 1
        names.addresses["triton"] = ["10.0.0.3"]
        wait_until(lambda: len(reports) == 2)
    fixed = Address("10.9.9.9", 7, "10.9.9.9")
    assert reports[0] == [fixed, Address("10.0.0.1", 8001, "triton"), Address("10.0.0.2", 8001, "triton")]
    assert reports[1] == [fixed, Address("10.0.0.3", 8001, "triton")]


def test_a_name_server_that_fails_or_knows_no_address_takes_none_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution, "RESOLVE_EVERY_S", 0.005)
    names = Names()
    names.addresses["triton"] = ["10.0.0.1"]
    with watched([("triton", 8001)], names.resolve) as (watch, reports):
        wait_until(lambda: len(reports) == 1)
        assert watch.problem == ""
        del names.addresses["triton"]
        wait_until(lambda: watch.problem == "triton: Name or service not known")
        names.addresses["triton"] = []
        wait_until(lambda: watch.problem == "triton has no address")
        names.addresses["triton"] = ["10.0.0.1"]
        wait_until(lambda: watch.problem == "")
    assert len(reports) == 1


def test_a_name_server_that_does_not_answer_does_not_delay_the_end() -> None:
    answer = threading.Event()

    def never(host: str, port: int) -> list[str]:
        answer.wait(60)
        return []

    with watched([("triton", 8001)], never) as (watch, reports):
        pass
    assert watch._thread.is_alive()
    answer.set()
    watch._thread.join(10)
    assert reports == []


def test_of_both_families_the_ipv4_addresses_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 8001))
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 8001, 0, 0))
    for answer, expected in (([six, four], ["10.0.0.1"]), ([six], ["fd00::1"])):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=answer, **__: found)
        assert resolve_host("triton", 8001) == expected


def test_the_resolver_of_the_system_knows_this_machine() -> None:
    assert "127.0.0.1" in resolve_host("localhost", 8001)
    with pytest.raises(OSError, match=r"."):
        resolve_host("no-such-host.invalid", 8001)
