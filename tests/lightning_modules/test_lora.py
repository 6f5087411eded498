"""LoRA: the reference is the policy without adapters, the base never moves, resume and export are exact."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    Recorder,
    beta_dpo,
    controlled,
    preference,
    quiet_trainer,
    relative_difference,
    save_tiny_model,
    tiny_model,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.commands.export import export
from app.core.errors import UserError
from callbacks import BetaScheduler, EpsilonBeta, RewardGapStatistics, RunCheckpoint
from lightning_modules import PreferenceOptimization, SupervisedFineTuning
from lightning_modules.checkpoint import read_checkpoint
from lightning_modules.lora import Lora, adapted, add_lora, without_adapters
from lightning_modules.measuring import PairMeasurer

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="the extra lora is not installed")
SETTINGS = Lora(r=4, lora_alpha=8.0)


def train(folder: Path, model: str, steps: int, callbacks: list | None = None, **settings: Any) -> Any:
    """β-DPO with adapters on the controlled task; returns module, decisions and trainer."""
    torch.manual_seed(0)  # of A's start
    module = preference(model, **({"lora": SETTINGS} | settings))
    recorder = Recorder()
    parts = [*(beta_dpo() if callbacks is None else callbacks), recorder]
    trainer = quiet_trainer(folder, parts, max_steps=steps)
    trainer.fit(module, controlled(40, batch_size=10, micro_batch_tokens=300))
    return module, recorder.decisions, trainer


def test_only_adapters_move_and_the_first_gaps_are_exactly_zero(tiny_llama: str, tmp_path: Path) -> None:
    module, decisions, _ = train(tmp_path, tiny_llama, 4)
    assert (decisions[0].gaps == 0).all()
    assert decisions[-1].gaps.abs().max() > 1e-3
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).named_parameters())
    for name, tensor in module.policy.model.named_parameters():
        plain = name.replace(".base_layer", "")
        assert ("lora_" in name) == tensor.requires_grad
        if plain in before:
            assert torch.equal(tensor, before[plain]), name
        elif "lora_B" in name:
            assert tensor.abs().max() > 0, name
    assert len(module.measurer.scorers) == 1


def test_without_adapters_it_is_the_model_that_it_was(tiny_llama: str, tmp_path: Path) -> None:
    module, _, _ = train(tmp_path, tiny_llama, 2)
    before = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad(), module.policy.as_loaded():
        changed = module.policy.model(input_ids=ids).logits
        with without_adapters(module.policy.model):
            assert torch.equal(module.policy.model(input_ids=ids).logits, before(input_ids=ids).logits)
        assert torch.equal(module.policy.model(input_ids=ids).logits, changed)
    assert not torch.equal(changed, before(input_ids=ids).logits)


def test_a_step_is_that_of_a_separate_frozen_reference(tiny_llama: str, tmp_path: Path) -> None:
    ours, decisions, _ = train(tmp_path / "ours", tiny_llama, 4)

    class TwoModels(PreferenceOptimization):
        """The same adapters beside a second model as reference."""

        def keep_reference(self) -> None:
            reference = copy.deepcopy(self.policy).eval().requires_grad_(False)
            self.measurer = PairMeasurer(self.policy, self.ranks, reference)

    module = TwoModels(tiny_llama, lora=SETTINGS, optimizer=ours.make_optimizer, max_grad_norm=0.5)
    recorder = Recorder()
    torch.manual_seed(0)
    quiet_trainer(tmp_path / "two", [*beta_dpo(), recorder], max_steps=4).fit(
        module, controlled(40, batch_size=10, micro_batch_tokens=300)
    )
    for one, other in zip(decisions, recorder.decisions, strict=True):
        torch.testing.assert_close(one.gaps, other.gaps, rtol=0, atol=1e-5)
        assert torch.equal(one.kept, other.kept)
    assert relative_difference(weights(ours), weights(module)) < 1e-6


def test_epsilon_dpo_perturbs_against_the_adapter_off_reference(tiny_llama: str, tmp_path: Path) -> None:
    _, decisions, _ = train(tmp_path, tiny_llama, 3, [EpsilonBeta()])
    assert {round(beta, 6) for beta in decisions[0].beta.tolist()} == {0.1}
    assert len(set(decisions[-1].beta.tolist())) > 1


def test_evaluation_reads_the_same_reference(tiny_llama: str, tmp_path: Path) -> None:
    module = preference(tiny_llama, lora=SETTINGS)
    trainer = quiet_trainer(tmp_path, limit_val_batches=1.0)
    (before,) = trainer.validate(module, controlled(10), verbose=False)
    assert before["val/gap_mean"] == 0.0
    trainer.fit(module, controlled(10))
    (after,) = trainer.validate(module, controlled(10), verbose=False)
    assert after["val/gap_mean"] != 0.0


def test_a_cached_reference_goes_with_adapters(tiny_llama: str, tmp_path: Path) -> None:
    def parts() -> list:
        return [RewardGapStatistics(), BetaScheduler(0.6)]  # a filter would select by the first gaps' rounding

    _, frozen, _ = train(tmp_path / "frozen", tiny_llama, 3, parts())
    module, cached, _ = train(tmp_path / "cached", tiny_llama, 3, parts(), reference="cached")
    assert module.measurer.reference is None
    for one, other in zip(frozen, cached, strict=True):
        torch.testing.assert_close(one.gaps, other.gaps, rtol=0, atol=1e-4)


def run(
    folder: Path, model: str, steps: int, checkpoint: Path | None = None, lora: Lora | None = SETTINGS
) -> PreferenceOptimization:
    torch.manual_seed(0)
    module = preference(model, lora=lora)
    callbacks = [*beta_dpo(), RunCheckpoint(every_n_steps=1, dirpath=str(folder / "checkpoints"))]
    trainer = quiet_trainer(folder, callbacks, max_steps=steps, enable_checkpointing=True)
    trainer.fit(module, controlled(60), ckpt_path=checkpoint, weights_only=True)
    return module


STARTS = {
    "LoRA": SETTINGS,
    "DoRA": replace(SETTINGS, use_dora=True, init_lora_weights="gaussian"),
    "PiSSA": replace(
        SETTINGS,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_resumed_run_is_the_uninterrupted_one_and_exports_it(start: str, tiny_llama: str, tmp_path: Path) -> None:
    lora = STARTS[start]
    whole = run(tmp_path / "whole", tiny_llama, 5, lora=lora)
    run(tmp_path / "part", tiny_llama, 2, lora=lora)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed = run(tmp_path / "part", tiny_llama, 5, last, lora)
    held = read_checkpoint(last)["state_dict"]
    # PiSSA changes the base, so the checkpoint holds it, and the reference is a model of its own
    assert all("lora_" in name for name in held) == (len(resumed.measurer.scorers) == 1) == (start != "PiSSA")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name

    ids = torch.arange(10, 30)[None]
    with torch.no_grad(), resumed.policy.as_loaded():
        wanted = resumed.policy.model(input_ids=ids).logits
        merged, adapter = tmp_path / "merged", tmp_path / "adapter"
        export(str(last), str(merged))
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert not any("lora" in name for name in model.state_dict())
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        from peft import PeftModel

        if start == "PiSSA":
            with pytest.raises(UserError, match=r"--adapter: .* changed the base's weights"):
                export(str(last), str(adapter), adapter=True)
            return
        moved = tmp_path / "moved"
        shutil.copytree(tiny_llama, moved)
        export(str(last), str(adapter), adapter=True, base=str(moved))
        with pytest.raises(
            UserError, match=f"--base: {re.escape(str(merged))} is another model than the adapters belong to"
        ):
            export(str(last), str(tmp_path / "other"), base=str(merged))
        with pytest.raises(
            UserError, match=r"--ckpt_path: the checkpoint holds adapters of .*, and that very model"
        ):
            run(tmp_path / "other", str(merged), 5, last, lora)
        with pytest.raises(UserError, match=r"--ckpt_path: the checkpoint holds adapters of .*: give model\.lora"):
            run(tmp_path / "other", tiny_llama, 5, last, None)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        assert not torch.allclose(base(input_ids=ids).logits, wanted, atol=1e-2)
        loaded = PeftModel.from_pretrained(base, adapter)
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert loaded.peft_config["default"].base_model_name_or_path == str(moved)
    assert AutoTokenizer.from_pretrained(adapter).eos_token == AutoTokenizer.from_pretrained(tiny_llama).eos_token
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (adapter, merged)]
    assert sizes[0] < sizes[1]


def test_adapters_on_tied_embeddings_are_exported_untied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = save_tiny_model("llama", tmp_path / "m", tie_word_embeddings=True)
    lora = Lora(r=4, lora_alpha=8.0, target_modules=["embed_tokens", "q_proj"])
    torch.manual_seed(0)
    module = preference(name, lora=lora)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, controlled(30))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad(), module.policy.as_loaded():
        wanted = module.policy.model(input_ids=ids).logits
        for adapter in (False, True):
            out = tmp_path / f"adapter-{adapter}"
            export(str(tmp_path / "run.ckpt"), str(out), adapter=adapter)
            assert ("the head is no longer tied" in capsys.readouterr().out) is not adapter
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(name if adapter else out, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, out) if adapter else base
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_supervised_fine_tuning_takes_adapters_too(tiny_llama: str, tmp_path: Path) -> None:
    module = SupervisedFineTuning(tiny_llama, lora=Lora(r=2, target_modules=["q_proj", "v_proj"]))
    quiet_trainer(tmp_path, max_steps=2).fit(module, controlled(20, stage="demonstrations"))
    trained = {name.split(".")[-4] for name, p in module.policy.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
CONVERTED: dict[str, Any] = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}
# not converted by peft
FUSED: dict[str, Any] = {"model_type": "gpt_oss", "num_local_experts": 4, "sliding_window": 6, **EXPERTS}


def test_fused_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    cure = r"name experts\.down_proj, experts\.gate_up_proj in model\.lora\.target_parameters"
    for family in (FUSED, CONVERTED):
        with pytest.raises(UserError, match=rf"gate_proj names no layer, .*there are .*\. If the experts.*{cure}"):
            add_lora(tiny_model("llama", **family), Lora(target_modules=["q_proj", "gate_proj"]))
    with pytest.raises(UserError, match=r"experts\.up_proj names no weight: the fused experts are"):
        add_lora(tiny_model("llama", **FUSED), Lora(target_parameters=["experts.up_proj"]))
    with pytest.raises(UserError, match=r"do not go with fused experts.*list layers without them"):
        add_lora(tiny_model("llama", **CONVERTED), Lora(init_lora_weights="pissa"))
    converted, fused = (tiny_model("llama", **family) for family in (CONVERTED, FUSED))
    add_lora(converted, Lora())
    assert adapted(converted)["experts.gate_up_proj"] == 2
    assert "get no adapter" not in caplog.text
    add_lora(fused, Lora())
    assert re.search(cure, caplog.text)


def test_adapters_of_experts_are_resumed_and_exported(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", **FUSED)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    lora = Lora(r=2, target_modules=["q_proj"], target_parameters=experts)
    whole = run(tmp_path / "whole", model, 3, lora=lora)
    run(tmp_path / "part", model, 2, lora=lora)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed = run(tmp_path / "part", model, 3, last, lora)
    moved = {name for name, weight in weights(resumed).items() if "experts" in name and "lora_B" in name}
    assert len(moved) == 4
    for (name, one), other in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(one, other), name
        assert name not in moved or one.abs().max() > 0
    for adapter in (False, True):  # each is read again, and must compute what the policy does
        export(str(last), str(tmp_path / f"adapter-{adapter}"), adapter=adapter)


def test_what_cannot_work_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: nowhere names no layer"):
        train(tmp_path, tiny_llama, 1, lora=Lora(target_modules=["nowhere"]))
    with pytest.raises(UserError, match=r"model.lora.init_lora_weights: 'eva' is none of true, gaussian, pissa"):
        train(tmp_path, tiny_llama, 1, lora=Lora(init_lora_weights="eva"))
    with pytest.raises(UserError, match="peft has no olora for Conv1D"):
        add_lora(tiny_model("gpt2"), Lora(init_lora_weights="olora"))
    with pytest.raises(UserError, match="head"):
        train(tmp_path, tiny_llama, 1, lora=Lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="Lora: r must be"):
        Lora(r=0)
    plain = quiet_trainer(
        tmp_path / "plain", [RunCheckpoint(dirpath=str(tmp_path))], max_steps=1, enable_checkpointing=True
    )
    plain.fit(preference(tiny_llama), controlled(10))
    with pytest.raises(UserError, match="--adapter"):
        export(str(tmp_path / "last.ckpt"), str(tmp_path / "out"), adapter=True)


def test_a_scale_of_zero_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    module = preference(tiny_llama, lora=Lora(r=4, alpha_pattern={"q_proj": 0.0}))
    with pytest.raises(UserError, match="alpha_pattern: q_proj needs a finite number above 0"):
        quiet_trainer(tmp_path).fit(module, controlled(10))
