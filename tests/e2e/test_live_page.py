"""The live page in a real browser, drawn by a real service on a real broker."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.cluster import SteadyLoad, escalating_bundle, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, new_names
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.ledger import Ledger, ledger_registry
from streaming.health_state import HealthState
from streaming.service.health import HealthServer
from streaming.service.live import live_routes
from tests.browser import CHROMIUM, Browser
from tests.conftest import Broker

RATE = 100.0
PHONE, DESKTOP = (360, 740), (1280, 900)
# four frames, so that there are lines to draw
DRAWN = """document.querySelectorAll('svg path').length >= 5
    && document.querySelector('svg path').getAttribute('d').split('L').length > 4"""
TILES = """[...document.querySelectorAll('.tile')].map((tile) =>
    ['b', 'span', '.kind'].map((part) => tile.querySelector(part)?.innerText))"""
ENERGY_UNITS = ("W", "mJ", "gCO2e")
pytestmark = [pytest.mark.kafka, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.long)],
    ids=["one process", "a supervisor of two"],
)
def url(request: pytest.FixtureRequest, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service under a steady load."""
    directory = tmp_path_factory.mktemp("live")
    data = simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=100, terminals=100, days=10, seed=1)
    bundle = escalating_bundle(directory / "bundle", 0.05, data)
    parts = EmbeddedParts(directory / "parts", bundle, with_triton=False)
    parts.directory.mkdir()
    parts.bootstrap = broker.bootstrap
    settings = {"kafka": new_names(), "carbon": {"region": "DEU"}, "worker": {"processes": request.param}}
    path = parts.write_config("live.toml", settings, partitions=request.param)
    with ServiceProcess(path) as service:
        service.wait_ready()
        load = SteadyLoad(service.config, bundle.schema, data, RATE)
        load.start()
        yield f"http://{service.config.health.host}:{service.config.health.port}/"
        load.stop()
        service.stop()


@pytest.mark.parametrize(
    ("language", "size", "dark"),
    [
        ("ja", PHONE, True),
        # each browser costs fifteen seconds of CPU
        pytest.param("en", PHONE, False, marks=pytest.mark.long),
        pytest.param("en", DESKTOP, True, marks=pytest.mark.long),
    ],
)
def test_a_browser_draws_the_services_figures(
    url: str, tmp_path: Path, language: str, size: tuple[int, int], dark: bool
) -> None:
    with Browser(tmp_path / "profile", *size, dark=dark) as browser:
        browser.open(f"{url}?lang={language}")
        browser.wait_for(DRAWN)
        browser.screenshot(tmp_path / "page.png")
        # a busy machine has seconds in which nothing is decided
        browser.wait_for(f"parseFloat({TILES}[0][0]) > 0")
        tiles = browser.evaluate(TILES)
        text: str = browser.evaluate("document.body.innerText")
        assert tiles[0][0].endswith(" /s")
        # every figure of energy and carbon has its kind, and each unit occurs
        of_energy = [tile for tile in tiles if tile[0].endswith(ENERGY_UNITS)]
        kinds = {"en": {"measured", "modelled"}, "ja": {"実測", "推計"}}[language]
        assert {tile[0].split()[1] for tile in of_energy} == set(ENERGY_UNITS)
        assert all(kind in kinds and tile[0] != "–" for *tile, kind in of_energy)
        assert {"en": "p99 of screened ≤ 5 ms", "ja": "軽量の p99 ≤ 5 ms"}[language] in text
        assert not any(word in text for word in ("NaN", "undefined", "null", "{"))
        assert browser.evaluate("document.documentElement.lang") == language
        # nothing sticks out to the side
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert browser.evaluate("innerWidth") == size[0]
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        # it is alive: a later figure without a step of ours
        first = browser.evaluate("document.getElementById('at').innerText")
        browser.wait_for(f"document.getElementById('at').innerText !== {first!r}")
        assert browser.troubles == []
        assert all(asked.startswith((url, "data:")) for asked in browser.requested)
        assert any("frames?after=" in asked for asked in browser.requested)


def test_probes_do_not_wait_for_watchers(url: str) -> None:
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            urllib.request.urlopen(f"{url}frames", timeout=10).close()  # noqa: S310 - ours

    unwatched_s = probe_s(url)
    watching = [threading.Thread(target=watch) for _ in range(4)]
    for thread in watching:
        thread.start()
    try:
        watched_s = probe_s(url)
    finally:
        stop.set()
        for thread in watching:
            thread.join()
    # a probe that waits for a watcher waits for the next frame, a second
    assert watched_s < 10 * unwatched_s + 0.2


def probe_s(url: str) -> float:
    """Seconds that `/healthz` takes to answer: the quicker quarter of 40 times, since other work delays some."""
    took_s = []
    for _ in range(40):
        began_s = time.monotonic()
        with urllib.request.urlopen(f"{url}healthz", timeout=10) as answer:  # noqa: S310 - ours
            assert answer.status == 200
        took_s.append(time.monotonic() - began_s)
    return float(np.quantile(took_s, 0.25))


def test_a_service_that_is_gone_is_reported_and_its_figures_are_not_shown_as_now(url: str, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile", *PHONE) as browser:
        browser.open(f"{url}?lang=en")
        browser.wait_for(DRAWN)
        network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.call("Network.emulateNetworkConditions", offline=True, **network)
        browser.wait_for("document.getElementById('status').innerText.includes('does not answer')")
        assert browser.evaluate("document.getElementById('figures').className") == "stale"
        browser.call("Network.emulateNetworkConditions", offline=False, **network)
        browser.wait_for("document.getElementById('status').innerText === 'ready'")
        assert browser.evaluate("document.getElementById('figures').className") == ""


@pytest.mark.long
def test_a_service_that_began_anew_is_drawn_from_its_beginning(tmp_path: Path) -> None:
    def serve(port: int) -> HealthServer:
        registry, state = ledger_registry(Ledger()), HealthState(60.0)
        state.ok("broker")
        return HealthServer(state, registry, "127.0.0.1", port, live_routes(registry, state))

    points = "(document.querySelector('svg path')?.getAttribute('d').split('L').length ?? 0)"
    first = serve(0)
    with Browser(tmp_path / "profile", *PHONE) as browser:
        browser.open(f"http://127.0.0.1:{first.port}/")
        browser.wait_for(f"{points} > 4")
        first.close()
        with serve(first.port):
            # its numbers begin at 1 again: a page that waits for higher ones would stand still here
            browser.wait_for(f"{points} > 0 && {points} < 4")
            browser.wait_for(f"{points} > 3")
            assert browser.evaluate("document.getElementById('status').innerText") == "ready"
