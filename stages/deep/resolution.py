"""The addresses behind the host names of a model server, resolved again and again in a thread.

A headless Service of Kubernetes has an address for each ready pod. How soon an address appears here depends on the name
server too: decision 12.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Final

from stages.deep.replicas import Address

# Twice a second, so that a new replica has its first request within a second.
RESOLVE_EVERY_S: Final = 0.45
# The resolver of the C library may wait for a name server for many seconds; the end of the stage does not.
_JOIN_S_MAX: Final = 1.0

Resolver = Callable[[str, int], Sequence[str]]


def resolve_host(host: str, port: int) -> list[str]:
    """The IP addresses of a host name: the IPv4 ones, or if there are none the IPv6 ones. Raises OSError.

    Both families usually lead to the same servers, which must not count twice.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family = {
        family: [str(address[0]) for kind, *_, address in found if kind == family]
        for family in (socket.AF_INET, socket.AF_INET6)
    }
    return by_family[socket.AF_INET] or by_family[socket.AF_INET6]


class AddressWatch:
    """Reports the addresses of `servers` at the start, and when they change, until `close`.

    - `servers`: host and port. The host may be an IP address, which needs no resolution.
    - `resolve`: returns the IP addresses of a host name, or raises OSError; called in the watch's thread.
    - `report`: gets all addresses; called in that thread, or by `start` if all hosts are IP addresses.

    A name that cannot be resolved, or has no address, keeps the addresses that it had. `problem` is then why, for the
    message of a start that finds no server; else it is empty.
    """

    def __init__(
        self, servers: Sequence[tuple[str, int]], resolve: Resolver, report: Callable[[list[Address]], object]
    ) -> None:
        self.problem = ""
        self._fixed = [Address(host, port, host) for host, port in servers if _is_ip_address(host)]
        self._names = [(host, port) for host, port in servers if not _is_ip_address(host)]
        self._found: dict[tuple[str, int], list[Address]] = {}
        self._resolve, self._report = resolve, report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cascade-addresses", daemon=True)

    def start(self) -> None:
        """Starts the watch."""
        if self._names:
            self._thread.start()
        else:
            self._report(self._fixed)

    def close(self) -> None:
        """Stops the watch."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S_MAX)

    def _run(self) -> None:
        reported: list[Address] = []
        while not self._stop.is_set():
            addresses = self._look()
            if addresses != reported and not self._stop.is_set():
                reported = addresses
                self._report(addresses)
            self._stop.wait(RESOLVE_EVERY_S)

    def _look(self) -> list[Address]:
        problem = ""
        for host, port in self._names:
            try:
                found = sorted({Address(ip, port, host) for ip in self._resolve(host, port)})
            except (OSError, UnicodeError) as error:
                found, problem = [], f"{host}: {getattr(error, 'strerror', None) or error}"
            if found:
                self._found[host, port] = found
            else:
                problem = problem or f"{host} has no address"
        self.problem = problem
        return [*self._fixed, *(address for found in self._found.values() for address in found)]


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
