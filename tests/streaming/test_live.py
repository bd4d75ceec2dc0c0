"""The live page: self-contained, read-only, in two languages; its frames bounded and sampled only when asked."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cascade.ledger import Ledger, ledger_registry
from streaming.health import HealthServer, HealthState
from streaming.live import live_routes
from streaming.live.feed import FRAMES_MAX, GAP_S_MAX, INTERVAL_S, LiveFeed
from streaming.live.page import LANGUAGES, live_page, page_policy


class Watched:
    """A ledger, its feed, and a clock."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.ledger = Ledger()
        self.state = HealthState(60.0)
        self.state.ok("broker", "3 nodes")
        self.scrapes = 0
        registry = ledger_registry(self.ledger)
        collect = registry.collect

        def counted() -> Any:
            self.scrapes += 1
            return collect()

        registry.collect = counted  # type: ignore[method-assign]
        self.feed = LiveFeed(registry, self.state, lambda: self.now_s)

    def work(self, seconds: float, decisions: int = 100, escalated: int = 1) -> None:
        self.now_s += seconds
        self.ledger.record_decisions("screened", np.full(decisions - escalated, 2e-3))
        self.ledger.record_decisions("escalated", np.full(escalated, 9e-3))

    def ask(self, after: int = 0) -> Any:
        return json.loads(self.feed.since(after))


def test_a_frame_is_what_happened_since_the_last_one() -> None:
    one = Watched()
    one.work(0.0)
    assert one.ask()["frames"] == []
    one.work(2.0, decisions=400, escalated=8)
    (frame,) = one.ask()["frames"]
    assert frame["per_second"] == pytest.approx(200.0)
    assert frame["escalated_share"] == pytest.approx(0.02)
    assert frame["limits_ms"] == {"p99 of screened": 5.0, "p99 of escalated": 20.0}
    assert frame["carbon_g_per_million"] == {}
    screened = next(path for path in frame["paths"] if path["path"] == "screened")
    assert 1.0 < screened["p99_ms"] < 2.6
    # nothing was decided: no figure, which is not 0
    assert next(path for path in frame["paths"] if path["path"] == "degraded")["p99_ms"] is None
    assert one.ask(after=frame["number"])["frames"] == []


def test_viewers_share_samples_and_nothing_is_sampled_unasked() -> None:
    one = Watched()
    one.ask()
    for _ in range(50):
        one.ask()
    assert one.scrapes == 1
    one.work(INTERVAL_S)
    one.ask()
    one.ask()
    assert one.scrapes == 2
    one.work(3_600.0)
    # the first look after a pause tells no figures of an hour that nobody has watched
    assert len(one.ask()["frames"]) == 1
    one.work(GAP_S_MAX)
    assert len(one.ask()["frames"]) == 2


def test_frames_are_bounded_and_numbered() -> None:
    one = Watched()
    for _ in range(FRAMES_MAX + 40):
        one.work(INTERVAL_S)
        one.ask(after=10**9)
    frames = one.ask()["frames"]
    assert len(frames) == FRAMES_MAX
    numbers = [frame["number"] for frame in frames]
    assert numbers == list(range(numbers[0], numbers[0] + FRAMES_MAX))


@pytest.fixture
def server() -> Iterator[HealthServer]:
    registry, state = ledger_registry(Ledger()), HealthState(60.0)
    state.waiting("broker", "<b>not there</b>")
    with HealthServer(state, registry, "127.0.0.1", 0, live_routes(registry, state)) as running:
        yield running


def _ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_page_may_run_nothing_but_its_own_script(server: HealthServer) -> None:
    status, headers, body = _ask(server, "/")
    assert (status, headers["X-Content-Type-Options"], headers["Cache-Control"]) == (200, "nosniff", "no-store")
    page = body.decode()
    policy = headers["Content-Security-Policy"]
    assert policy == page_policy()
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.findall(r'(?:src|href)="(?!\?lang=|data:,)', page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "[[" not in page
    assert "{{" not in page


def test_the_language_is_asked_for_or_the_browsers(server: HealthServer) -> None:
    def language(path: str, accept: str = "") -> str:
        return re.findall(r"<html lang=\"(\w+)\"", _ask(server, path, Accept_Language=accept)[2].decode())[0]

    assert language("/") == "en"
    assert language("/?lang=ja") == "ja"
    assert language("/", "de, ja;q=0.8, en;q=0.5") == "ja"
    assert language("/?lang=en", "ja") == "en"
    assert language("/?lang=%00xx", "ja;q=nonsense") == "en"
    texts = [set(json.loads(_words(live_page(f"lang={one}", "").decode()))) for one in LANGUAGES]
    assert texts[0] == texts[1]


def _words(page: str) -> str:
    import html

    (found,) = re.findall(r'data-words="([^"]*)"', page)
    return html.unescape(found)


def test_it_is_read_only_and_refuses_nonsense(server: HealthServer) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert _ask(server, "/", method)[0] == 501
    assert _ask(server, "/frames?after=-1")[0] == 400
    assert _ask(server, "/frames?after=1e9")[0] == 400
    assert _ask(server, "/frames?after=" + "9" * 400)[0] == 400
    assert _ask(server, "/../etc/passwd")[0] == 404
    status, headers, body = _ask(server, "/frames")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    answer = json.loads(body)
    assert answer["ready"] is False
    assert answer["components"] == [{"name": "broker", "status": "waiting", "text": "<b>not there</b>"}]


def test_without_metrics_there_are_no_frames_and_no_error() -> None:
    feed = LiveFeed(CollectorRegistry(), HealthState(60.0))
    assert json.loads(feed.since(0))["frames"] == []
