"""Reads the health and the metrics of supervised workers over HTTP."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Literal

import msgspec

from streaming.health_state import HealthState
from streaming.service.health import OPENMETRICS

TIMEOUT_S = 2.0


class _Component(msgspec.Struct, frozen=True):
    status: Literal["ok", "waiting", "failed"]
    text: str


class _Health(msgspec.Struct, frozen=True):
    """The body of `/healthz`: the reasons to restart, and the components."""

    waiting_for: list[str]
    components: dict[str, _Component]


def ask_health(port: int, name: str, health: HealthState) -> list[str] | None:
    """Copies a worker's health into `health`, as the component `name`.

    Returns the reasons to restart the worker, a line each, empty if it is alive; None if it does not answer. A single
    request is enough: the answer of `/healthz` has the components, and so the readiness.
    """
    body = _ask(port, "/healthz")
    if body is None:
        health.waiting(name, "no answer")
        return None
    try:
        found = msgspec.json.decode(body, type=_Health)
    except msgspec.MsgspecError as error:
        health.waiting(name, f"unreadable answer ({error})")
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
    """Returns a worker's metrics in OpenMetrics, which has exemplars; empty if it does not answer."""
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
