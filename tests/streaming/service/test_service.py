"""The sessions of the service's worker, with the broker's part left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cascade.bundle import SHIPPED_BUNDLE
from cascade.config import BundleSettings, Config, DeepSettings
from streaming.service import serve as service
from streaming.service.waiting import Stopping


class FakeWorker:
    def __init__(self) -> None:
        self.positions = {("transactions", 0): 7}
        self.stopped, self.lost = False, ""

    def stop(self) -> None:
        self.stopped = True

    def lose(self, reason: str) -> None:
        self.lost = reason


def test_signal_and_lag_watch_reach_the_present_worker_and_no_former_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping, watch, ended = Stopping(), dict[str, Any](), list[FakeWorker]()

    @contextmanager
    def signals() -> Iterator[Stopping]:
        yield stopping

    def watched(**parts: Any) -> SimpleNamespace:
        watch.update(parts)
        return SimpleNamespace(lags=dict, start=lambda: None, close=lambda: None)

    def run(make: Callable[[ExitStack], Any]) -> None:
        for _ in range(3):
            with ExitStack() as session:
                worker = make(session)
                assert watch["positions"]() == worker.positions
                watch["lost"](f"session {len(ended)}")
                if len(ended) == 2:
                    stopping.set()
            ended.append(worker)
            assert watch["positions"]() is None
            watch["lost"]("no session")

    for name in ("compile_kernels", "await_broker", "await_model", "await_topics", "_settle_interpreter", "_ports"):
        monkeypatch.setattr(service, name, lambda *_: None)
    for name, fake in (
        ("stop_signals", signals), ("LagWatch", watched),
        ("Sessions", lambda make, *_: SimpleNamespace(run=lambda pause: run(make))),
        ("open_worker", lambda *_: FakeWorker()),
    ):  # fmt: skip
        monkeypatch.setattr(service, name, fake)
    service.serve(Config(bundle=BundleSettings(path=str(SHIPPED_BUNDLE)), deep=DeepSettings(backend="onnxruntime")))
    assert [worker.lost for worker in ended] == ["session 0", "session 1", "session 2"]
    assert [worker.stopped for worker in ended] == [False, False, True]
