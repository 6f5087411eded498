"""An exported checkpoint is an ordinary transformers folder with the policy's own log-probabilities."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_runs import command, write_config
from jinja2 import TemplateError
from tiny_runs import controlled, plain_logps, preference, quiet_trainer, save_tiny_model, table_of, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from app.commands.export import export
from app.commands.export_files import generation_config, spell_for_others
from app.core.errors import UserError
from datamodules.controlled_task import build_tokenizer, preference_pairs
from datamodules.sources.messages import prompt_messages
from lightning_modules.pretrained import load_model
from lightning_modules.sharded_loading import read_weights, weight_files

MAMBA2 = {"model_type": "mamba2", "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
GEMMA4 = {
    "model_type": "gemma4_text",
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}


CODE = {
    "configuration_mine.py": """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
""",
}


def test_a_model_with_code_of_its_own_is_exported_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("app.commands.export.model_card", lambda *_: "")  # of a whole configuration
    model = Path(save_tiny_model("llama", tmp_path / "m"))
    for file, text in CODE.items():
        (model / file).write_text(text)
    places = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "mine", "auto_map": places}
    (model / "config.json").write_text(json.dumps(settings))
    module = preference(str(model), trust_remote_code=True)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, controlled(10))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)
    torch.save(
        state | {"config": yaml.safe_dump({"model": {"init_args": {"name": str(model)}}})}, tmp_path / "run.ckpt"
    )
    with pytest.raises(UserError, match="code of its own, which is run only with --trust_remote_code true"):
        export(str(tmp_path / "run.ckpt"), str(tmp_path / "out"))
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "out"), trust_remote_code=True)
    assert "the exported model gives the same outputs" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").glob("*_mine.py")} == CODE.keys()


def trained(folder: Path, name: str) -> tuple[Any, Any, str]:
    """A module, its data and the checkpoint after two steps."""
    module, data = preference(name), controlled(10, batch_size=5)
    trainer = quiet_trainer(folder, max_steps=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "run.ckpt")
    return module, data, str(folder / "run.ckpt")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("gpt2", {"resid_pdrop": 0.1}),
        ("gemma2", {}),
        ("mistral_window", {}),
        ("llama", MAMBA2),  # its configuration has an infinite number
        ("llama", GEMMA4),  # its rotary bases by kind of layer have no older spelling
    ],
)
def test_round_trip(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    name = save_tiny_model(family, tmp_path / "m", **settings)
    module, data, checkpoint = trained(tmp_path, name)
    out = tmp_path / "out" / "model"
    export(checkpoint, str(out))
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(name).eval()

    assert (out / "model.safetensors").is_file()
    assert not list(out.glob("*.bin"))
    text = " what is" + data.tokenizer.decode([6, 7, 8])
    assert tokenizer(text)["input_ids"] == data.tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id == data.tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == data.tokenizer.pad_token_id

    table, rows = table_of(data)
    module.policy.use_attention(module.policy.own_attention)  # plain rows, not the packed ones of training
    policy = module.policy.model.eval()
    moved = 0.0
    with torch.no_grad():
        for row in rows:
            pair = table[int(row)]
            exported = plain_logps(model, pair.prompt, pair.chosen)
            torch.testing.assert_close(exported, plain_logps(policy, pair.prompt, pair.chosen), rtol=0, atol=1e-5)
            moved = max(moved, float((exported - plain_logps(start, pair.prompt, pair.chosen)).abs().max()))
    assert moved > 1e-3


def test_a_head_of_its_own_under_a_configuration_that_ties_it(tmp_path: Path) -> None:
    name = save_tiny_model("llama", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    module, _, checkpoint = trained(tmp_path, name)
    export(checkpoint, str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not exported.config.tie_word_embeddings
    torch.testing.assert_close(exported.lm_head.weight, module.policy.model.lm_head.weight, rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"other values for lm_head.weight than for .* ties them: set its tie_word_em"
    ):
        read_weights(load_model(name, meta_above=0), weight_files(name))


@pytest.fixture(scope="module")
def run_folder(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short run by the command, whose start model stops at two tokens and samples."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_llama, folder / "start")
    settings = {"eos_token_id": [5, 7], "temperature": 0.6, "do_sample": False}
    (folder / "start" / "generation_config.json").write_text(json.dumps(settings))
    write_config(folder, "start", validation_pairs=3)
    done = command(folder, "fit", "--config", "config.yaml", "--trainer.max_steps", "3")
    assert done.returncode == 0, done.stderr
    done = command(folder, "export", "runs/run/checkpoints/last.ckpt", "model")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_card_tells_data_method_and_metrics(run_folder: Path) -> None:
    card = (run_folder / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["beta-dpo"]}
    assert "(3 optimizer steps)" in card
    for line in (
        "`lightning_modules.PreferenceOptimization`, from `start`; the seed is 1.",
        "| beta0 | 0.1 |",
        "`datamodules.ControlledTask`.",
        "| pairs | 43 |",
        "| callbacks.BetaScheduler | {alpha: 0.6, ",
    ):
        assert line in card, line
    state = torch.load(run_folder / "runs/run/checkpoints/last.ckpt", weights_only=True)
    for name in ("beta/used", "gap/running_mean", "filter/kept_fraction", "train/loss", "val/reward_accuracy"):
        assert f"| {name} | {state['metrics'][name]:.6g} |" in card, name


def test_generation_stops_where_start_model_and_training_stop(run_folder: Path) -> None:
    exported = GenerationConfig.from_pretrained(run_folder / "model")
    assert exported.eos_token_id == [2, 5, 7]  # the tokenizer's first
    # transformers saves no temperature without sampling
    assert (exported.temperature, exported.do_sample) == (0.6, True)


def test_an_existing_folder_is_left_alone(tiny_llama: str, tmp_path: Path) -> None:
    _, _, checkpoint = trained(tmp_path, tiny_llama)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(checkpoint, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match=r"--base: .* holds the whole model: leave it out"):
        export(checkpoint, str(tmp_path / "other"), base=tiny_llama)


class Payload:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_never_run(form: str, tmp_path: Path) -> None:
    mark, checkpoint = tmp_path / "was-here", tmp_path / "evil.ckpt"
    contents = {"model_config": "{}", "state_dict": Payload(mark)}
    if form == "torch":
        torch.save(contents, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match="was not loaded"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_of_ours_is_named(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*none\.ckpt"):
        export(str(tmp_path / "none.ckpt"), str(tmp_path / "out"))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"foreign\.ckpt was not written by beta-dpo"):
        export(str(tmp_path / "foreign.ckpt"), str(tmp_path / "out"))
    _, _, checkpoint = trained(tmp_path, tiny_llama)
    whole = Path(checkpoint).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.ckpt is damaged"):
        export(str(tmp_path / "half.ckpt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_export_stops_at_every_end_of_turn() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation_config({"eos_token_id": [5, end]}, tokenizer).eos_token_id == [2, end, 5]
    tokenizer.chat_template = None
    assert generation_config({}, tokenizer).eos_token_id == 2


# --- what others read ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_tiny(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(tmp_path_factory.mktemp("trained"), tiny_llama)[2]


def test_files_obey_the_umask_and_are_spelt_for_older_readers(trained_tiny: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(trained_tiny, str(tmp_path / "out"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert files["config"]["rope_theta"] == files["config"]["rope_parameters"]["rope_theta"] == 10000.0
    assert files["tokenizer_config"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "_from_model_config", "backend"} & {
        name for fields in files.values() for name in fields
    }


def test_a_narrower_type_is_written_and_what_it_costs_is_said(
    trained_tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in ("bfloat16", "float16"):
        export(trained_tiny, str(tmp_path / dtype), dtype=dtype)
        assert f"in {dtype}; " in (told := capsys.readouterr().out)
        assert "rounding moves log-probabilities by" in told
        assert "checked: the exported model gives the same outputs" in told
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert f"weights in {dtype}." in (tmp_path / dtype / "README.md").read_text()


def test_auto_is_the_type_of_the_start_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")
    _, _, checkpoint = trained(tmp_path, str(tmp_path / "m"))
    export(checkpoint, str(tmp_path / "wide"))
    assert "started from bfloat16, which --dtype auto writes" in capsys.readouterr().out
    export(checkpoint, str(tmp_path / "auto"), dtype="auto")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "auto")]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_chat_template_renders_the_dialogue_that_was_trained_on(trained_tiny: str, tmp_path: Path) -> None:
    export(trained_tiny, str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = preference_pairs(1, seed=0)[0].prompt
    assert isinstance(prompt, str)
    turns: list[dict[str, str]] = [*prompt_messages(prompt)]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert rendered == tokenizer(prompt)["input_ids"]
    answered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "yes ."}], tokenize=False)
    assert str(answered).endswith("\n\nAssistant: yes ." + tokenizer.eos_token)
    with pytest.raises(TemplateError, match="alternation"):
        tokenizer.apply_chat_template([{"role": "system", "content": "no"}, *turns])


def test_an_export_that_computes_something_else_does_not_appear(
    trained_tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["app.commands.export"]

    def spoilt(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        fields["rope_parameters"]["rope_theta"] = 500.0
        (folder / "config.json").write_text(json.dumps(fields))

    monkeypatch.setattr(module, "spell_for_others", spoilt)
    with pytest.raises(UserError, match="does not compute what the policy does"):
        export(trained_tiny, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rope", "kind", "wanted"),
    [
        ({"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, "llama",
         {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ({"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}, "gpt_neox",
         {"rope_theta": 1e4, "rotary_emb_base": 1e4, "rotary_pct": 0.25, "partial_rotary_factor": 0.25}),
        ({"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "phi3",
         {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
        ({"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
         "gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    ],
)  # fmt: skip
def test_rotary_fields_of_older_readers(rope: dict, kind: str, wanted: dict, tmp_path: Path) -> None:
    fields = {"model_type": kind, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    spell_for_others(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == fields | wanted
