"""Every command in README.md and docs/*.md: its words parse, and it runs unless its block says why it does not.

A fenced block of `bash` or `python` is run (slow) in the order of its document, in a folder with `configs/` and a
tiny model at `models/smollm2`. A line `<!-- not run: REASON -->` right before a block keeps it from being run; the
commands in it are parsed all the same.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_runs import save_tiny_model
from transformers import AutoTokenizer

from app.commands import COMMANDS
from app.main import TRAINER_COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.S
)
OTHERS = {
    "make",
    "python",
    "pip",
    "hf",
    "tensorboard",
    "cat",
    "cd",
    "git",
    "source",
    "export",
    "sbatch",
    "srun",
    "scancel",
    *("alpaca_eval", "lm_eval", "vllm"),
    "torchrun",
    "docker",
    "apptainer",
    "for",
    "do",
    "done",
}


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks() -> Iterator[Block]:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start("text"))
            yield Block(path.name, line, found["language"], found["text"], found["reason"])


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every command of a bash block; here-documents and what follows a pipe are left out."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", block.text, flags=re.S).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for separator, words in itertools.groupby(lexer, lambda word: word in ("&&", ";", "|")):
            if not separator:
                yield list(words)


BASH = [block for block in blocks() if block.language == "bash"]
OWN = [(block, words[1:]) for block in BASH for words in commands(block) if words[0] == "beta-dpo"]


def named(value: object) -> str:
    if isinstance(value, Block):
        return f"{value.document}:{value.line}"
    return " ".join(value)[:60] if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("block", "arguments"), OWN, ids=named)
def test_commands_parse(
    block: Block, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name, *rest = arguments
    assert name in {*TRAINER_COMMANDS, *COMMANDS}
    configs = [Path(word) for before, word in itertools.pairwise(rest) if before == "--config"]
    assert all(path.is_file() for path in configs if path.parts[0] == "configs")
    there = all(path.is_file() for path in configs)  # one that a run leaves behind is not
    line = [*arguments, "--print_config"] if name in TRAINER_COMMANDS and there else [*arguments, "--help"]
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert not stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("block", BASH, ids=named)
def test_other_words_are_commands(block: Block) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(block):
        command = next(word for word in words if not re.fullmatch(r"\w+=.*", word))  # after VARIABLE=value
        assert command == "beta-dpo" or command in OTHERS, words
        if command == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        if command == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            file = (path.parent / target) if target else path
            assert file.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if anchor else []
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{path.name}: {target}#{anchor}"


def test_the_reference_and_the_figures_can_be_built() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from build import FIGURES, api, data_page, monitoring_page
    finally:
        sys.path.pop(0)
    assert "### callbacks.BetaScheduler" in api()
    assert {path.stem for path in (ROOT / "docs" / "figures").iterdir()} >= set(FIGURES)
    for name, page in (("data.md", data_page), ("monitoring.md", monitoring_page)):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), "run `make docs`"


def test_some_document_is_run() -> None:
    assert "tutorial.md" in {block.document for block in blocks() if block.reason is None}


@pytest.fixture
def reader(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder and an environment such as a reader of the documents has, with a tiny model for SmolLM2."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    model = save_tiny_model("llama", tmp_path / "models" / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(model)
    command = tmp_path / "bin" / "beta-dpo"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m app.main "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    places = {"PATH": f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return tmp_path, {**os.environ, **places, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


RUN = sorted({block.document for block in blocks() if block.reason is None})


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_blocks_run(document: str, reader: tuple[Path, dict[str, str]]) -> None:
    folder, environment = reader
    for block in blocks():
        if block.document != document or block.reason is not None:
            continue
        line = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*line, block.text], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block.document}:{block.line}\n{done.stderr}"
