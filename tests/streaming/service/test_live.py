"""The live page: self-contained, read-only, in two languages; its frames bounded and sampled only when asked."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cascade.ledger import Ledger, ledger_registry
from streaming.health_state import HealthState
from streaming.service.health import ALWAYS_SENT, HealthServer
from streaming.service.live import live_routes
from streaming.service.live.feed import FRAMES_MAX, GAP_S_MAX, INTERVAL_S, MARK_S, MARKS_MAX, LiveFeed
from streaming.service.live.page import LANGUAGES, live_page, page_policy
from streaming.service.scrape import Frame, Scrape
from streaming.service.worker_metrics import workers_registry
from tests.streaming.service.test_health import ask
from tests.streaming.service.test_top import Meter


class Watched:
    """A ledger, its feed, and a clock."""

    def __init__(self, *meters: Meter) -> None:
        self.now_s = 1_000.0
        self.ledger = Ledger(meters=list(meters))
        self.state = HealthState(60.0)
        self.state.ok("broker", "3 nodes")
        self.scrapes = 0
        self.registry = ledger_registry(self.ledger)
        collect = self.registry.collect

        def counted() -> Any:
            self.scrapes += 1
            return collect()

        self.registry.collect = counted  # type: ignore[method-assign]
        self.feed = LiveFeed(self.registry, self.state, lambda: self.now_s)

    def work(self, seconds: float, decisions: int = 100, escalated: int = 1) -> None:
        self.now_s += seconds
        self.ledger.record_decisions("screened", np.full(decisions - escalated, 2e-3))
        self.ledger.record_decisions("escalated", np.full(escalated, 9e-3))

    def ask(self, after: int = 0) -> Any:
        return json.loads(self.feed.since(after))


def test_a_frame_is_what_happened_since_the_last_one() -> None:
    watched = Watched()
    watched.work(0.0)
    assert watched.ask()["frames"] == []
    watched.work(2.0, decisions=400, escalated=8)
    (frame,) = watched.ask()["frames"]
    assert frame["per_second"] == pytest.approx(200.0)
    assert frame["escalated_share"] == pytest.approx(0.02)
    assert frame["limits_ms"] == {"p99 of screened": 5.0, "p99 of escalated": 20.0}
    assert frame["budgets"]["degraded share"] == pytest.approx(0.001)
    screened = next(path for path in frame["paths"] if path["path"] == "screened")
    assert 1.0 < screened["p99_ms"] < 2.6
    assert watched.ask(after=frame["number"])["frames"] == []


def test_what_is_not_known_is_null_and_never_0() -> None:
    watched = Watched()
    watched.ask()
    watched.now_s += INTERVAL_S
    (frame,) = watched.ask()["frames"]
    assert frame["per_second"] == 0.0
    # nothing was decided, no lag was looked at, and there is neither a meter nor a region
    assert {path["p99_ms"] for path in frame["paths"]} == {None}
    assert (frame["escalated_share"], frame["degraded_share"], frame["lag"]) == (None, None, None)
    assert set(frame["burn"].values()) == {None}
    assert (frame["watts"], frame["mj_per_decision"], frame["carbon_g_per_million"]) == ({}, {}, {})


def test_a_meter_that_is_lost_or_back_does_not_count() -> None:
    board, gpu = Meter("board"), Meter("gpu0")
    watched = Watched(board, gpu)

    def watts(board_j: float, gpu_j: float) -> Any:
        board.energy_j, gpu.energy_j = board_j, gpu_j
        watched.work(2.0)
        frames = watched.ask()["frames"]
        return (frames[-1]["watts"], frames[-1]["lost_meters"]) if frames else None

    watts(100.0, 100.0)
    assert watts(120.0, 140.0) == ({"measured": pytest.approx(30.0)}, [])
    # the meter that is left counts, not the fall of the sum as 0 W
    assert watts(140.0, -1.0) == ({"measured": pytest.approx(10.0)}, ["gpu0"])
    # nor all that the other counted while it was away
    assert watts(160.0, 900.0) == ({"measured": pytest.approx(10.0)}, [])
    assert watts(180.0, 920.0) == ({"measured": pytest.approx(20.0)}, [])


def test_the_window_is_all_that_was_watched_up_to_five_minutes() -> None:
    watched = Watched()
    assert watched.ask()["window"] is None
    for _ in range(12):
        watched.work(5 * INTERVAL_S, decisions=500)
        watched.ask()
    window = watched.ask()["window"]
    assert (window["seconds"], window["per_second"]) == (pytest.approx(120.0), pytest.approx(50.0))
    for _ in range(80):
        watched.work(5 * INTERVAL_S, decisions=250)
        watched.ask()
    window = watched.ask()["window"]
    assert 270.0 <= window["seconds"] <= MARK_S * MARKS_MAX
    assert window["per_second"] == pytest.approx(25.0)


def test_viewers_share_samples_and_nothing_is_sampled_unasked() -> None:
    watched = Watched()
    watched.ask()
    for _ in range(50):
        watched.ask()
    assert watched.scrapes == 1
    watched.work(INTERVAL_S)
    watched.ask()
    watched.ask()
    assert watched.scrapes == 2
    watched.work(3_600.0)
    # the first request after a pause has no figures of an hour that nobody has watched
    answer = watched.ask()
    assert (len(answer["frames"]), answer["window"]) == (1, None)
    watched.work(GAP_S_MAX)
    assert len(watched.ask()["frames"]) == 2


def test_a_restarted_worker_makes_no_frame() -> None:
    old, new = Ledger(), Ledger()
    new.started = old.started.replace(year=old.started.year + 1)
    old.record_decisions("screened", np.full(1_000, 2e-3))
    running, now_s = {"0": old, "1": old}, [1_000.0]
    registry = workers_registry(
        lambda: {name: list(ledger_registry(ledger).collect()) for name, ledger in running.items()}
    )
    feed = LiveFeed(registry, HealthState(60.0), lambda: now_s[0])

    def frames_after(seconds: float) -> int:
        now_s[0] += seconds
        return len(json.loads(feed.since(0))["frames"])

    assert [frames_after(2.0) for _ in range(3)] == [0, 1, 2]
    running["1"] = new
    # its counters are back at 0: as a difference that would be decisions that were never made, or none at all
    assert [frames_after(2.0) for _ in range(2)] == [2, 3]


def test_frames_are_bounded_and_numbered() -> None:
    watched = Watched()
    for _ in range(FRAMES_MAX + 40):
        watched.work(INTERVAL_S)
        watched.ask(after=10**9)
    answer = watched.ask()
    numbers = [frame["number"] for frame in answer["frames"]]
    assert numbers == list(range(numbers[0], numbers[0] + FRAMES_MAX))
    # by this a page that has more than there is detects a restart of the service
    assert answer["newest"] == numbers[-1]
    assert len(watched.feed._marks) == MARKS_MAX


def test_the_registry_read_is_the_same_as_its_text() -> None:
    watched = Watched(Meter("board"))
    watched.work(0.0)
    of_one, of_workers = watched.registry, workers_registry(lambda: {"0": ledger_registry(watched.ledger).collect()})
    for registry in (of_one, of_workers):
        read, text = Scrape.read(registry, 1e10), Scrape.of(generate_latest(registry).decode(), 1e10)
        assert repr(Frame.between(None, read)) == repr(Frame.between(None, text))


@pytest.fixture
def server() -> Iterator[HealthServer]:
    registry, state = ledger_registry(Ledger()), HealthState(60.0)
    state.waiting("broker", "<b>not there</b>")
    with HealthServer(state, registry, "127.0.0.1", 0, live_routes(registry, state)) as running:
        yield running


def test_the_page_may_run_nothing_but_its_own_script(server: HealthServer) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy == page_policy()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
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
        return re.findall(r"<html lang=\"(\w+)\"", ask(server, path, Accept_Language=accept)[2])[0]

    assert language("/") == "en"
    assert language("/?lang=ja") == "ja"
    assert language("/", "de, ja;q=0.8, en;q=0.5") == "ja"
    assert language("/?lang=en", "ja") == "en"
    assert language("/?lang=%00xx", "ja;q=nonsense") == "en"


def _words(page: str) -> Any:
    (found,) = re.findall(r'data-words="([^"]*)"', page)
    return json.loads(html.unescape(found))


def test_every_word_is_there_in_both_languages_with_the_same_blanks() -> None:
    texts = [_words(live_page(f"lang={language}", "").decode()) for language in LANGUAGES]
    blanks = [{name: sorted(re.findall(r"\{\w+\}", text)) for name, text in words.items()} for words in texts]
    assert blanks[0] == blanks[1]
    asked = re.findall(r'translate\("(\w+)"', live_page("", "").decode())
    assert set(asked) <= set(texts[0])


def test_frames_are_json_and_nonsense_is_refused(server: HealthServer) -> None:
    assert ask(server, "/frames?after=-1")[0] == 400
    assert ask(server, "/frames?after=1e9")[0] == 400
    assert ask(server, "/frames?after=" + "9" * 400)[0] == 400
    status, headers, body = ask(server, "/frames")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    answer = json.loads(body)
    assert answer["ready"] is False
    assert answer["components"] == [{"name": "broker", "status": "waiting", "text": "<b>not there</b>"}]


@pytest.mark.parametrize("path", ["/", "/frames", "/frames?after=x", "/metrics", "/healthz", "/nothing"])
def test_no_answer_is_cached_or_sniffed(server: HealthServer, path: str) -> None:
    headers = ask(server, path)[1]
    assert {name: headers.get(name) for name in ALWAYS_SENT} == ALWAYS_SENT
    assert (ALWAYS_SENT["Cache-Control"], ALWAYS_SENT["X-Content-Type-Options"]) == ("no-store", "nosniff")


def test_a_failed_component_is_listed_as_failing() -> None:
    watched = Watched()
    assert watched.ask()["failing"] == []
    watched.state.failed("loop", "stuck")
    assert watched.ask()["failing"] == ["loop: stuck"]


def test_without_metrics_there_are_no_frames_and_no_error() -> None:
    feed = LiveFeed(CollectorRegistry(), HealthState(60.0))
    assert json.loads(feed.since(0))["frames"] == []


def test_text_stands_out_from_its_ground_in_both_colour_schemes() -> None:
    style = re.findall(r"<style>(.*?)</style>", live_page("", "").decode(), re.S)[0]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    on_cards = [(ink, ground) for ink in ("ink", "muted", "good", "bad", "one") for ground in ("ground", "card")]
    kinds = [("measured-ink", "measured"), ("modelled-ink", "modelled")]
    for colours in (light, light | dark):
        for ink, ground in on_cards + kinds:
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        # lines of plots: WCAG 2.2, 1.4.11
        assert _contrast(colours["two"], colours["card"]) >= 3.0


def _contrast(colour: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""
    high, low = sorted((_luminance(colour), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of #rrggbb."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
