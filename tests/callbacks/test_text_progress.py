"""Progress in a log file is plain lines; on a terminal it is Lightning's bar."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import ROOT, command, write_config
from lightning.pytorch.callbacks import ProgressBar
from tiny_runs import beta_dpo, controlled, preference, quiet_trainer

from callbacks import TextProgress
from callbacks.text_progress import progress_line, total_steps

OPTIONS = ("fit", "--config", "config.yaml", "--trainer.enable_progress_bar", "true", "--trainer.max_steps", "12")


def test_a_line() -> None:
    line = progress_line(40, 220, 2.0, {"train/loss": 0.65321, "beta/used": 0.1})
    assert line == "step 40/220  train/loss 0.6532  beta/used 0.1  2 steps/s  1:30 left"
    assert progress_line(40, None, 2.0, {}) == "step 40  2 steps/s"


def test_lines_at_every_n_steps_and_at_the_end(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress: list[ProgressBar] = [TextProgress(every_n_steps=3)]
    trainer = quiet_trainer(tmp_path, [*progress, *beta_dpo()], enable_progress_bar=True, max_epochs=2, max_steps=8)
    trainer.fit(preference(tiny_llama), controlled(43))
    lines = capsys.readouterr().out.splitlines()
    assert total_steps(trainer) == 8
    assert [line.split("  ")[0] for line in lines] == ["step 3/8", "step 6/8", "step 8/8"]
    assert all(
        re.search(r"train/loss [\d.]+ .*beta/used [\d.]+ .*steps/s {2}\d+:\d\d left$", line) for line in lines
    )


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be a whole number from 1"):
        TextProgress(0)


def test_a_log_file_holds_no_control_characters(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    done = command(tmp_path, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)
    assert [line.split("  ")[0] for line in done.stdout.splitlines() if line.startswith("step")] == [
        "step 10/12",
        "step 12/12",
    ]
    assert "validation after step 3  val/" in done.stdout


@pytest.mark.slow
def test_a_terminal_gets_the_bar(tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    ours, theirs = pty.openpty()
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    variables = {**os.environ, "PYTHONPATH": places, "TERM": "xterm", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "app.main", *OPTIONS], cwd=tmp_path, env=variables, stdout=theirs, stderr=theirs
    ) as running:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:
            pass  # the terminal is closed when the process has ended
    os.close(ours)
    assert running.returncode == 0, shown[-2000:]
    assert b"\x1b[" in shown
    assert b"Epoch 2" in shown
    assert b"\nstep 10/12" not in shown
