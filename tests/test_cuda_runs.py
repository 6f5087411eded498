"""Every path of the product on the stand-in for a CUDA device: no mixed devices, results of the CPU, few waits."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import getmembers, isabstract, isclass
from pathlib import Path
from typing import Any

import cuda_ranks
import numpy as np
import pytest
import torch
from command_runs import run_ranks
from cuda_runs import Window, cuda_stand_in, cuda_trainer
from cuda_stand_in import CUDA, counted
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_runs import (
    Recorder,
    beta_dpo,
    controlled,
    predicted,
    preference,
    quiet_trainer,
    rarest_token,
    relative_difference,
    same_bits,
    save_reward_model,
    save_tiny_model,
    tiny_model,
    weights,
)

import callbacks as cb
from app.commands.sampling import generator_state, restore_generator, score
from app.core.errors import StepRefused
from app.core.samples import sample
from app.method import losses
from app.method.losses import KTOPairLoss, SimPOLoss
from app.method.pair_loss import PairLogps, PairLoss
from datamodules.controlled_task import build_tokenizer
from datamodules.rewards import RewardModel
from lightning_modules import SupervisedFineTuning
from lightning_modules.lora import Lora
from lightning_modules.pretrained import load_model
from lightning_modules.scorer import ResponseScorer

SEVERAL = {"micro_batch_tokens": 250}  # three micro-batches of ten pairs


@pytest.fixture(scope="module")
def shallow_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer: the stand-in takes its time for every operation, and a second layer does the same ones."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "shallow", num_hidden_layers=1)


def run(make: Callable[..., Any], folder: Path, module: Any, hooks: Sequence[Callback], **data: Any) -> Any:
    """Fit two steps on the trainer that `make` makes; returns it."""
    trainer = make(folder, hooks, max_steps=2)
    trainer.fit(module, controlled(20, **data))
    return trainer


def on_the_host(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in weights(module).items()}


# name: callbacks, data, model
RUNS: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any], dict[str, Any]]] = {
    "one micro-batch": (beta_dpo, {}, {}),
    "several": (beta_dpo, SEVERAL, {}),
    "plain, several": (list, SEVERAL, {}),
    "sdpa": (beta_dpo, SEVERAL, {"attention": "sdpa"}),
    "eager": (beta_dpo, SEVERAL, {"attention": "eager"}),
    "pairwise": (beta_dpo, SEVERAL, {"attention": "pairwise"}),
    "separate": (beta_dpo, SEVERAL, {"attention": "sdpa", "layout": "separate"}),
    "cached": (beta_dpo, SEVERAL, {"reference": "cached"}),
    "checkpointing": (beta_dpo, SEVERAL, {"gradient_checkpointing": True}),
    "no reference": (beta_dpo, SEVERAL, {"loss": SimPOLoss()}),
    "a loss of the batch": (list, SEVERAL, {"loss": KTOPairLoss()}),
    "LoRA": (lambda: [cb.EpsilonBeta()], {}, {"lora": Lora(r=2)}),
    "ε-DPO": (lambda: [cb.EpsilonBeta()], SEVERAL, {}),
    "weights and margin": (
        lambda: [cb.RewardGapStatistics(), cb.StandardisedMargin(), cb.ReferenceWeights()],
        SEVERAL,
        {},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_on_the_cpu(name: str, shallow_llama: str, tmp_path: Path) -> None:
    hooks, data, settings = RUNS[name]
    torch.manual_seed(0)  # of the adapters
    expected = preference(shallow_llama, **settings)
    run(quiet_trainer, tmp_path, expected, hooks(), **data)
    with cuda_stand_in() as device:
        torch.manual_seed(0)
        seen = preference(shallow_llama, **settings)
        run(cuda_trainer, tmp_path, seen, hooks(), **data)
    assert device.violations == []
    assert seen.policy.attention == settings.get("attention", "flex")
    assert seen.policy.layout == settings.get("layout", "packed")
    assert relative_difference(on_the_host(expected), on_the_host(seen)) < 1e-5


# what a step may wait for: the gaps of all pairs, the gradient norm, and where pairs are dropped after their
# forward pass, the tokens that have a gradient
GATHER = ("to host", "to", "lightning_modules/measuring.py:reduce")
NORM = ("wait", "item", "lightning_modules/sharding.py:clip_gradients")
HEAD = ("wait", "nonzero", "lightning_modules/scorer.py:backward")


def everything(folder: Path) -> list[Callback]:
    return [
        *beta_dpo(),
        cb.PairAudit(),
        cb.BetaDashboard(histogram_every_n_steps=1, kl_every_n_steps=1),
        cb.HealthMonitor(),
        cb.PolicySamples(prompts=1, max_new_tokens=2),
        cb.RunCheckpoint(dirpath=str(folder / "c")),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the stand-in counts waits")
@pytest.mark.parametrize(
    ("hooks", "data", "expected"),
    [
        (lambda folder: beta_dpo(), {}, {GATHER: 1, NORM: 1, HEAD: 1}),
        (lambda folder: beta_dpo(), SEVERAL, {GATHER: 1, NORM: 1}),
        (lambda folder: [], SEVERAL, {GATHER: 1, NORM: 1}),
        (lambda folder: [cb.EpsilonBeta()], {}, {GATHER: 2, NORM: 1, HEAD: 1}),
        (everything, SEVERAL, {GATHER: 2, NORM: 1}),  # the KL is a second exchange
    ],
    ids=["one micro-batch", "several", "plain", "epsilon", "every callback"],
)
def test_the_host_waits_for_little(
    hooks: Any, data: dict[str, Any], expected: dict[Any, int], shallow_llama: str, tmp_path: Path
) -> None:
    with cuda_stand_in() as device:
        window = Window(device)
        logger = TensorBoardLogger(tmp_path, version="")
        settings = {"logger": logger, "limit_val_batches": 1, "val_check_interval": 1, "enable_checkpointing": True}
        trainer = cuda_trainer(tmp_path, [*hooks(tmp_path), window], "bf16-mixed", max_steps=2, **settings)
        trainer.fit(preference(shallow_llama), controlled(20, **data))
    assert device.violations == []
    assert counted(window.waits) == expected


class EvaluationWindow(Window):
    # the hooks of an evaluation are given other arguments, and none of these reads one
    on_validation_batch_start = on_predict_batch_start = Window.on_train_batch_start  # type: ignore[assignment]
    on_validation_batch_end = on_predict_batch_end = Window.on_train_batch_end  # type: ignore[assignment]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the stand-in counts waits")
def test_evaluation_waits_once_a_batch(shallow_llama: str, tmp_path: Path) -> None:
    stages = {"preference": preference(shallow_llama), "sft": SupervisedFineTuning(shallow_llama)}
    seen = {}
    with cuda_stand_in() as device:
        for name, module in stages.items():
            window = EvaluationWindow(device)
            writer = cb.ScoreWriter(str(tmp_path / "scores.parquet"))
            trainer = cuda_trainer(tmp_path, [window, writer], limit_val_batches=3, limit_predict_batches=3)
            trainer.validate(module, controlled(20, batch_size=2), verbose=False)
            seen[name] = counted(window.waits)
            if name == "preference":
                trainer.predict(module, controlled(20, batch_size=2))
                seen["predict"] = counted(window.waits)
    assert device.violations == []
    assert seen == {"preference": {GATHER: 1}, "predict": {GATHER: 1}, "sft": {GATHER: 1}}


def test_stages(shallow_llama: str, tmp_path: Path) -> None:
    """SFT, predict, validate and test as on the CPU."""
    with cuda_stand_in() as device:
        sft = [SupervisedFineTuning(shallow_llama, optimizer=torch.optim.SGD) for _ in range(2)]
        losses = []
        for make, module in zip((quiet_trainer, cuda_trainer), sft, strict=True):
            trainer = make(tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=1)
            trainer.fit(module, controlled(20, **SEVERAL))
            losses.append(float(trainer.callback_metrics["val/loss"]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        scores, figures = [], []
        for make in (quiet_trainer, cuda_trainer):
            trainer = make(tmp_path, limit_val_batches=1, limit_test_batches=1)
            data = controlled(10, **SEVERAL)
            scores.append(predicted(trainer, preference(shallow_llama), data, "policy_chosen_logp"))
            trainer.validate(preference(shallow_llama), controlled(10, **SEVERAL), verbose=False)
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            trainer.test(preference(shallow_llama), controlled(10, **SEVERAL), verbose=False)
            figures.append(found | {name: float(value) for name, value in trainer.callback_metrics.items()})
        torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-4)
        assert figures[1] == pytest.approx(figures[0], abs=1e-4)
    assert device.violations == []


@pytest.mark.parametrize("settings", [{}, {"lora": Lora(r=2)}], ids=["all weights", "LoRA"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    settings: dict[str, Any], shallow_llama: str, tmp_path: Path
) -> None:
    with cuda_stand_in() as device:
        runs = []
        for _ in range(3):
            torch.manual_seed(0)  # of the adapters
            runs.append(preference(shallow_llama, **settings))
        whole, first, second = runs
        data = {"batch_size": 5}
        torch.manual_seed(0)
        cuda_trainer(tmp_path, beta_dpo(), max_steps=3).fit(whole, controlled(20, **data))
        checkpoint = cb.RunCheckpoint(dirpath=str(tmp_path / "c"))
        torch.manual_seed(0)
        saving = cuda_trainer(tmp_path, [*beta_dpo(), checkpoint], enable_checkpointing=True, max_steps=2)
        saving.fit(first, controlled(20, **data))
        last = str(tmp_path / "c" / "last.ckpt")
        cuda_trainer(tmp_path, beta_dpo(), max_steps=3).fit(second, controlled(20, **data), ckpt_path=last)
        assert same_bits(on_the_host(whole), on_the_host(second))
    assert device.violations == []


CONCRETE = [one for _, one in getmembers(losses, isclass) if issubclass(one, PairLoss) and not isabstract(one)]


@pytest.mark.parametrize("loss", CONCRETE, ids=lambda loss: loss.__name__)
def test_losses_of_pairs_on_the_device_are_those_of_the_cpu(loss: Any) -> None:
    made = loss().with_sft(0.5)
    values = torch.linspace(-40, -10, 24, dtype=torch.float64).view(6, 4)[:, torch.tensor([2, 0, 3, 1])]
    found = []
    with cuda_stand_in() as device:
        for kind in ("cpu", "cuda"):
            leaf = values[:2].to(kind).requires_grad_()
            logps = PairLogps(*leaf, *values[2:4].to(kind), *(-values[4:].to(kind)).long())
            everyone = PairLogps(*values[:4], *(-values[4:]).long())
            margin = torch.full((4,), 0.1).to(kind) if made.takes_margin else None
            pair_losses = made.for_batch(everyone)(logps, torch.full((4,), 0.1).to(kind), margin)
            pair_losses.sum().backward()
            assert leaf.grad is not None
            found.append((pair_losses.detach().cpu(), made.discrepancy(logps).detach().cpu(), leaf.grad.cpu()))
        assert device.violations == []
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_a_reward_model_scores_as_on_the_cpu(tmp_path: Path) -> None:
    model = RewardModel(save_reward_model(tmp_path), batch_size=2, device="cpu")
    prompts, responses = ["my tiger", "my home", "can you"], [" yes .", " no", " the tiger has colour"]
    expected = list(model.rewards(prompts, responses))
    with cuda_stand_in() as device:
        model.device = CUDA
        model.model = model.model.to("cuda")
        assert list(model.rewards(prompts, responses)) == pytest.approx(expected, abs=1e-5)
    assert device.violations == []


def test_generation(shallow_llama: str) -> None:
    prompts = [np.array([5, 6, 7]), np.array([5, 6, 7, 8, 9])]
    sampling = {"max_new_tokens": 4, "do_sample": True, "top_k": 0}
    found: list[tuple[str, list[list[int]], list[float]]] = []
    for kind in ("cpu", "cuda"):
        with cuda_stand_in() as device:
            model = load_model(shallow_llama).eval().to(kind)
            restore_generator(found[0][0] if found else generator_state(model.device), model.device)
            state = generator_state(model.device)
            responses = sample(model, prompts, [build_tokenizer().eos_token_id], sampling)
            found.append((state, [response.tolist() for response in responses], score(model, prompts, responses)))
        assert device.violations == []
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with an infinite embedding for a token that one training pair alone holds."""
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[rarest_token()] = math.inf
    folder = tmp_path_factory.mktemp("spoilt")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("hooks", [beta_dpo, list], ids=["beta-DPO", "plain"])
