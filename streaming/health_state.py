"""The health of the service's components, as its own parts report it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ComponentStatus = Literal["ok", "waiting", "failed"]


@dataclass(frozen=True, slots=True)
class Component:
    """The state of a component: status, a line of text, and since when (seconds of the state's clock)."""

    status: ComponentStatus
    text: str
    since_s: float


class HealthState:
    """The health of the service's components; for any thread.

    Ready: there is a component, and all are `ok`. Alive: none has failed, and the loop has called `progress` within
    `stall_s_max` seconds.

    >>> state = HealthState(stall_s_max=60)
    >>> state.waiting("broker", "connecting to 127.0.0.1:9092")
    >>> state.not_ready()
    ['broker: connecting to 127.0.0.1:9092']
    """

    def __init__(self, stall_s_max: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.stall_s_max = stall_s_max
        self._clock = clock
        self._lock = threading.Lock()
        self._components: dict[str, Component] = {}
        self._progress_s = clock()

    def ok(self, name: str, text: str = "") -> None:
        """The component works."""
        self._set(name, "ok", text)

    def waiting(self, name: str, text: str) -> None:
        """The component is not ready yet; `text`: what it waits for."""
        self._set(name, "waiting", text)

    def failed(self, name: str, text: str) -> None:
        """The component cannot recover: the process should be restarted."""
        self._set(name, "failed", text)

    def forget(self, name: str) -> None:
        """Removes the component."""
        with self._lock:
            self._components.pop(name, None)

    def waits(self, name: str) -> bool:
        """Whether the component is waiting."""
        component = self._components.get(name)
        return component is not None and component.status == "waiting"

    def progress(self) -> None:
        """Notes that the loop has completed a turn."""
        self._progress_s = self._clock()

    def components(self) -> dict[str, Component]:
        """A copy of all components, by name."""
        with self._lock:
            return dict(self._components)

    def not_ready(self) -> list[str]:
        """The components that are not ready, a line each; empty if the service is ready."""
        components = self.components()
        if not components:
            return ["starting"]
        return [f"{name}: {part.text or part.status}" for name, part in components.items() if part.status != "ok"]

    def not_alive(self) -> list[str]:
        """The reasons to restart the process, a line each; empty if the service is alive."""
        with self._lock:
            components, stalled_s = dict(self._components), self._clock() - self._progress_s
        reasons = [f"{name}: {part.text}" for name, part in components.items() if part.status == "failed"]
        if stalled_s > self.stall_s_max:
            reasons.append(f"loop: no progress for {stalled_s:.0f} s, the limit is {self.stall_s_max:.0f} s")
        return reasons

    def since(self, component: Component) -> float:
        """Seconds that a component has had its status."""
        return self._clock() - component.since_s

    def _set(self, name: str, status: ComponentStatus, text: str) -> None:
        now_s = self._clock()
        with self._lock:
            before = self._components.get(name)
            since_s = before.since_s if before is not None and before.status == status else now_s
            self._components[name] = Component(status, text, since_s)
