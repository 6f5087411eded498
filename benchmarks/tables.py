"""Write the tables of README and docs/benchmarks.md from docs/benchmarks.json: `python -m benchmarks.tables`.

Each table is between `<!-- benchmark NAME -->` and `<!-- end -->`; a test checks that the tables match the file.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from app.core.files import atomic_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
LABELS = {
    "ours": "beta-dpo, plain DPO, online reference",
    "ours-compiled": "beta-dpo, the same with `model.compile_layers`",
    "ours-flex": "beta-dpo, compiled layers and FlexAttention",
    "ours-varlen": "beta-dpo, compiled layers and `varlen_attn`",
    "ours-cached": "beta-dpo, β-DPO with ρ = 0.8, cached reference",
    "ours-split": "beta-dpo, plain DPO, batch three times as large in several micro-batches",
    "ours-split-cached": "beta-dpo, β-DPO, cached reference, the same batch and micro-batches",
    "plain": "transformers, two padded rows a pair, response logits only",
    "trl": "TRL's `DPOTrainer`, its defaults",
}
NAMES = {"plain": "the plain transformers step", "ours-split": "the first row"}
_PLACE = re.compile(r"(<!-- benchmark (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    entries = json.loads(RESULTS.read_text(encoding="utf-8"))
    for page in PAGES:
        text = filled(page.read_text(encoding="utf-8"), entries)
        with atomic_file(page) as temporary:
            temporary.write_text(text, encoding="utf-8")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = False) -> str:
    """Return a Markdown table; `aligned` pads its cells for reading in a terminal."""
    if not aligned:
        lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, *rows)]
        return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    padded = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def versions(*packages: str) -> dict[str, str | None]:
    """Return the version of each package, None where it is not installed."""
    return {name: version(name) if find_spec(name) else None for name in packages}


def processor() -> str:
    """Return the name of this machine's processor."""
    found = re.search(r"^model name\s*: *(.+?) *$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def save(entry: dict[str, Any], name: str, path: Path) -> None:
    """Put an entry into a JSON file of results, in place of an earlier one of that name."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = json.dumps(entries | {name: entry}, indent=1, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def filled(page: str, entries: dict[str, Any]) -> str:
    """Return `page` with the table of its entry in every marked place."""
    return _PLACE.sub(lambda place: f"{place[1]}{comparison(entries[place[2]])}\n{place[3]}", page)


def comparison(entry: dict[str, Any]) -> str:
    """Return the results of an entry as Markdown: median, lowest and highest over the turns, ratios per turn."""
    setting, turns = entry["setting"], {name: pd.DataFrame(each) for name, each in entry["turns"].items()}
    contestants = {name: each for name, each in turns.items() if name in LABELS}
    base = "plain" if "plain" in contestants else next(iter(contestants), "")
    rows = []
    for name, each in contestants.items():
        how = f" ({each.how[0]})" if "how" in each else ""
        speed = each.pairs_per_second
        ratio = speed / contestants[base].pairs_per_second  # NaN where the last turn is cut
        rows.append([LABELS[name] + how, spread(speed), spread(ratio), f"{each.peak_gb.max():.2f} GB"])
    rows += [[LABELS.get(name, name), "failed", "", ""] for name in entry.get("failed", {})]
    header = ["", "pairs/s (lowest–highest)", f"speed-up over {NAMES.get(base, base)}", "peak memory"]
    names = {"torch": "torch", "transformers": "transformers", "trl": "TRL"}
    found = [f"{names[name]} {number}" for name, number in entry["versions"].items() if number]
    text = (
        f"{', '.join([entry['date'], entry['machine'], *found])}. Llama, {setting['layers']} layers, "
        f"hidden {setting['hidden']}, vocabulary {setting['vocabulary']}; {setting['data']}, "
        f"{setting['batch_size']} pairs a step, {setting['steps']} steps after one warm-up, "
        f"{max(map(len, turns.values()), default=0)} turns.\n\n"
    ) + markdown(header, rows)
    if "ours" not in turns or "gemm" not in turns:
        return text
    rates, operations = turns["gemm"].operations_per_second, entry["unavoidable_operations"]
    needed = f"{operations / setting['steps'] / 1e9:.0f} billion a step"
    share = spread(100 * operations / turns["ours"].seconds / rates)
    return (
        f"{text}\n\nOperations that the step cannot avoid: {needed}, done at {share} % of the rate of this "
        f"machine's matrix products in the same turns ({rates.median() / 1e9:.0f} billion a second)."
    )


def spread(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f}–{values.max():.2f})"


if __name__ == "__main__":
    main()
