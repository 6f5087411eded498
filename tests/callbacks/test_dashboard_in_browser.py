"""TensorBoard in a real browser: every chart of the layout has data, every tab what is promised for it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints, screenshot
from small_quickstart import quickstart_run
from tensorboard import program

from callbacks.dashboard import CHARTS

pytestmark = pytest.mark.slow

# what stands in a page, through the shadow roots that TensorBoard's components hide it in
TEXTS = """
const texts = [];
const walk = (node) => {
  const text = node.nodeType === Node.TEXT_NODE ? node.textContent.trim() : "";
  if (text) texts.push(text);
  if (["STYLE", "SCRIPT"].includes(node.nodeName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return texts;
"""
OPEN_ALL = """
const open = (node) => {
  if (node.localName === "tf-category-paginated-view") node.opened = true;
  if (node.shadowRoot) open(node.shadowRoot);
  node.childNodes.forEach(open);
};
open(document.body);
"""


@pytest.fixture(scope="module")
def board(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A browser, and the address of a TensorBoard over two arms of the quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    with chromium(tmp_path_factory.mktemp("profile"), width=1500, height=3200) as driver:
        quickstart_run(folder, tiny_llama, "beta_dpo", "--confidence", "AnnotatorReliability")
        quickstart_run(folder, tiny_llama, "dpo")
        tensorboard = program.TensorBoard()
        tensorboard.configure((None, "--logdir", str(folder / "runs"), "--port", "0", "--load_fast", "false"))
        yield driver, tensorboard.launch()


def look_at(board: tuple[Any, str], tab: str, wanted: str, tmp_path: Path) -> list[str]:
    """The texts of a tab once `wanted` is among them; a screenshot is kept in $SCREENSHOTS, if that is set."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver, address = board
    driver.get("about:blank")
    driver.get(f"{address}#{tab}")

    def shown(_: object) -> bool:
        driver.execute_script(OPEN_ALL)
        return any(re.search(wanted, text) for text in driver.execute_script(TEXTS))

    WebDriverWait(driver, 90).until(shown)
    texts: list[str] = driver.execute_script(TEXTS)
    WebDriverWait(driver, 10, poll_frequency=2).until(lambda _: settled(driver, texts))
    for file in screenshot(driver, tmp_path / f"tensorboard-{tab}.png", longest=3200):
        if "SCREENSHOTS" in os.environ:
            shutil.copy(file, os.environ["SCREENSHOTS"])
    assert [line for line in complaints(driver) if "SEVERE" in line or "Uncaught" in line] == []
    return texts


def settled(driver: Any, texts: list[str]) -> bool:
    """Whether the page shows what it showed before; if not, `texts` takes in what it shows now."""
    now: list[str] = driver.execute_script(TEXTS)
    same = now == texts
    texts[:] = now
    return same


def test_every_chart_is_there_once_and_has_data(board: tuple[Any, str], tmp_path: Path) -> None:
    last = [chart for charts in CHARTS.values() for chart in charts][-1]
    texts = look_at(board, "custom_scalars", re.escape(last.title), tmp_path)
    for category, charts in CHARTS.items():
        assert category in texts
        for chart in charts:
            assert texts.count(chart.title) == 1, chart.title
            following = texts[texts.index(chart.title) :]
            matches = next(text for text in following if text.startswith("Matches"))
            assert int(matches.removeprefix("Matches (").removesuffix(")")) >= 1, chart.title


def test_every_chart_is_explained(board: tuple[Any, str], tmp_path: Path) -> None:
    texts = look_at(board, "text", "when it looks wrong", tmp_path)
    together = " ".join(texts)
    for charts in CHARTS.values():
        for chart in charts:
            assert chart.title in together
    assert any(text.startswith("pairs/lowest gaps") for text in texts)
    assert any(text.startswith("pairs/highest gaps") for text in texts)


def test_histograms_of_kept_and_dropped(board: tuple[Any, str], tmp_path: Path) -> None:
    texts = look_at(board, "histograms", "gap/dropped", tmp_path)
    assert {"gap/kept", "gap/dropped"} <= set(texts)


def test_a_sweep_is_compared(board: tuple[Any, str], tmp_path: Path) -> None:
    texts = look_at(board, "hparams", "^beta_dpo$", tmp_path)
    assert {"α", "ρ", "β0", "learning rate", "beta_dpo", "dpo", "SigmoidLoss"} <= set(texts)
    assert any("val/reward_accuracy" in text.replace("\n", "") for text in texts)
