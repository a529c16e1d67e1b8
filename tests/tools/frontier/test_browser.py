"""The report in a headless Chromium: hover, keyboard, escaping, width.

The browser is driven through its DevTools protocol on a pipe: no port, no network, no library.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.frontier.command import Options, run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


# Chromium reads commands from descriptor 3 and answers on 4.
TO_THREE_AND_FOUR = """
import os, sys
os.dup2(int(sys.argv[1]), 100), os.dup2(int(sys.argv[2]), 101)
os.dup2(100, 3), os.dup2(101, 4)
os.closerange(5, 200)
os.execv(sys.argv[3], sys.argv[3:])
"""
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
]


class Page:
    """One page in a browser of its own; use as a context manager."""

    def __init__(self, binary: str, profile: Path, timeout: float = 60.0):
        self._timeout, self._number, self._rest = timeout, 0, b""
        self.events: list[dict[str, Any]] = []
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        self._browser = subprocess.Popen(
            [
                *(sys.executable, "-c", TO_THREE_AND_FOUR, str(to_read), str(to_write)),
                *(binary, *FLAGS, f"--user-data-dir={profile}"),
            ],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._session = ""

    def __enter__(self) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._session = ""
            self.send("Browser.close")
            self._browser.wait(timeout=10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._browser.kill()
            self._browser.wait()
        finally:
            os.close(self._read)
            os.close(self._write)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a protocol command; events that come before it are kept."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + self._timeout
        while b"\0" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("Chromium did not answer")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise OSError("Chromium ended")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path, *, width: int, height: int = 800, dark: bool = False) -> None:
        """Load a file in a viewport of `width` × `height` CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + self._timeout
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > until:
                raise TimeoutError("the page did not load")
            self.events.append(self._receive())

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place in the viewport."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "ArrowRight": 39, "Escape": 27, "End": 35}[key]
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )


@pytest.fixture(scope="module")
def report(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the sweep, one of whose runs has an evil name."""
    output = tmp_path_factory.mktemp("report")
    run(Options(output=str(output), runs=str(sweep), bootstrap=10))
    return output / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of a browser with an empty profile."""
    with Page(str(CHROMIUM), tmp_path_factory.mktemp("profile")) as page:
        yield page


def place(page: Page, run: str) -> tuple[float, float]:
    """Where the final mark of `run` is in the viewport, scrolled to."""
    found = page.value(
        f"var run = {json.dumps(run)};"
        """
        var mark = [...document.querySelectorAll(".chart.wide .mark.final")]
            .find((m) => m.getAttribute("aria-label").includes(run));
        mark.scrollIntoView({block: "center"});
        var at = mark.getBoundingClientRect();
        [at.x + at.width / 2, at.y + at.height / 2];
        """
    )
    return found[0], found[1]


def test_hover_shows_the_run(page, report):
    page.open(report, width=1280)
    assert page.value('document.getElementById("tip").hidden') is True
    page.move(*place(page, "entp-nano"))
    text = page.value('document.getElementById("tip").innerText')
    for fact in ("entp · entp-nano", "step 400 (final)", "parameters 240,000", "tokens 1,638,400"):
        assert fact in text
    assert "FLOPs 2.75" in text
    assert "held-out loss" in text
    page.move(2, 2)
    assert page.value('document.getElementById("tip").hidden') is True


def test_keys_walk_through_the_points(page, report):
    page.open(report, width=1280)
    page.press("Tab")
    assert page.value('document.activeElement.classList.contains("mark")') is True
    first = page.value('document.getElementById("tip").textContent')
    page.press("ArrowRight")
    second = page.value('document.getElementById("tip").textContent')
    assert first != second
    assert second == page.value('document.activeElement.getAttribute("aria-label")')
    page.press("End")
    assert "entp-micro" in page.value('document.getElementById("tip").textContent')
    page.press("Escape")
    assert page.value('document.getElementById("tip").hidden') is True


def test_text_of_runs_is_shown_and_never_run(page, report, evil):
    page.open(report, width=1280)
    assert page.value("document.title") == "isoflop: compute frontier"
    assert page.value("document.images.length") == 0
    assert page.value("document.scripts.length") == 2
    shown = evil.replace("\u202e", "\ufffd")
    assert page.value("document.body.textContent").count(shown) >= 3
    page.move(*place(page, shown))
    assert shown in page.value('document.getElementById("tip").textContent')
    assert page.value("document.images.length") == 0


def test_a_script_that_slips_through_is_stopped_by_the_policy(page, report, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(
        report.read_text(encoding="utf-8").replace(
            "<main>", '<main><script>document.title="owned"</script>'
        ),
        encoding="utf-8",
    )
    page.open(broken, width=1280)
    assert page.value("document.title") == "isoflop: compute frontier"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(page, report, width, dark):
    page.open(report, width=width, dark=dark)
    assert page.value("document.documentElement.scrollWidth") == width
    narrow = page.value('getComputedStyle(document.querySelector(".chart.narrow")).display')
    assert narrow == ("block" if width <= 640 else "none")
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


def test_nothing_is_asked_of_the_network_and_nothing_is_complained_of(page, report):
    page.open(report, width=1280)
    page.value("document.title")
    asked = [e for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert [e["params"]["request"]["url"] for e in asked] == [report.resolve().as_uri()]
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown")
    assert [e for e in page.events if e.get("method") in complaints] == []