def test_a_pair_that_is_not_finite(
    hooks: Any, spoilt: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    with cuda_stand_in() as device, caplog.at_level(logging.WARNING, logger="lightning_modules"):
        for make in (quiet_trainer, cuda_trainer):
            module = preference(spoilt)
            run(make, tmp_path, module, hooks(), **SEVERAL)
            assert module.nonfinite_pairs == 1
            found.append({n: t for n, t in on_the_host(module).items() if "embed_tokens" not in n})
        module = preference(spoilt, max_nonfinite_share=0.0)
        with pytest.raises(StepRefused, match="1 of 10 pairs"):
            run(cuda_trainer, tmp_path, module, hooks(), **SEVERAL)
    assert device.violations == []
    assert caplog.text.count("gap, left out") == 2
    assert relative_difference(*found) < 1e-5


def test_plain_dpo_scores_the_policy_once(
    shallow_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a callback that needs the gaps there is no measuring pass; the numbers are those with one."""

    class NeedsTheGaps(Callback):
        def on_reward_gaps(self, *_: object) -> None:
            pass

    passes: list[bool] = []
    forward = ResponseScorer.forward

    def counting(scorer: ResponseScorer, *args: Any, **settings: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return forward(scorer, *args, **settings)

    monkeypatch.setattr(ResponseScorer, "forward", counting)
    found: list[tuple[dict[str, torch.Tensor], dict[str, float]]] = []
    counts = []
    # an observer is told the decision, and asks for no pass
    for hooks in ([cb.PairAudit()], [NeedsTheGaps()]):
        module = preference(shallow_llama)
        trainer = run(quiet_trainer, tmp_path / str(len(found)), module, hooks, **SEVERAL)
        counts.append(Counter(passes))
        passes.clear()
        found.append((weights(module), {n: float(v) for n, v in trainer.callback_metrics.items()}))
    assert counts[0][True] == counts[1][True]
    assert counts[1][False] - counts[0][False] == counts[0][True]  # the policy's measuring pass
    assert relative_difference(found[0][0], found[1][0]) < 1e-6
    for name in ("train/loss", "gap/mean", "train/reward_accuracy", "train/grad_norm"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], rel=1e-5)
    assert list((tmp_path / "0" / "audit").glob("*.parquet"))


def test_rounding_selects_nobody(shallow_llama: str, tmp_path: Path) -> None:
    """A cached reference that another kernel made: σ is all rounding, and the first draw is uniform."""
    recorder = Recorder()

    class Rounded(Callback):
        def on_reward_gaps(self, trainer: Any, pl_module: Any, decision: Any) -> None:
            noise = torch.linspace(-0.1, 0.1, len(decision.gaps), dtype=torch.float64)  # σ = .06
            decision.discrepancy = decision.gaps + noise

    for precision in ("bf16-mixed", "32-true"):
        with cuda_stand_in():
            trainer = cuda_trainer(tmp_path, [Rounded(), *beta_dpo(), recorder], precision, max_steps=1)
            trainer.fit(preference(shallow_llama), controlled(10))
        assert float(trainer.callback_metrics["gap/too_close"]) == (precision == "bf16-mixed")
    rounded, exact = (decision.log_weights for decision in recorder.decisions)
    assert rounded is not None
    assert rounded.unique().tolist() == [0.0]
    assert exact is not None
    assert len(exact.unique()) > 1


def test_two_ranks_are_one_process_on_the_cpu(shallow_llama: str, spoilt: str, tmp_path: Path) -> None:
    """DDP: the exchanges, the cache under Lightning's default device, and a step whose gradients are taken back."""
    run_ranks(Path(cuda_ranks.__file__), str(tmp_path), shallow_llama, spoilt, logs=tmp_path)
    for name, (hooks, settings) in cuda_ranks.RUNS.items():
        module = preference(spoilt if settings.get("spoilt") else shallow_llama)
        run(quiet_trainer, tmp_path, module, hooks(), **cuda_ranks.DATA)
        found = torch.load(tmp_path / f"{name}.pt")
        ours, theirs = ({n: t for n, t in w.items() if "embed_tokens" not in n} for w in (weights(module), found))
        assert relative_difference(ours, theirs) < 1e-5, name
