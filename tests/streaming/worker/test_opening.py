"""Opening a worker: the order of its connections, and what is closed when one of them cannot be made."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import pytest

from bench.faults.process import SimProcess
from bench.faults.run import Simulation
from bench.faults.schedule import derive
from cascade.errors import BrokerError
from streaming.worker import opening
from streaming.worker.opening import Ports, open_worker


class Recorded:
    """Ports whose connections record what is made and closed; `refused` cannot be made."""

    def __init__(self, ports: Ports, refused: str = "") -> None:
        self.calls: list[str] = []
        self.refused = refused
        fields = {name: getattr(ports, name) for name in Ports.__dataclass_fields__}
        names = ("make_producer", "make_member", "make_reader")
        self.ports = Ports(**fields | {name: self.maker(name, fields[name]) for name in names})

    def maker(self, name: str, make: Any) -> Any:
        def made() -> Any:
            kind = name.removeprefix("make_")
            self.calls.append(kind)
            if kind == self.refused:
                raise BrokerError(f"no {kind}")
            connection = make()
            close = connection.close

            def closing(*arguments: float) -> None:
                self.calls.append(f"close {kind}")
                close(*arguments)
                raise BrokerError("gone")

            connection.close = closing
            return connection

        return made


@pytest.fixture
def ports() -> Ports:
    simulation = Simulation(derive(1))
    process = SimProcess(simulation.world, simulation.broker, simulation.disk, simulation.options, 0, 0)
    return process._ports


def test_the_producer_comes_first_and_all_are_closed_backwards_whatever_fails(ports: Ports) -> None:
    recorded = Recorded(ports)
    with ExitStack() as session:
        open_worker(recorded.ports, session)
        readers = 1 + ports.config.terminals.share
        assert recorded.calls == ["producer", "member", *["reader"] * readers]
        recorded.calls.clear()
    assert recorded.calls == [*["close reader"] * readers, "close member", "close producer"]


@pytest.mark.parametrize(
    ("refused", "closed"), [("producer", []), ("member", ["producer"]), ("reader", ["member", "producer"])]
)
def test_what_was_made_before_a_refused_connection_is_closed(ports: Ports, refused: str, closed: list[str]) -> None:
    recorded = Recorded(ports, refused)
    with suppress(BrokerError), ExitStack() as session:
        open_worker(recorded.ports, session)
    assert [call for call in recorded.calls if call.startswith("close")] == [f"close {kind}" for kind in closed]
    assert recorded.calls[: recorded.calls.index(refused) + 1][-1] == refused


def test_a_worker_has_the_parts_of_its_ports(ports: Ports) -> None:
    with ExitStack() as session:
        parts = open_worker(ports, session)._parts
    for name in opening.Surroundings.__dataclass_fields__:
        assert getattr(parts, name) is getattr(ports, name)
    assert parts.open_consumer is ports.make_reader
