"""Bad inputs of every kind, each by the command itself: status 2, one sentence that names it, no traceback.

docs/reliability.md lists the kinds with their numbers; one test here compares.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_runs import write_config

from app.main import main

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
        ("--trainer.strategy=ShardedStrategy", "write {class_path: lightning_modules.ShardedStrategy}"),
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
        ("--model.optimizer=torch.nn.Linear", "model.optimizer: 'torch.nn.Linear' names no class of Optimizer"),
        (f"--model.optimizer={TORCH}.AdamX", "AdamX"),
        (f"--model.optimizer={TORCH}.SGD --model.optimizer.momentun 0.9", "Did you mean momentum?"),
    ],
    "schedules": [
        (f"--model.lr_scheduler={TORCH}.lr_scheduler.{words}", f"model.lr_scheduler{said}")
        for words, said in (
            ("ReduceLROnPlateau", " cannot take a step here: ReduceLROnPlateau waits for a metric"),
            ("OneCycleLR --model.lr_scheduler.max_lr 1 --model.lr_scheduler.total_steps 1", ": OneCycleLR ends"),
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
            "--model.lr_scheduler=lightning_modules.schedules.WarmupCosine --model.lr_scheduler.warmup_steps=-1",
            "warmup",
        ),
        (
            "--model.lr_scheduler=lightning_modules.schedules.WarmupCosine --model.lr_scheduler.warmup_steps=5 "
            "--model.lr_scheduler.total_steps=5",
            "WarmupCosine: warmup_steps 5 must be less than total_steps 5",
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
        ("--trainer.precision=transformer-engine", "trainer: "),
        ("--trainer.fast_dev_run=x", "trainer.fast_dev_run: expected a whole number or true or false"),
        ("--trainer.overfit_batches=-1", "trainer: You have passed invalid value -1 for overfit_batches"),
        ("--trainer.reload_dataloaders_every_n_epochs=-1", "reload_dataloaders_every_n_epochs"),
        ("--trainer.max_time=x", "trainer: `Timer(duration='x')` is not a valid duration"),
        ("--trainer.profiler=foo", "`profiler`"),
        ("--trainer.plugins=foo", "trainer.plugins: 'foo' names no class"),
        ("--trainer.val_check_interval=1.5", "trainer: You have passed invalid value 1.5 for val_check_interval"),
        ("--trainer.barebones=true", "trainer: `Trainer(barebones=True"),
    ],
}


@pytest.fixture(scope="module")
def folder(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.yaml` of a run of two steps."""
    place = tmp_path_factory.mktemp("bad")
    write_config(place, tiny_llama)
    return place


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence with which a command ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capfd.readouterr().err
    assert stop.value.code == 2, shown
    assert "Traceback" not in shown
    (sentence,) = [line for line in shown.splitlines() if line.startswith("beta-dpo: ")]
    return sentence.removeprefix("beta-dpo: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [pytest.param(*case, id=f"{kind} {case[0]}") for kind, cases in OF_A_RUN.items() for case in cases],
)
def test_options_of_a_run(
    words: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert said in refused([*FIT.split(), "--trainer.max_steps=2", *shlex.split(words)], capfd)
    assert not (folder / "runs").exists()
