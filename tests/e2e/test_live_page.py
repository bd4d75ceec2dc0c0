"""The live page in a real browser, drawn by a real service between a real broker and a real Triton."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.cluster import escalating_bundle, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, play_file
from cascade.bundle import load_bundle
from cascade.config import load_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHIPPED = Path(__file__).parents[2] / "cascade" / "bundles" / "simulator"
RATE = 300.0
pytestmark = [
    pytest.mark.kafka, pytest.mark.triton, pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]  # fmt: skip


@pytest.fixture(scope="module")
def url(kafka_parts: Path, triton_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service under load, which somebody has watched for some frames."""
    directory = tmp_path_factory.mktemp("live")
    data = simulated(load_bundle(SHIPPED).schema, 500, 400, 20, 1)
    bundle = escalating_bundle(directory / "bundle", 0.05, data)
    with EmbeddedParts(directory / "parts", bundle) as parts:
        config = parts.write_config("live.toml", {"carbon": {"region": "DEU"}})
        with ServiceProcess(config) as service:
            service.wait_ready()
            rows = slice(0, min(data.batch.rows, int(RATE * 40)))
            load = threading.Thread(
                target=play_file, args=(load_config(config), data, rows, RATE, lambda _: None), daemon=True
            )
            load.start()
            health = load_config(config).health
            address = f"http://{health.host}:{health.port}/"
            for _ in range(5):
                urllib.request.urlopen(f"{address}frames", timeout=10).close()  # noqa: S310 - ours
                time.sleep(2.1)
            yield address
            load.join(timeout=90.0)
            service.stop()


def _browser(profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={profile}", "--virtual-time-budget=3000", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_browser_draws_the_services_figures(url: str, tmp_path: Path, language: str) -> None:
    drawn = _browser(tmp_path / "profile", "--window-size=500,900", "--dump-dom", f"{url}?lang={language}")
    page = drawn.stdout
    # a refused script, style or request, and any error of the script, would be told here
    assert "CONSOLE" not in drawn.stderr
    assert f'<html lang="{language}"' in page
    tiles = re.findall(r'<div class="tile"><b>([^<]*)</b><span>([^<]*)</span>(?: <span class="kind (\w+)">)?', page)
    assert len(tiles) >= 6
    rate = float(tiles[0][0].removesuffix("/s").replace(",", ""))
    assert RATE / 3 < rate < RATE * 3
    # every figure of energy and carbon says its kind; there is no counter on these machines, or there is one
    told = [kind for value, _, kind in tiles if value.endswith((" mJ", " W", " g"))]
    assert len(told) >= 3
    assert set(told) <= {"measured", "modelled"}
    assert len(re.findall(r"<path d=\"M[\d.]+ [\d.]+L", page)) >= 3
    assert {"en": "screened", "ja": "軽量"}[language] in page
    assert {"en": "modelled", "ja": "推計"}[language] in page
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_nothing_sticks_out_of_a_phones_screen(url: str, tmp_path: Path, language: str) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "phone.png"
    _browser(tmp_path / "profile", "--window-size=500,1800", f"--screenshot={shot}", f"{url}?lang={language}")
    pixels = np.asarray(imread(str(shot)))
    # the narrowest window of the browser; the style's own margin is 12 px on either side
    assert pixels.shape[1] == 500
    assert (pixels[:, -8:] == pixels[0, -1]).all()
    assert not (pixels[:, :-8] == pixels[0, -1]).all()
