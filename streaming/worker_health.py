"""What a supervisor asks its workers over HTTP."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Literal

import msgspec

from streaming.health import OPENMETRICS, HealthState

TIMEOUT_S = 2.0


class _Component(msgspec.Struct, frozen=True):
    status: Literal["ok", "waiting", "failed"]
    text: str


class _Health(msgspec.Struct, frozen=True):
    """The body of `/healthz`: why it should be restarted, and its parts."""

    waiting_for: list[str]
    components: dict[str, _Component]


def ask_health(port: int, name: str, health: HealthState) -> list[str] | None:
    """Take a worker's health over into `health`, as the component `name`; None where it does not answer.

    Returns why it should be started again, a line each, empty where it is alive. One question, for readiness is in the
    answer about liveness as well.
    """
    body = _ask(port, "/healthz")
    if body is None:
        health.waiting(name, "no answer")
        return None
    try:
        found = msgspec.json.decode(body, type=_Health)
    except msgspec.MsgspecError as error:
        health.waiting(name, f"an answer that cannot be read ({error})")
        return None
    waits = [
        f"{part}: {component.text or component.status}"
        for part, component in found.components.items()
        if component.status != "ok"
    ]
    if found.waiting_for:
        health.failed(name, "; ".join(found.waiting_for))
    elif waits or not found.components:
        health.waiting(name, "; ".join(waits) or "starting")
    else:
        texts = [f"{part}: {component.text}" for part, component in found.components.items() if component.text]
        health.ok(name, "; ".join(texts))
    return found.waiting_for


def ask_metrics(port: int | None) -> str:
    """A worker's metrics in OpenMetrics, which has exemplars; empty where it does not answer."""
    body = None if port is None else _ask(port, "/metrics", {"Accept": OPENMETRICS})
    return "" if body is None else body.decode()


def _ask(port: int, path: str, headers: Mapping[str, str] | None = None) -> bytes | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
