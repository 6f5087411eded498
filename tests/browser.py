"""A headless Chromium, at any width and in either colour scheme, that keeps what its console says."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextmanager
def chromium(profile: Path, width: int = 1200, height: int = 900, scheme: str = "light") -> Iterator[Any]:
    """Debian's Chromium with a fresh profile; skips the test where it or selenium is absent."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `browser` (selenium)")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield driver
    finally:
        driver.quit()


def screenshot(driver: Any, file: Path, longest: int = 2400) -> list[Path]:
    """The whole page, however long, as PNG files of at most `longest` pixels in height."""
    width, height = driver.execute_script(
        "return [innerWidth, Math.max(innerHeight, document.documentElement.scrollHeight)]"
    )
    written = []
    for top in range(0, height, longest):
        clip = {"x": 0, "y": top, "width": width, "height": min(longest, height - top), "scale": 1}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        written.append(file.with_name(f"{file.stem}-{top // longest}.png"))
        written[-1].write_bytes(base64.b64decode(shot["data"]))
    return written


def complaints(driver: Any) -> list[str]:
    """Everything that the page has left in the console since it was last asked."""
    return [entry["message"] for entry in driver.get_log("browser")]
