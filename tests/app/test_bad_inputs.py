"""Bad inputs of every kind, each by the command itself: status 2, one sentence that names it, no traceback.

docs/reliability.md lists the kinds; the first test here compares.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import refusal, write_config
from safetensors.torch import load_file, save_file
from tiny_runs import save_reward_model, tiny_model

LIGHTNING = "lightning.pytorch"
TORCH = "torch.optim"
FIT = "fit --config config.yaml"

# kind → arguments of `fit`, what the sentence begins with or holds
OF_A_RUN: dict[str, list[tuple[str, str]]] = {
    "strategies": [
        (f"--trainer.strategy={name}", f"trainer.strategy: {name}")
        for name in (
            "ddp_spawn",
            "ddp_notebook",
            "ddp_fork_find_unused_parameters_true",
            "fsdp",
            "fsdp_cpu_offload",
            "deepspeed",
            "deepspeed_stage_3",
            "xla",
            "foo",
            f"{LIGHTNING}.strategies.FSDPStrategy",
        )
    ]
    + [
        (f"'--trainer.strategy={{class_path: {LIGHTNING}.strategies.{words}}}'", f"trainer.strategy: {said}")
        for words, said in (
            ("FSDPStrategy", "FSDPStrategy is not one"),
            ("ModelParallelStrategy", "ModelParallelStrategy is not one"),
            ("DDPStrategy, init_args: {start_method: spawn}", "DDPStrategy spawns or forks"),
        )
    ]
    + [
        ("--trainer.strategy=ShardedStrategy", "{class_path: lightning_modules.ShardedStrategy}"),
        ("--trainer.strategy ShardedStrategy --trainer.strategy.replicas 3", "do not make 3 replicas"),
        ("--trainer.strategy ShardedStrategy --trainer.strategy.replicas 0.5", "trainer.strategy.replicas: must"),
        ("--trainer.strategy ShardedStrategy --trainer.strategy.tensor_parallel_size 3", "tensor_parallel_size 3"),
        ("--trainer.strategy ShardedStrategy --trainer.strategy.prefetch_blocks -1", "strategy.prefetch_blocks"),
        ("--trainer.strategy ShardedStrategy --trainer.strategy.timeout 3", "trainer.strategy.timeout"),
        ("--trainer.strategy ShardedStrategy --trainer.strategy.compute_dtype int8", "strategy.compute_dtype"),
        (
            "--trainer.strategy ShardedStrategy --trainer.strategy.replicas 1 --trainer.precision bf16-mixed",
            "set 32-true",
        ),
    ],
    "callbacks": [
        (f"--trainer.callbacks+={LIGHTNING}.callbacks.{words}", f"trainer.callbacks: {words.split()[0]} does not")
        for words in (
            "StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.1",
            "GradientAccumulationScheduler --trainer.callbacks.scheduling '{\"1\": 2}'",
            "EMAWeightAveraging",
            "LearningRateFinder",
            "OnExceptionCheckpoint --trainer.callbacks.dirpath x",
            "BatchSizeFinder",
            "BackboneFinetuning",
            "ModelPruning --trainer.callbacks.pruning_fn l1_unstructured",
        )
    ]
    + [
        (f"--trainer.callbacks+={LIGHTNING}.callbacks.EarlyStopping", "EarlyStopping needs a value for monitor"),
        (f"--trainer.callbacks+={LIGHTNING}.callbacks.Timer --trainer.callbacks.duration x", "Timer: `Timer(dura"),
        (f"--trainer.callbacks+={LIGHTNING}.Trainer", "trainer.callbacks"),
        ("--trainer.callbacks+=torch.nn.Linear", "trainer.callbacks"),
    ],
    "optimizers": [
        (f"--model.optimizer={TORCH}.{words}", f"model.optimizer cannot take a step here: {said}")
        for words, said in (
            ("LBFGS", "LBFGS.step() missing 1 required positional argument: 'closure'"),
            ("SparseAdam", "SparseAdam does not support dense gradients"),
            ("Muon", "Muon: Muon only supports 2D"),
            ("AdamW --model.optimizer.capturable true", "If capturable=True"),
            ("AdamW --model.optimizer.betas [2,3]", "AdamW: Invalid beta parameter"),
            ("AdamW --model.optimizer.lr -1", "AdamW: Invalid learning rate: -1"),
            ("SGD --model.optimizer.nesterov true", "SGD: Nesterov momentum requires a momentum"),
        )
    ]
    + [
        (
            "--model.optimizer=schedulefree.AdamWScheduleFree",
            "model.optimizer cannot take a step here: AdamWScheduleFree is schedule-free",
        ),
    ]
    + [
        ("--model.optimizer=torch.nn.Linear", "model.optimizer: 'torch.nn.Linear' names no class of Optimizer"),
        (f"--model.optimizer={TORCH}.AdamX", "AdamX"),
        (f"--model.optimizer={TORCH}.SGD --model.optimizer.momentun 0.9", "Did you mean momentum?"),
    ],
    "schedules": [
        (f"--model.lr_scheduler={TORCH}.lr_scheduler.{words}", f"model.lr_scheduler{said}")
        for words, said in (
            ("ReduceLROnPlateau", " cannot take a step here: ReduceLROnPlateau waits for a metric"),
            (
                "OneCycleLR --model.lr_scheduler.max_lr 1 --model.lr_scheduler.total_steps 1",
                " cannot take a step here: Tried",
            ),
            ("OneCycleLR --model.lr_scheduler.max_lr 1", " cannot take a step here: OneCycleLR: You must define"),
            ("StepLR --model.lr_scheduler.step_size 0", " cannot take a step here: integer modulo by zero"),
            ("CosineAnnealingLR --model.lr_scheduler.T_max 0", " cannot take a step here"),
            ("CosineAnnealingWarmRestarts --model.lr_scheduler.T_0 0", " cannot take a step here: Cosine"),
            ("LambdaLR --model.lr_scheduler.lr_lambda x", ".lr_lambda: 'x' is no class"),
            ("ConstantLR --model.lr_scheduler.factor 2", " cannot take a step here: ConstantLR: Constant"),
            ("SequentialLR", ": SequentialLR needs a value for schedulers, milestones"),
        )
    ]
    + [
        (
            f"--model.lr_scheduler={LIGHTNING}.cli.ReduceLROnPlateau --model.lr_scheduler.monitor=val/loss",
            "model.lr_scheduler cannot take a step here: ReduceLROnPlateau waits for a metric",
        ),
        ("--model.lr_scheduler=torch.nn.Linear", "model.lr_scheduler: "),
        (f"--model.lr_scheduler={TORCH}.lr_scheduler.StepLR --model.lr_scheduler.gama 1", "Did you mean gamma?"),
        (
            "--model.lr_scheduler=WarmupCosine --model.lr_scheduler.warmup_steps=-1",
            "warmup",
        ),
        (
            "--model.lr_scheduler=lightning_modules.schedules.WarmupCosine --model.lr_scheduler.warmup_steps=5 "
            "--model.lr_scheduler.total_steps=5",
            "WarmupCosine: warmup_steps 5 must be below total_steps 5",
        ),
    ],
    "losses": [
        (
            "--model.loss=torch.nn.CrossEntropyLoss",
            "model.loss: 'torch.nn.CrossEntropyLoss' names no class of Pair",
        ),
        ("--model.loss='{class_path: torch.nn.CrossEntropyLoss}'", "model.loss"),
        ("--model.loss=[SigmoidLoss]", "model.loss"),
        ("--model.loss=SimPOLoss --model.loss.gamma=x", "model.loss.gamma: must be a finite number from 0"),
        ("--model.loss='{class_path: SimPOLoss, init_args: {gamma: .nan}}'", "model.loss.gamma: must be"),
        ("--model.loss=SimPOLoss --model.loss.gama=1", "Did you mean gamma?"),
        ("--model.loss=RobustLoss --model.loss.flip_rate=0.5", "model.loss.flip_rate"),
    ],
    "the Trainer": [
        ("--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches has no place here"),
        ("--trainer.gradient_clip_val=1", "trainer.gradient_clip_val has no effect here: set model.max_grad_norm"),
        ("--trainer.precision=bf16-true", "trainer.precision bf16-true loses log-probabilities"),
        ("--trainer.precision=16-true", "trainer.precision 16-true loses log-probabilities"),
        ("--trainer.precision=transformer-engine", "trainer.precision transformer-engine loses log-probabilities"),
        ("--trainer.fast_dev_run=x", "trainer.fast_dev_run: expected a whole number or true or false"),
        ("--trainer.overfit_batches=-1", "trainer: You have passed invalid value -1 for overfit_batches"),
        ("--trainer.reload_dataloaders_every_n_epochs=-1", "reload_dataloaders_every_n_epochs"),
        ("--trainer.overfit_batches=1", "trainer.overfit_batches has no effect here"),
        ("--trainer.reload_dataloaders_every_n_epochs=1", "would repeat the order of the first epoch"),
        ("--trainer.max_time=x", "trainer: `Timer(duration='x')` is not a valid duration"),
        ("--trainer.profiler=foo", "`profiler`"),
        ("--trainer.plugins=foo", "trainer.plugins: 'foo' names no class"),
        ("--trainer.val_check_interval=1.5", "trainer: You have passed invalid value 1.5 for val_check_interval"),
        ("--trainer.barebones=true", "trainer.barebones has no place here"),
        ("--trainer.use_distributed_sampler=false", "trainer.use_distributed_sampler has no effect"),
        ("--trainer.model_registry=me/model", "trainer.model_registry has no effect here"),
        ("--trainer.plugins=lightning.pytorch.plugins.AsyncCheckpointIO", "a CheckpointIO has no place here"),
    ],
}


# --- model folders: what is done to a good one, and what the sentence says ------------------------------------


def described(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def written(name: str, text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    return change


def emptied(name: str, text: str = "x") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        written(name, text)(folder)

    return change


def without_weights(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = {name: weight for name, weight in load_file(file).items() if part not in name}
        save_file(weights, file, {"format": "pt"})

    return change


def stored(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change the tensors with `name` in their names."""

    def changed(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for key in weights:
            weights[key] = change(weights[key]) if name in key else weights[key]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return changed


def another(family: str, **settings: Any) -> Callable[[Path], None]:
    return lambda folder: tiny_model(family, **settings).save_pretrained(folder)


def halved(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


LLAMA4 = {"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}
OF_A_MODEL: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"weights of {method}": (
            described(quantization_config={"quant_method": method}),
            f"holds quantised weights ({method}), which cannot be trained: take the model",
        )
        for method in ("bitsandbytes", "gptq", "awq", "fp8", "unheard-of")
    },
    **{
        f"a {family}": (described(model_type=family), f"is a {family}, whose tokens attend to later ones")
        for family in ("t5", "bart", "whisper")
    },
    "a clip": (described(model_type="clip"), "model.name: cannot load"),
    "an unknown family": (described(model_type="nonesuch"), "model type `nonesuch`"),
    "llama4_text over Llama's weights": (described(model_type="llama4_text"), "lack model.layers.0.feed_forward."),
    "a llama4_text": (another("llama", **LLAMA4), "a llama4_text has no backbone without the head: choose another"),
    "text for a number": (described(hidden_size="many"), "'hidden_size' expected int, got str"),
    "heads that do not divide": (described(num_attention_heads=5), "not a multiple of the number of attention"),
    "an activation that is none": (described(hidden_act="foo"), "cannot load"),
    "another width": (described(hidden_size=64), "take a complete model, with its own config.json"),
    "another vocabulary": (described(vocab_size=50), "lm_head.weight ([116, 32] in the files, not [50, 32])"),
    "one layer more": (described(num_hidden_layers=3), "lack model.layers.2.input_layernorm.weight, "),
    "a list for a configuration": (written("config.json", "[1]"), "model.name: no model at"),
    "half a configuration": (written("config.json", "{"), "is not a valid JSON file"),
    "an empty configuration": (written("config.json", "{}"), "Should have a `model_type` key"),
    "no configuration": (written("config.json", None), "config.json and weights: give the folder of one"),
    "no weights": (written("model.safetensors", None), "no file named model.safetensors"),
    "half of the weights": (halved, "model.name: cannot load"),
    "no output head": (without_weights("lm_head"), "lack lm_head.weight, which would be random: take a complete"),
    "a layer lacking": (
        without_weights("layers.1."),
        "lack model.layers.1.input_layernorm.weight, model.layers.1.",
    ),
    "codes without their scales": (
        stored("mlp.up_proj", lambda w: (w * 9).to(torch.int8)),
        "up_proj.weight is I8), which cannot be trained: take the model that they were made from",
    ),
    "codes of eight bits with an exponent": (
        stored("down_proj", lambda w: w.to(torch.float8_e4m3fn)),
        "down_proj.weight is F8_E4M3)",
    ),
    "weights that were not fetched": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "model.safetensors is a pointer of Git LFS, not the file itself: fetch it by `git lfs pull`",
    ),
    "half a generation config": (written("generation_config.json", "{"), "is no generation config (Expecting"),
    "a stop that is no id": (
        written("generation_config.json", '{"eos_token_id": "</s>"}'),
        "its eos_token_id is '</s>'): correct or remove it",
    ),
    "a layer of NaN": (
        stored("layers.1.self_attn.q", lambda w: w * torch.nan),
        "model.layers.1.self_attn.q_proj.weight of ",
    ),
    "an output head with one infinite value": (
        stored("lm_head", lambda w: w.index_fill(0, torch.tensor(3), torch.inf)),
        "is not finite (NaN or infinite): take a sound copy",
    ),
    "a reward model": (save_reward_model, "they hold score.weight instead"),
    "adapters alone": (emptied("adapter_config.json", "{}"), "holds adapters alone: merge them into their model"),
    "adapters beside a model": (written("adapter_config.json", "{}"), "holds adapters alone: merge them"),
    "a log folder": (emptied("checkpoints/last.ckpt"), "/checkpoints/last.ckpt FOLDER` and give that FOLDER"),
    "a folder of checkpoints": (
        emptied("step=4.ckpt"),
        "is no model, a folder with config.json and weights: run `beta-dpo export ",
    ),
    "a folder of GGUF": (emptied("y.gguf"), "config.json and weights: run `beta-dpo convert "),
    "a folder above the model": (emptied("inner/config.json"), "config.json and weights: did you mean "),
    "an empty folder": (emptied("readme"), "is no model, a folder with config.json and weights"),
    "a GPT-2 of few positions": (
        another("gpt2", max_position_embeddings=16),
        "tokens, and this gpt2 has no more than 16 positions",
    ),
    "an OPT of few positions": (
        another("opt", max_position_embeddings=16),
        "this opt has no more than 16 positions",
    ),
    "a GPT-J of few positions": (
        another("gptj", max_position_embeddings=16),
        "this gptj has no more than 16 positions",
    ),
    "an MPT of few positions": (another("mpt", max_seq_len=16), "this mpt has no more than 16 positions: lower it"),
    "a model of few tokens": (another("llama", vocab_size=50), "data.tokenizer: its token 115 is beyond the 50"),
}
OF_ADAPTERS = [
    ("[q_proj, v_prj]", "target_modules: v_prj names no layer, or "),
    ("[q_proj, v_prj]", "did you mean v_proj, q_proj?"),
    ("[nonesuch]", "nonesuch names no layer"),
    ("[]", "an empty list names no layer"),
    ("q_proj", "write [q_proj]: text by itself is a pattern for whole names"),
    (".*q_prj", ".*q_prj names no layer"),
    ("(q_proj", "'(q_proj' is no pattern: missing )"),
    ("[mlp]", "mlp names no layer"),
    ("[lm_head]", "lm_head names no layer, or the output head, which stays as it is; there are "),
    ("1", "model.lora.target_modules"),
]
OF_A_RUN["adapters"] = [(f'--model.lora.target_modules="{names}"', said) for names, said in OF_ADAPTERS]
OF_A_RUN["adapters"] += [
    ("--model.lora.r 0", "model.lora.r: must be a whole number from 1"),
    ("--model.lora.lora_alpha nan", "model.lora.lora_alpha: must be"),
    ("--model.lora.rank_pattern '{q_prj: 8}'", "model.lora.rank_pattern: q_prj names no layer"),
    ("--model.lora.exclude_modules [vision_tower]", "model.lora.exclude_modules: vision_tower names no layer"),
    ("--model.lora.layers_to_transform [0,9]", "model.lora.layers_to_transform: 9 names no layer"),
    ("--model.lora.rank 8", "model.lora.rank: Lora has no such option"),
    ("--model.lora.target_parameters [experts.down_proj]", "fused experts are none, and target_modules names lay"),
    (
        "--model.lora.r 4 --trainer.strategy ShardedStrategy --trainer.strategy.tensor_parallel_size 2",
        "model.lora does not go with trainer.strategy's tensor_parallel_size above 1",
    ),
]
OF_A_RUN["validation intervals"] = [
    (
        "--trainer.val_check_interval 500",
        "trainer.val_check_interval is 500, but an epoch has 5 batches: set trainer.",
    ),
    ("--trainer.val_check_interval 6", "check_val_every_n_epoch: null, which counts the batches of all epochs"),
    ("--trainer.limit_train_batches 2", "trainer.val_check_interval is 3, but an epoch has 2 batches"),
    ("--trainer.limit_train_batches 0.4", "trainer.val_check_interval is 3, but an epoch has 2 batches"),
    ("--data.batch_size 40", "trainer.val_check_interval is 3, but an epoch has 2 batches"),
]
OF_A_RUN["data"] = [
    ("--data.pairs 0", "data.pairs: must be a whole number from 1"),
    ("--data.flip_rate 2", "data.flip_rate: must be"),
    ("--data.seed -1", "data.seed: must be"),
    ("--data.nonesuch 1", "data.nonesuch: ControlledTask has no such option"),
    ("--data.micro_batch_tokens 10", "data.micro_batch_tokens is 10, but the longest pair needs up to"),
    ("--data PreferenceData --data.path nowhere.jsonl", "nowhere.jsonl"),
    ("--data PreferenceData --data.path nowhere.jsonl --data.max_length 0", "data.max_length: must be"),
    ("--data PreferenceData --data.path config.yaml", "config.yaml"),
    ("--data Nope", "data: "),
]
SFT = "--model SupervisedFineTuning --model.name null --model.architecture"
OF_A_RUN["new models"] = [
    (f"{SFT} '{{hidden_size: 8}}'", "such as llama, and its settings): model_type is missing or empty"),
    (f"{SFT} '{{model_type: \"\"}}'", "such as llama, and its settings): model_type is missing or empty"),
    (f"{SFT} '{{model_type: nonesuch}}'", "model.architecture"),
    (
        f"{SFT} '{{model_type: llama, hidden_size: x}}'",
        "and its settings): Validation error for field 'hidden_size'",
    ),
    (f"{SFT} '{{model_type: llama, hidden_size: 33}}'", "model.architecture"),
    (
        f"{SFT} '{{model_type: llama, hidden_size: 32, num_attention_heads: 4, hidden_act: foo}}'",
        "model.architecture",
    ),
    (f"{SFT} '{{model_type: t5}}'", "model.architecture is a t5, whose tokens attend to later ones"),
    (f"{SFT} '{{model_type: llama, quantization_config: fp8}}'", "holds quantised weights (fp8)"),
    (f"{SFT} [1]", "model.architecture"),
    (f"{SFT} null", "Give either model.name"),
    ("--model SupervisedFineTuning --model.architecture '{model_type: llama}'", "Give either model.name"),
    ("--model.name nowhere/to/be/found", "no model at 'nowhere/to/be/found', for there is no such folder: make it"),
    ("--model.name ''", "model.name: '' is no model, a folder with config.json"),
    ("--model.name=null", "model: PreferenceOptimization needs a value for name"),
]


