"""Nothing in a file that came from elsewhere is run: each place where a crafted pickle or module could hide."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_runs import audit_of, command, write_config
from tiny_runs import save_tiny_model

from app.core.errors import UserError
from app.main import main
from datamodules.controlled_task import build_tokenizer
from lightning_modules.checkpoint import check_checkpoint, read_checkpoint, read_for_export
from lightning_modules.pretrained import load_model

RUN = Path("runs") / "run"


class Payload:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def trained(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, with its configuration and checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder, tiny_llama)
    done = command(folder, "fit", "--config", "config.yaml", "--trainer.max_steps", "2")
    assert done.returncode == 0, done.stderr
    return folder


def whole(trained: Path) -> bytes:
    return (trained / RUN / "checkpoints" / "last.ckpt").read_bytes()


def hostile(trained: Path, mark: Path, path: Path) -> None:
    """A checkpoint of ours, with code where the weights' neighbour stands."""
    state = torch.load(trained / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(state | {"lr_schedulers": [Payload(mark)]}, path)


def cut(trained: Path, mark: Path, path: Path) -> None:
    path.write_bytes(whole(trained)[: len(whole(trained)) // 2])


def empty(trained: Path, mark: Path, path: Path) -> None:
    path.write_bytes(b"")


def foreign(trained: Path, mark: Path, path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "loops": {}, "pytorch-lightning_version": "2.6.6"}, path)


def text(trained: Path, mark: Path, path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def bare_pickle(trained: Path, mark: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps({"model_config": "{}", "state_dict": Payload(mark), "loops": {}}))


KINDS = [hostile, cut, empty, foreign, text, bare_pickle]


def refused(run: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a run that was refused."""
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("beta-dpo: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("make", KINDS)
def test_bad_checkpoints_are_refused(
    make: Callable[..., None], trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark, bad = tmp_path / "mark", tmp_path / "bad.ckpt"
    make(trained, mark, bad)
    with pytest.raises(UserError, match=r"bad\.ckpt (is damaged|was not written by beta-dpo)"):
        check_checkpoint(bad)
    with pytest.raises(SystemExit) as end:
        main(["export", str(bad), str(tmp_path / "out")])
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith(f"beta-dpo: {bad} ")
    assert len(said.splitlines()) == 1
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_the_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"model_config": {}, "loops": {}, "state_dict": {"weight": torch.full((64,), 1.5)}}, file)
    assert read_checkpoint(file)["loops"] == {}
    whole = bytearray(file.read_bytes())
    whole[whole.index(torch.full((64,), 1.5).numpy().tobytes()) + 3] ^= 64
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"last\.ckpt is damaged or not a checkpoint"):
        read_checkpoint(file)


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_the_commands_refuse_a_hostile_checkpoint(subcommand: str, trained: Path, tmp_path: Path) -> None:
    mark, bad = tmp_path / "mark", tmp_path / "bad.ckpt"
    hostile(trained, mark, bad)
    before = sorted(trained.rglob("*"))
    said = refused(command(trained, subcommand, "--config", "config.yaml", "--ckpt_path", str(bad)))
    assert said == f"beta-dpo: --ckpt_path: {bad} is damaged or not a checkpoint of beta-dpo, and was not loaded."
    assert not mark.exists()
    assert sorted(trained.rglob("*")) == before


def test_the_stages_share_the_check(
    trained: Path, tiny_llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, tiny_llama)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    mark, bad = tmp_path / "mark", tmp_path / "bad.ckpt"
    hostile(trained, mark, bad)
    cases = [("test", str(bad), "is damaged"), ("predict", str(bad), "is damaged")]
    cases += [("fit", "no.ckpt", "there is no checkpoint no.ckpt"), ("test", "last", "holds no checkpoint")]
    cases += [("fit", "https://example.org/x.ckpt", "there is no checkpoint")]
    for subcommand, path, reason in cases:
        with pytest.raises(SystemExit) as end:
            main([subcommand, "--config", "config.yaml", "--ckpt_path", path])
        assert end.value.code == 2
        assert reason in capfd.readouterr().err
    assert not mark.exists()


def test_a_checkpoint_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    other = save_tiny_model("llama", tmp_path / "wider", hidden_size=64)
    write_config(tmp_path, other)
    checkpoint = str(trained / RUN / "checkpoints" / "last.ckpt")
    said = refused(command(tmp_path, "fit", "--config", "config.yaml", "--ckpt_path", checkpoint))
    assert "another model than the run started from" in said


def test_weights_only_is_no_choice(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(trained / "config.yaml"), "--weights_only", "false"])
    assert "weights_only" in capfd.readouterr().err


# --- shards --------------------------------------------------------------------------------------------------


def shards(folder: Path, value: object = 1e-3) -> Path:
    """A sharded checkpoint as FSDP2 writes it: an index, shards, and Lightning's own file."""
    dcp.save({"state_dict": {"w": torch.ones(3)}, "optimizer_0": {"lr": value}}, checkpoint_id=folder, no_dist=True)
    torch.save({"model_config": "{}"}, folder / "meta.pt")
    return folder


def test_sharded_checkpoints_of_ours_are_accepted(tmp_path: Path) -> None:
    check_checkpoint(shards(tmp_path / "good"))


def index_with_code(folder: Path, mark: Path) -> None:
    shards(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(mark)))


def shard_with_code(folder: Path, mark: Path) -> None:
    shards(folder, Payload(mark))


def metadata_with_code(folder: Path, mark: Path) -> None:
    shards(folder)
    torch.save({"model_config": Payload(mark)}, folder / "meta.pt")


def lost_index(folder: Path, mark: Path) -> None:
    shards(folder)
    (folder / ".metadata").unlink()


def cut_index(folder: Path, mark: Path) -> None:
    shards(folder)
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-9])


@pytest.mark.parametrize("make", [index_with_code, shard_with_code, metadata_with_code, lost_index, cut_index])
def test_bad_shards_are_refused(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    make(tmp_path / "bad", tmp_path / "mark")
    for read in (check_checkpoint, read_for_export):
        with pytest.raises(UserError, match="bad is damaged or not a checkpoint of beta-dpo"):
            read(tmp_path / "bad")
    assert not (tmp_path / "mark").exists()


def test_the_folder_of_a_run_leads_to_its_checkpoint(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    with pytest.raises(UserError, match=f"is the log folder of a run: give its checkpoint, such as {last}"):
        read_for_export(tmp_path)
    with pytest.raises(UserError, match=f"is the folder of the checkpoints of a run: .* such as {last}"):
        read_for_export(last.parent)


# --- tables, models, paths -----------------------------------------------------------------------------------


def test_a_pickle_for_a_table_is_not_read(trained: Path, tiny_llama: str, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_llama)
    line = ("fit", "--config", "config.yaml", "--trainer.max_steps", "2")
    cache = {"BETA_DPO_CACHE": str(tmp_path / "cache")}
    assert command(tmp_path, *line, **cache).returncode == 0
    for table in (tmp_path / "cache" / "tables").glob("*/pairs.arrow"):
        # with the checksum that fits, so that nothing but the reader stands in the way
        table.write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
        meta = json.loads((table.parent / "table.json").read_text())
        meta["checksum"] = hashlib.blake2b(table.read_bytes(), digest_size=16).hexdigest()
        (table.parent / "table.json").write_text(json.dumps(meta))
    again = command(tmp_path, *line, "--trainer.logger.init_args.name", "again", **cache)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("A damaged entry of the cache of tables is rebuilt") == 2
    assert not (tmp_path / "mark").exists()
    assert audit_of(tmp_path / "runs" / "again").equals(audit_of(tmp_path / RUN))


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    model = tmp_path / "model"
    model.mkdir()
    automatic = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (model / "config.json").write_text(json.dumps({"model_type": "hostile", "auto_map": automatic}))
    (model / "hostile.py").write_text(f"import os\nos.system('touch {mark}')\n")
    with pytest.raises(UserError, match=r"brings code of its own, .* only with model\.trust_remote_code: true"):
        load_model(str(model))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 (the module has no class, but it was run)
        load_model(str(model), trust_remote_code=True)
    assert mark.exists()


def test_code_of_a_tokenizer_is_not_run(tiny_llama: str, tmp_path: Path) -> None:
    tokenizer, mark = tmp_path / "tokenizer", tmp_path / "mark"
    build_tokenizer().save_pretrained(tokenizer)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["hostile.Hostile", None]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "hostile.py").write_text(f"import os\nos.system('touch {mark}')\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "tell me", "chosen": "the fox", "rejected": "the owl"}\n')
    write_config(tmp_path, tiny_llama, path="pairs.jsonl", tokenizer=str(tokenizer))
    said = refused(command(tmp_path, "fit", "--config", "config.yaml"))
    assert "data.tokenizer: no tokenizer at" in said
    assert not mark.exists()


def test_a_pickle_for_weights_is_not_read(tmp_path: Path) -> None:
    model = Path(save_tiny_model("llama", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(tmp_path / "mark")}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.name: cannot load .*: a \.bin file .* take safetensors"):
        load_model(str(model))
    assert not (tmp_path / "mark").exists()


def test_no_path_comes_from_the_data(trained: Path, tiny_llama: str, tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b" / "inside"
    ids = ["../../../outside", str(tmp_path / "absolute"), "..", "x/../../y"]
    pair = {"prompt": "tell me", "chosen": "the fox", "rejected": "the owl", "kind/../..": "../k"}
    rows = [pair | {"pair_id": id} for id in ids]
    write_config(inside, tiny_llama, path="pairs.jsonl", validation_path="pairs.jsonl", batch_size=2)
    (inside / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ("--config", "config.yaml", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    done = command(inside, "fit", *line)
    assert done.returncode == 0, done.stderr
    done = command(inside, "predict", "--config", "config.yaml")
    assert done.returncode == 0, done.stderr
    assert sorted(audit_of(inside / RUN)["pair_id"].to_pylist()) == sorted(ids)
    assert sorted(pq.read_table(inside / "scores.parquet")["pair_id"].to_pylist()) == sorted(ids)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["inside"]


@pytest.mark.parametrize("name", ["../outside.json", "/tmp/outside.json", "a/b.json"])
def test_a_checkpoint_cannot_name_files_elsewhere(
    name: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(trained / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    state["ControlledTask"]["tokenizer_files"][name] = "{}"
    torch.save(state, tmp_path / "crafted.ckpt")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "crafted.ckpt"), str(tmp_path / "out")])
    assert "it holds no tokenizer, or a damaged one" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["crafted.ckpt"]
