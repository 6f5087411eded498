"""The report in a real browser: phone and desktop, light and dark, by keyboard, and a console without a word."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints, screenshot
from small_quickstart import quickstart_run

from app.commands.generate import generate
from app.commands.report import report

pytestmark = pytest.mark.slow

BRIGHTNESS = """
const channels = (of) => getComputedStyle(document.body)[of].match(/[\\d.]+/g).slice(0, 3).map(Number);
return [channels("backgroundColor"), channels("color")].map((c) => c[0] + c[1] + c[2]);
"""
# elements that reach beyond the window and do not stand in something that scrolls
TOO_WIDE = """
return [...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, svg, .skip"))
  .map((e) => e.outerHTML.slice(0, 80));
"""
# texts of the drawings that overlap each other or leave their drawing
COLLISIONS = """
const meets = (a, b) =>
  a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
const found = [];
for (const svg of document.querySelectorAll("figure svg")) {
  // Vega hides a label that has no room
  const texts = [...svg.querySelectorAll("text")].filter((text) => text.getAttribute("opacity") !== "0");
  const boxes = texts.map((text) => text.getBoundingClientRect());
  const outer = svg.getBoundingClientRect();
  boxes.forEach((box, i) => {
    if (box.left < outer.left - 2 || box.right > outer.right + 8) found.push("outside: " + texts[i].textContent);
    for (let j = 0; j < i; j++) {
      if (meets(box, boxes[j])) found.push(texts[i].textContent + " / " + texts[j].textContent);
    }
  });
}
return found;
"""


@pytest.fixture(scope="module")
def page(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report on two runs of the quickstart's configurations, with samples."""
    folder = tmp_path_factory.mktemp("report")
    runs = [quickstart_run(folder, tiny_llama, arm) for arm in ("beta_dpo", "dpo")]
    samples = str(folder / "sft.jsonl")
    generate(tiny_llama, samples, count=32, reference=tiny_llama)
    for run in runs:
        shutil.copy(samples, run / "samples.jsonl")
    report([str(run) for run in runs], baseline=samples, out=str(folder / "report.html"))
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_desktop_light_and_dark(page: str, width: int, scheme: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", width, scheme=scheme) as driver:
        open_page(driver, page)
        for file in screenshot(driver, tmp_path / f"report-{width}-{scheme}.png"):
            if "SCREENSHOTS" in os.environ:
                shutil.copy(file, os.environ["SCREENSHOTS"])
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        assert driver.execute_script(TOO_WIDE) == []
        assert driver.execute_script(COLLISIONS) == []
        ground, ink = driver.execute_script(BRIGHTNESS)
        assert (ground > ink) == (scheme == "light")
        assert abs(ground - ink) > 400  # of 765
        driver.find_element("id", "scheme").click()
        ground, ink = driver.execute_script(BRIGHTNESS)
        assert (ground > ink) == (scheme == "dark")
        assert complaints(driver) == []


def test_by_keyboard(page: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as driver:
        open_page(driver, page)
        press(driver, "\ue004")  # Tab
        assert focused(driver).text == "Skip to the findings"
        reached = set()
        for _ in range(200):
            reached.add(focused(driver).tag_name)
            if focused(driver).tag_name == "figure":
                break
            press(driver, "\ue004")
        assert {"a", "button", "div"} <= reached  # links, the colour button, tables that scroll
        figure = focused(driver)
        output = figure.find_element("tag name", "output")
        assert "press" in output.text
        press(driver, "\ue011")  # Home
        first = output.text
        assert first.startswith("step 1: beta_dpo 1 ")
        press(driver, "\ue014")  # right arrow
        assert output.text.startswith("step 2: ")
        assert driver.execute_script("return scrollX") == 0
        press(driver, "\ue010")  # End
        assert output.text.startswith("step 24: ")
        assert complaints(driver) == []


def open_page(driver: Any, page: str) -> None:
    """Open the page and wait until it has drawn every chart."""
    driver.get(page)
    for _ in range(600):
        if driver.execute_script("return !document.querySelector('.picture:empty')"):
            return
        time.sleep(0.1)
    pytest.fail("a chart was not drawn within a minute")


def press(driver: Any, key: str) -> None:
    driver.switch_to.active_element.send_keys(key)


def focused(driver: Any) -> Any:
    return driver.switch_to.active_element
