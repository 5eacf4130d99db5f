"""A real Chromium without a window, driven over WebDriver (the W3C's protocol) by its own chromedriver."""

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of element references, from the specification
needs_browser = pytest.mark.skipif(
    shutil.which("chromedriver") is None or not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="needs chromium and chromedriver (Debian: chromium chromium-driver)",
)


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client, self._session = client, f"/session/{session}"

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """The value that the body of a function returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """\\ue007 is Enter."""
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """Of the last element that fits; "" where there is none."""
        return self.run("return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText ?? ''", selector)

    def wait(self, condition: str, timeout_s: float = 20.0) -> Any:
        """Until the expression is true; its value."""
        until = time.monotonic() + timeout_s
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < until, (
                f"never came true: {condition}\n{self.run('return document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def problems(self) -> list[str]:
        """What the console has: errors of scripts, and breaches of the page's policy."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def chrome(self, command: str, **parameters: object) -> Any:
        """A command of Chrome's own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _find(self, selector: str) -> str:
        return self._ask("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def _ask(self, method: str, path: str, body: dict | None = None) -> Any:
        response = self._client.request(method, self._session + path, json=body)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value


@contextmanager
def browser(width: int = 1200, height: int = 800, is_dark: bool = False, is_phone: bool = False) -> Iterator[Browser]:
    """A window of this size (CSS pixels); a phone has a touch screen and two pixels for one."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        chrome: dict[str, Any] = {
            "binary": shutil.which("chromium") or shutil.which("google-chrome"),
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--window-size={width},{height}",
            ],
        }
        if is_phone:
            chrome["mobileEmulation"] = {
                "deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
            }
        capabilities = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            made = client.post("/session", json={"capabilities": {"alwaysMatch": capabilities}}).json()["value"]
            assert "sessionId" in made, made
            window = Browser(client, made["sessionId"])
            if is_dark:
                features = [{"name": "prefers-color-scheme", "value": "dark"}]
                window.chrome("Emulation.setEmulatedMedia", features=features)
            yield window
            client.delete(f"/session/{made['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(120)
