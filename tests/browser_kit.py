# SPDX-License-Identifier: Apache-2.0
"""A real browser for tests of pages: Chromium, driven by the W3C WebDriver protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest


class Browser:
    """Chromium by the W3C WebDriver protocol, which is a few lines of JSON over HTTP."""

    def __init__(self, port: int, profile: FilePath) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
        flags += ["disable-background-networking", "disable-component-update", f"user-data-dir={profile}"]
        options = {"args": [f"--{flag}" for flag in flags]}
        made = self._call("POST", "", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._base += f"/{made['sessionId']}"

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = json.dumps(body if body is not None else {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: FilePath) -> None:
        self._call("POST", "/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def click(self, selector: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._call("POST", f"/element/{element}/click")

    def close(self) -> None:
        self._call("DELETE", "")

    def devtools(self, command: str, **parameters: object) -> Any:
        """A command of the browser's own protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def window(self, width: int, height: int) -> None:
        """As large as that, like a phone."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, media: str = "", **features: str) -> None:
        """On paper, or in the dark."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=named)

    def type(self, selector: str, text: str) -> None:
        """Type into a field, as a user does."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._call("POST", f"/element/{element}/clear")
        self._call("POST", f"/element/{element}/value", {"text": text})

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def printed(self) -> bytes:
        """The page on paper, as PDF."""
        return base64.b64decode(self._call("POST", "/print"))


def started(folder: FilePath) -> Iterator[Browser]:
    """A browser with a fresh profile in ``folder``, ended afterwards. Without one the test is skipped."""
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("needs a browser (Debian: apt-get install chromium chromium-driver)")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = next(
            int(m[1]) for line in process.stdout if (m := re.search(r"started successfully on port (\d+)", line))
        )
        try:
            found = Browser(port, folder / "profile")
            yield found
            found.close()
        finally:
            process.terminate()
