"""A real browser without a window: what it says of a page, and how the page looks in it."""

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, PHONE = (1440, 900), (390, 844)
REQUIRED = "PEFT_DIST_BROWSER"
"""Environment variable: `required` where a test must fail that finds no browser."""
SCREENSHOTS = "PEFT_DIST_SCREENSHOTS"
"""Environment variable: a folder to keep the screenshots in."""
SETTLED_S = 120.0
"""How long a page may take to come to rest, on a loaded machine."""
COUNT_POINTS = """
return [...document.querySelectorAll(".plot")].map((node) => [
  node.dataset.figure,
  (node.data || []).map((trace) => Math.min((trace.x || []).length, (trace.y || []).length)),
  node.querySelectorAll(".scatterlayer .trace path, .barlayer .point path").length,
]);
"""


class Browser:
    """One headless Chromium."""

    def __init__(self, driver: Any) -> None:
        """Take a started one."""
        self._driver = driver

    def open(self, page: Path, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        """Open a file as a screen of this size shows it."""
        width, height = size
        phone = size == PHONE
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1}
        self._driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": phone}
        )
        self._driver.execute_cdp_cmd(
            "Emulation.setTouchEmulationEnabled", {"enabled": phone, "maxTouchPoints": 1}
        )
        self.prefer(dark=dark)
        for kind in ("browser", "performance"):
            self._driver.get_log(kind)  # forgets what there was before
        self._driver.get(page.absolute().as_uri())

    def prefer(self, *, dark: bool) -> None:
        """Let the reader's system be dark or light."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str) -> Any:
        """Return what a script in the page returns."""
        return self._driver.execute_script(script)

    def until(self, script: str, fits: Callable[[Any], bool]) -> Any:
        """Return what a script in the page returns, as soon as it is what is waited for."""
        deadline = time.monotonic() + SETTLED_S
        while not fits(found := self.run(script)):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found

    def points(self) -> dict[str, tuple[list[int], int]]:
        """Return, of each figure, the points of its traces and the shapes that are drawn."""
        return {key: (points, shapes) for key, points, shapes in self.run(COUNT_POINTS)}

    def complaints(self) -> list[str]:
        """Return what the console said."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for since it was opened, its own among them."""
        events = [json.loads(entry["message"])["message"] for entry in
                  self._driver.get_log("performance")]  # fmt: skip
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
            # A browser that has just begun may still load its own first page.
            and not event["params"]["request"]["url"].startswith("chrome://")
        ]

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """Save a picture of the page, and a copy where somebody wants to look at it.

        Args:
            path: Of a `.png`, or a `.webp`, which is smaller.
            height: How much of the page; None for all of it.
        """
        height = height or self.run("return document.documentElement.scrollHeight")
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        found = self._driver.execute_cdp_cmd(
            "Page.captureScreenshot",
            {"captureBeyondViewport": True, "clip": clip, "format": path.suffix[1:]}
            | ({"quality": 80} if path.suffix == ".webp" else {}),
        )
        path.write_bytes(base64.b64decode(found["data"]))
        if folder := os.environ.get(SCREENSHOTS):
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)


@contextmanager
def started(folder: Path, *, page_limit_s: float = SETTLED_S) -> Iterator[Browser]:
    """Start a browser whose profile lies in a folder; skip the test where there is none.

    Args:
        folder: Of the profile.
        page_limit_s: How long a page may take to load.
    """
    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "needs chromium and chromedriver; on Debian: apt install chromium-driver"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    options = Options()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",  # as root it does not start otherwise
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    browser.set_page_load_timeout(page_limit_s)
    browser.set_script_timeout(page_limit_s)
    try:
        yield Browser(browser)
    finally:
        browser.quit()
