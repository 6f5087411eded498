"""Write the tables of README and docs/benchmarks.md from docs/benchmarks.json: `python -m benchmarks.tables`.

Each table is between `<!-- benchmark NAME -->` and `<!-- end -->`; a test checks that the tables match the file.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from app.files import atomic_file

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


def filled(page: str, entries: dict[str, Any]) -> str:
    """Return `page` with the table of its entry in every marked place."""

    def table(name: str) -> str:
        special = {"cost": costs, "codegen": kernels}
        return special.get(name, comparison)(entries[name])

    return _PLACE.sub(lambda place: f"{place[1]}{table(place[2])}\n{place[3]}", page)


def kernels(entry: dict[str, Any]) -> str:
    """Return a Markdown table of FlexAttention's main H100 kernel of each pass, the one that spills most."""
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    lines = [
        f"{entry['date']}, {versions}; assembled for sm_90, not launched. Bytes of shared memory of a block, of "
        "232448; bytes that a thread spills.",
        "",
        "| head width | forward: shared, spilled | backward: shared, spilled | seconds |",
        "|---|---|---|---|",
    ]
    for name, cell in entry["cells"].items():
        if "stopped" in cell:
            lines.append(f"| {name} | {cell['stopped']} | | |")
            continue
        main = [kernel for kernel in cell["kernels"] if "_tem_" in kernel["name"]]
        passes = [[k for k in main if ("backward" in k["name"]) == backward] for backward in (False, True)]
        worst = [max(found, key=lambda kernel: kernel["spilled"]) for found in passes]
        figures = [f"{kernel['shared']}, {kernel['spilled']}" for kernel in worst]
        lines.append(f"| {name} | {figures[0]} | {figures[1]} | {cell['seconds']} |")
    return "\n".join(lines)


def costs(entry: dict[str, Any]) -> str:
    """Return the cost of a pair, with one property varied at a time, as a Markdown table."""
    setting, versions = entry["setting"], entry["versions"]
    lines = [
        f"{entry['date']}, {entry['machine']}, torch {versions['torch']}, transformers {versions['transformers']}."
        f" Llama, {setting['layers']} layers, hidden {setting['hidden']}, vocabulary {setting['vocabulary']}; "
        f"random words, {setting['steps']} steps after one warm-up, {entry['repeats']} turns.",
        "",
        "| | beta-dpo, ms a pair | plain step, ms a pair | beta-dpo is faster by | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, point in entry["points"].items():
        ours, plain, (middle, low, high) = point["ours"], point["plain"], point["ratio"]
        lines.append(
            f"| {name} | {ours['ms_per_pair']:.0f} | {plain['ms_per_pair']:.0f} "
            f"| {middle:.2f} ({low:.2f}–{high:.2f}) | {ours['peak_gb']:.2f} and {plain['peak_gb']:.2f} GB |"
        )
    return "\n".join(lines)


def comparison(entry: dict[str, Any]) -> str:
    """Return the results of an entry as Markdown: median, lowest and highest over the turns, ratios per turn."""
    setting, turns, versions = entry["setting"], entry["turns"], entry["versions"]
    base = "plain" if "plain" in turns else next(iter(turns))
    lines = [
        f"{entry['date']}, {entry['machine']}, torch {versions['torch']}, transformers {versions['transformers']}"
        + (f", TRL {versions['trl']}" if versions["trl"] else "")
        + f". Llama, {setting['layers']} layers, hidden {setting['hidden']}, vocabulary {setting['vocabulary']}; "
        f"{setting['data']}, {setting['batch_size']} pairs a step, {setting['steps']} steps after one warm-up, "
        f"{max(map(len, turns.values()), default=0)} turns.",
        "",
        f"| | pairs/s (lowest–highest) | speed-up over {NAMES.get(base, base)} | peak memory |",
        "|---|---|---|---|",
    ]
    for name, results in turns.items():
        if name not in LABELS:
            continue
        pairs = zip(results, turns[base], strict=False)  # an interrupted turn has fewer
        row = [
            f"{LABELS[name]} ({results[0]['how']})" if "how" in results[0] else LABELS[name],
            spread([result["pairs_per_second"] for result in results]),
            spread([mine["pairs_per_second"] / other["pairs_per_second"] for mine, other in pairs]),
            f"{peak(results):.2f} GB",
        ]
        lines.append(f"| {' | '.join(row)} |")
    lines += [f"| {LABELS.get(name, name)} | failed | | |" for name in entry.get("failed", {})]
    ours = turns.get("ours")
    if ours is not None and "gemm" in turns:
        used = [
            entry["unavoidable_operations"] / mine["seconds"] / gemm["operations_per_second"]
            for mine, gemm in zip(ours, turns["gemm"], strict=False)
        ]
        rate = statistics.median(gemm["operations_per_second"] for gemm in turns["gemm"])
        lines += [
            "",
            "Operations that the step cannot avoid: "
            f"{entry['unavoidable_operations'] / setting['steps'] / 1e9:.0f} billion a step, done at "
            f"{spread([100 * share for share in used])} % of the rate of this machine's matrix products in the "
            f"same turns ({rate / 1e9:.0f} billion a second).",
        ]
    return "\n".join(lines)


def peak(results: list[dict[str, Any]]) -> float:
    return max(result["peak_gb"] for result in results)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    main()
