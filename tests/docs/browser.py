"""Open pages in a headless Chromium: what they say on the console, what keys do, how they look.

Chromium is driven over its DevTools protocol, through a pipe: nothing has to be installed but Chromium itself::

    with Browser.start() as browser:
        page = browser.open(Path("page.html"))
        page.press("Tab", "ArrowRight")
        page.screenshot(Path("page.png"))
        assert page.errors == []

As a script it opens files or addresses, and prints what they complain of: ``python -m tests.docs.browser FILE ...``
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: How DevTools names the keys that a test presses, and the number that Windows gave them.
KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Space": 32,
    "PageUp": 33,
    "PageDown": 34,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


def chromium() -> str | None:
    """Return where Chromium is, from ``KVPOLICY_CHROMIUM`` or the path; None where there is none."""
    return os.environ.get("KVPOLICY_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)


class Browser:
    """Be a running Chromium without a window."""

    def __init__(self, program: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        # Chromium reads its orders from the file descriptor 3 and answers on 4.
        command = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={self._folder.name}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", str(their_in), str(their_out), program, *options],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._numbers, self._rest = itertools.count(1), b""
        self.pages: dict[str, Page] = {}

    @classmethod
    def start(cls) -> Browser:
        """Start one.

        Raises:
            FileNotFoundError: there is no Chromium.
        """
        program = chromium()
        if program is None:
            raise FileNotFoundError(f"no Chromium: none of {', '.join(CHROMIUM)}; apt-get install chromium")
        return cls(program)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder.name, ignore_errors=True)  # processes that Chromium started may still write
        self._folder._finalizer.detach()  # type: ignore[attr-defined]

    def open(self, where: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Open a file or an address, and wait until it is loaded.

        Args:
            where: a file, or a URL.
            width: of the window, in CSS pixels.
            height: of the window.
            dark: prefer a dark colour scheme.
        """
        url = Path(where).resolve().as_uri() if isinstance(where, Path) else where
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.prefer(dark=dark)
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def call(self, method: str, session: str | None = None, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """Return what DevTools answers."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            answer = self._read(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found
            if answer.get("sessionId") in self.pages:
                self.pages[answer["sessionId"]].hear(answer["method"], answer["params"])

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found


class Page:
    """Be one page.

    Attributes:
        errors: what the console, and uncaught exceptions, complained of.
        requests: the addresses that were asked for, the page's own among them.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what DevTools answers for this page."""
        return self.browser.call(method, self.session, **parameters)

    def hear(self, method: str, told: dict[str, Any]) -> None:
        """Take an event."""
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Give the window another size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def prefer(self, *, dark: bool) -> None:
        """Prefer a dark or a light colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, script: str) -> Any:
        """Return what an expression is on the page, a promise's result where it is one."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def wait_for(self, script: str, timeout: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + timeout
        while not self.value(f"Boolean({script})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{script} did not become true; the page complained of {self.errors}")
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys one after another: ``Tab``, ``ArrowRight``, ... or single letters."""
        for key in keys:
            text = {"Space": " ", "Enter": "\r"}.get(key, key if len(key) == 1 else "")
            named: dict[str, Any] = {"key": " " if key == "Space" else key, "code": key}
            named |= {"windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            self.call("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def focus(self, selector: str) -> None:
        """Give an element the focus of the keyboard."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")

    def point_at(self, x: float, y: float) -> None:
        """Move the pointer to a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, *, whole: bool = False) -> Path:
        """Write what is seen, or the whole page, as PNG.

        Args:
            file: to write.
            whole: all of the page, and not the window alone.
        """
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


def main(places: list[str]) -> int:
    """Open each place, and print what it complains of; return how many do."""
    complained = 0
    with Browser.start() as browser:
        for place in places:
            for dark in (False, True):
                page = browser.open(Path(place) if Path(place).exists() else place, dark=dark)
                time.sleep(0.5)
                page.value("0")  # what was said meanwhile
                print(f"{place} ({'dark' if dark else 'light'}): {page.errors or 'nothing to complain of'}")
                complained += bool(page.errors)
    return complained


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
