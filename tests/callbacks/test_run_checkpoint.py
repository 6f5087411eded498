"""`last.ckpt` is always the newest checkpoint of the one run whose folder it is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from tiny_runs import Recorder, controlled, preference, quiet_trainer, same_bits, weights

from app.core.errors import StepRefused, UserError
from callbacks import RunCheckpoint
from callbacks.run_checkpoint import Interrupted, SignalWatch, move_link


def train(folder: Path, model: str, steps: int, resume: str | None = None, **settings: Any) -> RunCheckpoint:
    checkpoint = RunCheckpoint(**{"every_n_steps": 2, **settings})
    trainer = quiet_trainer(folder, [checkpoint], max_steps=steps, enable_checkpointing=True)
    trainer.fit(preference(model), controlled(80), ckpt_path=resume)
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("keep_all", [False, True])
def test_last_is_the_end_of_the_run_whatever_its_number(keep_all: bool, tiny_llama: str, tmp_path: Path) -> None:
    checkpoint = train(tmp_path, tiny_llama, 5, keep_all=keep_all)
    kept = ["step=2.ckpt", "step=4.ckpt", "step=5.ckpt"] if keep_all else ["step=5.ckpt"]
    assert names(tmp_path) == ["last.ckpt", *kept]
    assert checkpoint.last.readlink() == Path("step=5.ckpt")


def test_a_fit_after_a_signal_in_one_process_goes_on(tiny_llama: str, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_steps=2)
    stop = LambdaCallback(on_train_batch_end=lambda *_: signal.raise_signal(signal.SIGUSR1))
    trainer = quiet_trainer(tmp_path, [stop, checkpoint], max_steps=3, enable_checkpointing=True)
    module, data = preference(tiny_llama), controlled(80)
    for step in (1, 2):
        with pytest.raises(Interrupted, match=f"stopped by SIGUSR1 after step {step}"):
            trainer.fit(module, data, ckpt_path=str(checkpoint.last) if step > 1 else None)


def test_a_closed_terminal_is_no_business_of_a_run_under_nohup() -> None:
    before, watch = signal.signal(signal.SIGHUP, signal.SIG_IGN), SignalWatch()
    try:
        watch.start()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        watch.stop()
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noted_where_the_outputs_are_closed() -> None:
    code = (
        "import os, signal; from callbacks.run_checkpoint import SignalWatch; watch = SignalWatch(); "
        "watch.start(); os.close(1); os.close(2); signal.raise_signal(signal.SIGHUP); os._exit(watch.received or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == signal.SIGHUP.value


def test_the_folder_of_another_run_is_left_alone(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(UserError, match="already holds the checkpoints of another run: choose another log folder"):
        train(tmp_path, tiny_llama, 2)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_going_back_makes_the_earlier_checkpoint_the_last(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, 6, keep_all=True)
    earlier = tmp_path / "checkpoints" / "step=2.ckpt"
    # one step on, and no checkpoint due: only the end of the run is saved
    checkpoint = train(tmp_path, tiny_llama, 3, str(earlier), keep_all=True)
    assert checkpoint.last.readlink() == Path("step=3.ckpt")
    # what is left of a killed write goes, what another program left stays
    for name in (".step=8.ckpt.x.part", ".other.part"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    trainer = quiet_trainer(tmp_path, [Failing(), RunCheckpoint()], max_steps=9, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="an injected failure"):
        trainer.fit(preference(tiny_llama), controlled(80), ckpt_path=str(earlier))
    assert checkpoint.last.readlink() == Path("step=2.ckpt")
    assert names(tmp_path)[:1] == [".other.part"]


def test_a_run_that_max_steps_ended_goes_on_within_its_epoch(tiny_llama: str, tmp_path: Path) -> None:
    """Eight steps are an epoch, the only one; three of them and then the rest are what all at once are."""

    def steps(folder: Path, count: int, resume: str | None = None) -> tuple[list[list[str]], dict[str, Any]]:
        module, recorder = preference(tiny_llama), Recorder()
        callbacks = [recorder, RunCheckpoint()]
        trainer = quiet_trainer(folder, callbacks, max_steps=count, enable_checkpointing=True)
        trainer.fit(module, controlled(80), ckpt_path=resume)
        return [list(decision.pair_ids) for decision in recorder.decisions], weights(module)

    whole, expected = steps(tmp_path / "whole", 8)
    begun, _ = steps(tmp_path / "parts", 3)
    rest, found = steps(tmp_path / "parts", 20, str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
    assert begun + rest == whole
    assert same_bits(expected, found)
    # and an epoch that is done is not taken for one that goes on
    none, _ = steps(tmp_path / "parts", 20, str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
    assert none == []


def test_a_finished_run_goes_on_with_the_next_pass_over_the_pairs(tiny_llama: str, tmp_path: Path) -> None:
    """One epoch and then, by `max_epochs` alone, a second one are what two at once are."""

    def steps(folder: Path, epochs: int, resume: str | None = None) -> list[list[str]]:
        callbacks = [recorder := Recorder(), RunCheckpoint()]
        trainer = quiet_trainer(folder, callbacks, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(preference(tiny_llama), controlled(20), ckpt_path=resume)
        return [list(decision.pair_ids) for decision in recorder.decisions]

    begun = steps(tmp_path / "parts", 1)
    rest = steps(tmp_path / "parts", 2, str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
    assert begun + rest == steps(tmp_path / "whole", 2)
    assert rest != begun


class Ruining(Callback):
    """Refuses the step after three; before, it makes a weight NaN unless told not to."""

    def __init__(self, ruins: bool = True) -> None:
        self.ruins = ruins

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: object) -> None:
        if trainer.global_step == 3:
            if not self.ruins:
                raise StepRefused("refused")
            weight = next(weight for weight in pl_module.parameters() if weight.requires_grad)
            weight.data.view(-1)[0] = float("nan")
            raise StepRefused("refused")


def test_ruined_weights_never_replace_a_good_checkpoint(tiny_llama: str, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_steps=2)
    trainer = quiet_trainer(tmp_path, [Ruining(), checkpoint], max_steps=8, enable_checkpointing=True)
    kept = r"not finite after 3 steps and were not saved; .*step=2\.ckpt is kept"
    with pytest.warns(UserWarning, match=kept), pytest.raises(StepRefused):
        trainer.fit(preference(tiny_llama), controlled(80))
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    with pytest.raises(UserError, match=kept):
        checkpoint.save(trainer)
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt"]


def test_a_checkpoint_stays_until_a_step_from_the_next_one_is_good(tiny_llama: str, tmp_path: Path) -> None:
    callbacks = [Ruining(ruins=False), RunCheckpoint(every_n_steps=2)]
    trainer = quiet_trainer(tmp_path, callbacks, max_steps=8, enable_checkpointing=True)
    with pytest.raises(StepRefused):
        trainer.fit(preference(tiny_llama), controlled(80))
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]
    train(tmp_path, tiny_llama, 5, str(tmp_path / "checkpoints" / "last.ckpt"))
    assert names(tmp_path) == ["last.ckpt", "step=5.ckpt"]


def test_a_resume_with_another_interval_knows_what_to_delete(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path, tiny_llama, 2)
    train(tmp_path, tiny_llama, 3, str(tmp_path / "checkpoints" / "last.ckpt"), every_n_steps=1)
    assert names(tmp_path) == ["last.ckpt", "step=3.ckpt"]


def test_a_folder_that_was_moved_keeps_no_older_checkpoint(tiny_llama: str, tmp_path: Path) -> None:
    train(tmp_path / "a", tiny_llama, 2)
    (tmp_path / "a").rename(tmp_path / "b")
    train(tmp_path / "b", tiny_llama, 4, str(tmp_path / "b" / "checkpoints" / "last.ckpt"))
    assert names(tmp_path / "b") == ["last.ckpt", "step=4.ckpt"]


class Failing(Callback):
    """Fails in the first step."""

    def on_train_batch_start(self, *_: object) -> None:
        raise RuntimeError("an injected failure")


def test_the_link_moves_in_one_rename(tmp_path: Path) -> None:
    link = tmp_path / "last.ckpt"
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_text(name)
        (tmp_path / ".last.ckpt.link").symlink_to("gone")  # of a run that was killed in between
        move_link(link, tmp_path / name)
        assert link.read_text() == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt", "last.ckpt"]


def test_the_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be a whole number from 1"):
        RunCheckpoint(every_n_steps=0)
