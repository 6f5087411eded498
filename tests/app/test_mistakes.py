"""What a user sees after a mistake: one sentence that names it, and status 2; a defect keeps its traceback."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from command_runs import command, refusal, write_config
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from app.cli.dispatch import _tell_of_thread, tell_repeats
from app.cli.mistakes import plain_sentence
from app.core.errors import RESUME, UserError
from app.core.files import Parts, atomic_file, atomic_folder
from app.main import AGAIN, NUMBERS, main
from callbacks.run_checkpoint import move_link
from lightning_modules.checkpoint import check_checkpoint, unwritable
from lightning_modules.reference_cache import ReferenceCache

RUN = Path("runs") / "run"


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command that must be refused, and returns its one sentence."""

    return lambda *arguments: refusal(arguments, capfd)


@pytest.fixture
def run_config(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`config.yaml` of a short run in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, tiny_llama)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--trainer.accelerator=gp", "trainer: You selected an invalid accelerator name: `accelerator='gp'`"),
        ("--trainer.devices=x", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("--trainer.devices=0", "trainer: `Trainer(devices='0')` value is not a valid input using cpu"),
        ("--trainer.barebones=true", "trainer.barebones has no place here: it forbids logs and checkpoints"),
        ("--trainer.max_steps=-7", "trainer.max_steps must be a whole number from -1"),
        ("--trainer.max_steps=many", "trainer.max_steps"),
        ("--trainer.limit_train_batches=1.5", "trainer: You have passed invalid value 1.5 for limit_train_batches"),
        ("--trainer.precision=8", "trainer.precision"),
        ("--trainer.precision=16-mixed", "trainer.precision 16-mixed loses log-probabilities"),
        ("--trainer.callbacks+=callbacks.Nope", "module 'callbacks' has no attribute 'Nope'"),
        (
            "--trainer.callbacks+=nowhere.Nope",
            "No module named 'nowhere': the folder of a file of your own must be on the path, PYTHONPATH=.",
        ),
        (
            "--schedule=callbacks.BetaSchedular",
            "no attribute 'BetaSchedular'. Did you mean callbacks.BetaScheduler? See `beta-dpo fit --help`.",
        ),
        ("--schedule=EpsilnBeta", "names no class of this slot: name one, for example --schedule EpsilonBeta;"),
        ("--config=own_pair", "own_pair'. Did you mean own_pairs? See"),
        ("--config=configs/method/dppo.yaml", "dppo.yaml'. Did you mean method/dpo? See"),
        ("--model.class_path=lightning_modules.Nope", "has no attribute 'Nope'"),
        ("--model.beta0=-1", "model.beta0: must be a finite number above 0, up to 1e+09, not '-1'"),
        ("--data.batch_size=0", "data.batch_size: must be a whole number from 1, up to 1e+12, not '0'"),
        (
            "--model.loss.label_smoothing=0.1",
            "label_smoothing is an option of a class: name one, for example --model.loss ",
        ),
        ("--model.lr_scheduler=app.main.summary", "a class, or a function annotated to return Union[LRScheduler"),
        (
            "--filter=0.8",
            "filter: '0.8' are no settings of PairFilter: give a mapping, {name: value}, of keep_ratio",
        ),
        ("--audit=false", "for example --audit PairAudit; there are PairAudit, or null. See"),
        ("--model.loss.gamma=0.1", "for example --model.loss AlphaDPOLoss; there are"),
        ("--ckpt_path=none.ckpt", "--ckpt_path: there is no checkpoint none.ckpt"),
        ("--ckpt_path=", "ckpt_path is empty: name a place, or leave it out"),
        ("--checkpoint.dirpath=", "checkpoint.dirpath is empty: name a place"),
        ("--trainer.logger.save_dir=", "trainer.logger.save_dir is empty: name a place"),
        ("--config=", "--config '' holds no options"),
        ("--trainer.callbacks+=lightning.pytorch.callbacks.Timer", "cannot be written to config.yaml: give its"),
        ("--trainer.logger=false", "config.yaml is read by this command, which would replace it"),
        ("--trainer.logger=false", "log folder (trainer.logger, or trainer.default_root_dir): "),
    ],
)
def test_wrong_fields_of_a_run(option: str, sentence: str, run_config: Path, told: Callable[..., str]) -> None:
    assert sentence in told("fit", "--config", "config.yaml", option)
    assert not (run_config / "runs").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [", "b.yaml cannot be read as YAML: line 1, column 9: expected the node content"),
        ("trainer:\n\tmax_steps: 3", "line 2, column 1: found character '\\t' that cannot start any token."),
        # YAML would take the last of them, and drop the options of the first
        (
            "trainer: {max_steps: 3}\ntrainer: {devices: 1}",
            "b.yaml cannot be read as YAML: line 2, column 1: trainer is given twice.",
        ),
        ("model:\n  init_args:\n    beta0: 1\n    beta0: 2", "line 4, column 5: beta0 is given twice."),
        ("- a", "b.yaml' holds no options"),
        ("", "b.yaml' holds no options"),
        ("trainer: {max_step: 3}", "There is no option trainer.max_step. Did you mean trainer.max_steps?"),
        ("trainr: {max_steps: 3}", "There is no option trainr.max_steps. Did you mean trainer.max_steps?"),
    ],
)
def test_wrong_configuration_files(text: str, sentence: str, run_config: Path, told: Callable[..., str]) -> None:
    (run_config / "b.yaml").write_text(text)
    assert sentence in told("fit", "--config", "config.yaml", "--config", "b.yaml")


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "x"), ("SLURM_NTASKS", "two"), ("MASTER_PORT", "-")])
def test_variables_that_are_no_numbers(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    monkeypatch.setenv(name, value)
    assert told("report", "runs") == (
        f"The environment variable {name} is {value!r}, where a whole number belongs: correct or unset it."
    )


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]) -> None:
    for name in NUMBERS:
        monkeypatch.setenv(name, "")
    assert told("report", "none").startswith("There is no folder none")
    assert not set(NUMBERS) & set(os.environ)


