"""The README.md of an exported model: its origin, its training and its final metrics."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from callbacks.hyperparameters import arguments
from callbacks.slots import entries

# the trainer settings that affect the training; the others concern places and logging
TRAINER_SETTINGS = ("max_epochs", "max_steps", "precision", "num_nodes", "devices", "strategy")
UNRECORDED = "Not recorded: the checkpoint was not written by the `beta-dpo` command."


def model_card(state: dict[str, Any], checkpoint: str, dtype: str, temperature: float = 1.0) -> str:
    """Return the card of a `checkpoint` with this `state`: data, method, β settings, final metrics, as recorded."""
    config = yaml.safe_load(state["config"]) if "config" in state else None
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["beta-dpo"]}
    base = arguments(config["model"]).get("name") if config else None
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        head["base_model"] = base  # the Hub accepts only Hub ids here
    lines = ["---", yaml.safe_dump(head).strip(), "---", "", "# Model card", ""]
    lines += [
        f"Trained by beta-dpo {version('beta-dpo')} ({state['global_step']} optimizer steps) and exported from "
        f"`{checkpoint}`; weights in {dtype}.",
        *([f"The weights of the last norm divide the logits by {temperature:g}."] if temperature != 1.0 else []),
        "",
    ]
    if config is None:
        return "\n".join([*lines, UNRECORDED, ""])
    model, data, trainer = config["model"], config["data"], config["trainer"]
    started = f"`{base}`" if base else "random weights"
    reference = arguments(model).get("reference_name")
    started += f", against the reference `{reference}`" if reference else ""
    lines += [
        "## Method",
        "",
        f"`{model['class_path']}`, from {started}; the seed is {config['seed_everything']}.",
        "",
    ]
    lines += _table("setting", [row for row in arguments(model).items() if row[0] not in ("name", "architecture")])
    lines += ["β, filter and records are callbacks, in this order; without any the β of every step is `beta0`.", ""]
    lines += _table("callback", [(part["class_path"], arguments(part)) for part in entries(config)])
    lines += ["## Data", "", f"`{data['class_path']}`.", ""]
    lines += _table("setting", list(arguments(data).items()))
    lines += ["## Hardware and length", ""]
    lines += _table("setting", [(name, trainer[name]) for name in TRAINER_SETTINGS])
    lines += ["## Final metrics", "", "The newest value of each at the time of the checkpoint.", ""]
    lines += _table("metric", [(name, f"{value:.6g}") for name, value in sorted(state["metrics"].items())])
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, Any]]) -> list[str]:
    """Return a table of two columns, with nested values in one line of YAML."""
    if not rows:
        return ["None.", ""]
    lines = [f"| {title} | value |", "|---|---|"]
    for name, value in rows:
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
        text = text.removesuffix("...\n").strip().replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {name} | {text} |")
    return [*lines, ""]