@pytest.fixture(scope="module")
def folder(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.yaml` of a run of two steps."""
    place = tmp_path_factory.mktemp("bad")
    write_config(place, tiny_llama)
    return place


def test_the_page_names_the_kinds() -> None:
    kinds = {**OF_A_RUN, "model folders": OF_A_MODEL}
    assert sum(map(len, kinds.values())) > 150
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [kind for kind in kinds if kind not in page.replace("\n", " ").partition("bad inputs:")[2]] == []


def some_of_each(place: int) -> list[pytest.MarkDecorator]:
    """Return the mark of a case: every third is in the fast suite, the others differ from it in words alone."""
    return [] if place % 3 == 0 else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(*case, id=f"{kind} {case[0]}", marks=some_of_each(place))
        for kind, cases in OF_A_RUN.items()
        for place, case in enumerate(cases)
    ],
)
def test_options_of_a_run(
    words: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert said in refusal([*FIT.split(), "--trainer.max_steps=2", *shlex.split(words)], capfd)
    assert not list((folder / "runs").rglob("*"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=some_of_each(place)) for place, case in enumerate(OF_A_MODEL)]
)
def test_model_folders(
    case: str,
    tiny_llama: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change, said = OF_A_MODEL[case]
    monkeypatch.chdir(folder)
    shutil.copytree(tiny_llama, tmp_path / "m")
    change(tmp_path / "m")
    sentence = refusal([*FIT.split(), "--trainer.max_steps=2", f"--model.name={tmp_path / 'm'}"], capfd)
    assert said in sentence
    assert sentence.startswith(("model.name: ", "data.", str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("suffix", "said"),
    [(".ckpt", "beta-dpo export"), (".gguf", "beta-dpo convert"), (".bin", "give the folder of one")],
)
def test_files_as_models(
    suffix: str, said: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file = tmp_path / f"m{suffix}"
    file.write_bytes(b"x")
    assert said in refusal(["fit", "--config", str(folder / "config.yaml"), f"--model.name={file}"], capfd)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            another("gpt2", max_position_embeddings=16),
            "max_prompt_length + max_new_tokens: the longest prompt with its response",
        ),
        (another("llama", vocab_size=50), "m: its token 77 is beyond the 50 that the model embeds"),
        (without_weights("lm_head"), "lack lm_head.weight"),
        (emptied("adapter_config.json", "{}"), "holds adapters alone"),
        (written("tokenizer.json", None), "model: no tokenizer at"),
    ],
)
def test_models_to_sample_from(
    change: Callable[[Path], None], said: str, tiny_llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    change(tmp_path / "m")
    assert said in refusal(["generate", str(tmp_path / "m"), str(tmp_path / "out.jsonl"), "--count", "2"], capfd)
    assert not (tmp_path / "out.jsonl").exists()