def test_an_option_that_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("app.cli.dispatch.rank_zero_info", said.append)
    words = "--config a --config b --filter.by head --x+=1 --x+=2 --filter.init_args.by=tail"
    tell_repeats(words.split())
    assert said == ["--filter.by is given 2 times: the last value counts"]


def test_an_overlay_before_the_configuration_that_it_changes(run_config: Path, told: Callable[..., str]) -> None:
    sentence = told("fit", "--config", "loss/simpo", "--config", "config.yaml")
    assert "its class is not known yet: give the configuration that names it before this one" in sentence


def test_a_quickstart_moves_no_folder_but_its_own(run_config: Path, told: Callable[..., str]) -> None:
    assert told("quickstart", "--out", ".").startswith("out: . is there and holds no quickstart")
    assert (run_config / "config.yaml").is_file()


def test_wrong_configuration_text(told: Callable[..., str]) -> None:
    assert "{a: [ cannot be read as YAML: line 1, column 6: expected" in told("fit", "--config", "{a: [")


@pytest.mark.parametrize(("command", "split"), [("validate", "validation"), ("test", "test")])
def test_an_evaluation_without_pairs(
    command: str, split: str, tiny_llama: str, tmp_path: Path, told: Callable[..., str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat", "chosen": "is red", "rejected": "is blue"}\n')
    write_config(tmp_path, tiny_llama, path=str(tmp_path / "p.jsonl"))
    sentence = told(command, "--config", str(tmp_path / "config.yaml"))
    assert sentence.startswith(f"There are no {split} pairs: give data.{split}_path")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run_config: Path, told: Callable[..., str]) -> None:
    sentence = told("fit", "--config", "config.yaml", "--trainer.accelerator", "gpu")
    assert sentence.startswith(f"trainer.accelerator: torch {torch.__version__} finds no GPU on this machine")
    assert "--trainer.accelerator cpu" in sentence


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_an_extra_that_is_not_installed(run_config: Path, told: Callable[..., str]) -> None:
    (run_config / "wandb.yaml").write_text(
        "trainer: {logger: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {}}}\n"
    )
    sentence = told("fit", "--config", "config.yaml", "--config", "wandb.yaml")
    assert sentence.startswith("A package is missing, install it first: Requirement 'wandb")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "none.ckpt", "out"], "there is no checkpoint none.ckpt"),
        (["export", ".", "out"], ". is damaged or not a checkpoint of beta-dpo"),
        (["export", "none.ckpt"], "the following arguments are required: out"),
        (["export", "a", "b", "c"], "There is no option c"),
        (["generate", "MODEL", "out.jsonl", "--count", "abc"], "count: must be null or a whole number from 1"),
        (
            ["generate", "MODEL", "out.jsonl", "--prompts", "none.jsonl"],
            "There is no file or folder 'none.jsonl': check the path",
        ),
        (
            ["generate", "MODEL", "a file/out.jsonl", "--count", "2"],
            "a file/out.jsonl cannot be written (",
        ),
        (["judge", "none.jsonl", "none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["judge", ".", "."], ". cannot be read: Is a directory"),
        (["judge", "a file", "a file"], "a file:1 is not a sample"),
        (["audit", ""], "run is empty: give a value"),
        (["generate", "MODEL", "out.jsonl", "--prompts", ""], "prompts is empty: give a value"),
        (["audit", "none", "--swap"], "--swap needs a value after it, such as true"),
        (["show"], "data, model: missing, and required"),
        (["report"], "the following arguments are required: runs"),
        (["report", "none"], "There is no folder none: give the log folder"),
        (["audit"], "the following arguments are required: run"),
        (["audit", "none"], "There is no folder none: give the log folder"),
        (["generate", "MODEL", "--out", "out.jsonl"], "Give out as a word without --, in its place"),
        (["generate", "MODEL", "a file", "--prompts", "a file"], "out must end in .jsonl"),
        (["convert", "none.GGUF", "out"], "There is no file none.GGUF"),
        (["convert", "./x", "out"], "./x is neither a .gguf file nor an installed package"),
        (["convert", "no_such.package", "out"], "no_such.package is neither a .gguf file nor an installed package"),
        (["convert", "no_such_package", "out"], "no_such_package is neither a .gguf file nor an installed package"),
        (["frobnicate"], "There is no command 'frobnicate'. See `beta-dpo --help`."),
        (["fti"], "There is no command 'fti'. Did you mean fit? See"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_of_the_small_commands(
    arguments: list[str],
    sentence: str,
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("{}\n")
    assert sentence in told(*[tiny_llama if word == "MODEL" else word for word in arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


# --- the disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 400 kB, which a run fills; only root may mount one."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.slow
def test_no_space_left(small_disk: Path, run_config: Path) -> None:
    options = ["--trainer.logger.init_args.save_dir", str(small_disk), "--trainer.max_steps", "12"]
    stopped = command(run_config, "fit", "--config", "config.yaml", *options)
    assert stopped.returncode == 2, stopped.stderr
    assert "Traceback" not in stopped.stderr
    said = stopped.stderr.splitlines()[-1]
    assert said.startswith("beta-dpo: ")
    assert "space" in said
    assert "free space" in said
    # nothing half-written under a final name
    for checkpoint in (small_disk / "run" / "checkpoints").glob("step=*.ckpt"):
        torch.load(checkpoint, weights_only=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_shards_are_written(run_config: Path) -> None:
    strategy = ["--trainer.strategy", "ShardedStrategy", "--trainer.strategy.replicas", "1"]
    stopped = command(
        run_config, "fit", "--config", "config.yaml", *strategy, "--trainer.max_steps", "6", fault="full 20000@4"
    )
    assert stopped.returncode == 2, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "step=4.ckpt could not be written, probably because the disk is full: free space" in stopped.stderr
    checkpoints = run_config / RUN / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert check_checkpoint(checkpoints / "last.ckpt")["global_step"] == 2


def test_a_full_disk_says_where_the_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "step=4.ckpt"
    assert str(unwritable(path)).endswith("starts again, for there is no earlier checkpoint.")
    (tmp_path / "step=2.ckpt").touch()
    move_link(tmp_path / "last.ckpt", tmp_path / "step=2.ckpt")
    assert str(unwritable(path)).endswith("--ckpt_path last resumes from step=2.ckpt.")


def test_samples_that_do_not_fit_the_disk(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            main(["generate", tiny_llama, "out.jsonl", "--count", "64"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert stop.value.code == 2
    assert "there is no space left: free some" in capsys.readouterr().err
    # the batches that did fit, for the next try; no half of a file
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.parts"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_place_that_may_not_be_written(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    if os.geteuid() == 0:
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("root writes everywhere, and no read-only file system can be mounted")
    else:
        tmp_path.chmod(0o500)
    try:
        sentence = told("generate", tiny_llama, str(tmp_path / "out.jsonl"), "--count", "2")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path)], check=True)
        else:
            tmp_path.chmod(0o700)
    out = re.escape(str(tmp_path / "out.jsonl"))
    assert re.search(rf"{out} cannot be written \(\S.*\): name another file", sentence)


def test_a_thread_that_ends_by_the_disk_tells_so_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("x")):
        _tell_of_thread(threading.ExceptHookArgs((type(error), error, None, None)))
    lost, defect = capsys.readouterr().err.split("\n", 1)
    assert lost.startswith("WARNING: A file could not be written, there is no space left")
    assert "ValueError: x" in defect


# --- the translation itself ----------------------------------------------------------------------------------


def test_a_defect_keeps_its_traceback() -> None:
    for defect in (RuntimeError("shapes differ"), ValueError("x"), KeyError("y"), OSError("no errno")):
        assert plain_sentence(defect) is None


def test_weights_without_a_gradient_under_ddp_name_the_strategy_that_takes_them() -> None:
    weights = nn.Linear(2, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = DistributedDataParallel(weights)
        weights.forward = lambda one: one @ weights.weight  # type: ignore
        module(torch.ones(1, 2)).sum().backward()
        with pytest.raises(RuntimeError) as raised:
            module(torch.ones(1, 2))
    finally:
        dist.destroy_process_group()
    assert "take ddp_find_unused_parameters_true" in str(plain_sentence(raised.value))


def test_the_cause_is_found_behind_what_was_raised_from_it() -> None:
    wrapped = ValueError("a wrapper")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "x.bin")
    assert plain_sentence(wrapped) == (
        "x.bin could not be written, there is no space left: free some, or write to another disk."
    )


@pytest.mark.parametrize(
    ("words", "place", "advice"),
    [
        ("judge a b", "commands.judge.aligned", AGAIN),
        ("fit", "cli.dispatch.run_trainer_command", RESUME),
    ],
)
def test_ctrl_c_says_how_to_resume(
    words: str, place: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"app.{place}", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"beta-dpo: stopped by Ctrl-C. {advice}\n"


@pytest.mark.parametrize(
    ("words", "place", "advice"),
    [
        ("pairs a.jsonl b.jsonl", "commands.pairs.sampled_answers", AGAIN),
        ("fit", "cli.dispatch.run_trainer_command", RESUME),  # before it trains
    ],
)
def test_sigterm_leaves_nothing_half_written(
    words: str,
    place: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def ended(*given: object) -> None:
        with atomic_file(tmp_path / "out.jsonl"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"app.{place}", ended)
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.value.code == 143
    assert capsys.readouterr().err == f"beta-dpo: stopped by SIGTERM. {advice}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("of_rank_0", "said"),
    [
        (
            lambda text, content: (text.replace("lr: 0.003", "lr: 0.3"), content),
            "model.optimizer.lr is 0.003 on rank",
        ),
        (
            lambda text, content: (text, content | {"data": "x"}),
            "data: rank 0 has other training pairs than rank 0",
        ),
    ],
)
def test_a_rank_with_other_settings_or_pairs_is_refused(
    of_rank_0: Any, said: str, run_config: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broadcast(_: object, given: object, src: int = 0) -> object:
        return of_rank_0(*given) if isinstance(given, tuple) else given

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    assert said in told("fit", "--config", "config.yaml")


@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "Ctrl-C")])
def test_a_signal_while_the_libraries_load(name: str, said: str) -> None:
    line, number = [sys.executable, "-m", "app.main", "fit"], signal.Signals[name]
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # which a `&` ignores
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as started:
        assert started.stderr is not None
        assert "loading PyTorch" in started.stderr.readline()
        started.send_signal(number)
        assert started.stderr.read() == f"beta-dpo: stopped by {said}. {RESUME}\n"
    assert started.returncode == 128 + number


def test_a_reader_that_has_enough_ends_the_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "app.main", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr.splitlines() == [
        "beta-dpo: stopped, because nobody reads its output any more ([Errno 32] Broken pipe)"
    ]


def test_a_full_standard_output_is_said() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "app.main", "--help"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    told = "beta-dpo: stopped, because its output cannot be written ([Errno 28] No space left on device)\n"
    assert (ended.returncode, ended.stderr) == (2, told)


def test_a_part_of_the_reference_cache_on_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="too large") as raised:
            ReferenceCache(tmp_path).add(np.arange(500), np.zeros((500, 2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "there is no space left" in str(plain_sentence(raised.value))
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_disk_names_the_file_that_the_user_gave(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        """What safetensors raises, which is no OSError."""

    faults = (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    )
    for writing in (atomic_file, atomic_folder):
        for fault in faults:
            with pytest.raises(OSError, match="No space") as raised, writing(tmp_path / "out"):
                raise fault
            assert plain_sentence(raised.value) == (
                f"{tmp_path / 'out'} could not be written, there is no space left: free some, or write to another "
                "disk."
            )
    with pytest.raises(PermissionError) as raised, atomic_file(tmp_path / "out"):
        raise OSError(errno.EACCES, "Permission denied", "another file")
    assert "another file may not be read" in str(plain_sentence(raised.value))
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised, atomic_file(tmp_path / "folder"):
        pass
    assert str(plain_sentence(raised.value)).startswith(f"{tmp_path / 'folder'}: Is a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_record_of_unfinished_work_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(UserError, match=r"job\.json is damaged: remove the folder"):
        Parts(tmp_path, {})
