"""Headless Chromium by its DevTools protocol: JSON messages over two pipes, each ended by a zero byte."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ANSWER_S_MAX = 60.0
# the protocol's pipes are file descriptors 3 and 4; below ten a shell's redirections would tread on one another
FIRST_FD = 10


class Browser:
    """One page, as wide as asked, in the colours asked for; a context manager.

    `troubles`: messages of the console and refused requests, a line each. `requested`: the URLs that were asked for.
    """

    def __init__(self, profile: Path, width_px: int, height_px: int, dark: bool = False) -> None:
        self.troubles: list[str] = []
        self.requested: list[str] = []
        self._session, self._number, self._read = "", 0, b""
        (theirs_in, ours_out), (ours_in, theirs_out) = _pipe(), _pipe()
        self._in, self._out = ours_in, ours_out
        command = [
            "bash",
            "-c",
            f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}',
            "chromium",
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        with (profile.parent / f"{profile.name}.log").open("wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log)
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=2 if width_px < 600 else 1,
            mobile=width_px < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go there; the page may not have loaded yet."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 120.0) -> None:
        """Until it is true; fails where it does not become so."""
        until_s = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < until_s, (
                f"{expression}; {self.troubles}; {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.2)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG, however long."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; events in between are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]  # type: ignore[no-any-return]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.troubles.append(str(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.troubles.append(f"{event['type']}: {event['args']}")
        elif method == "Log.entryAdded":
            self.troubles.append(f"{event['entry']['level']}: {event['entry']['text']}")

    def _next(self) -> dict[str, Any]:
        until_s = time.monotonic() + ANSWER_S_MAX
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(until_s - time.monotonic(), 0.0))
            assert ready, "the browser does not answer"
            more = os.read(self._in, 1 << 16)
            assert more, "the browser has gone"
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)


def _pipe() -> tuple[int, int]:
    """Both ends, at high numbers, and closed in children without a use for them."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FD) for end in low]
    for end in low:
        os.close(end)
    return high[0], high[1]
