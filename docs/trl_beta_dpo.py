"""β-DPO in TRL's `DPOTrainer` (1.16): dynamic β and the filter through `app.method`, M0 and σ in TRL's checkpoints.

    trainer = BetaDPOTrainer(model, args=DPOConfig(output_dir="out", beta=0.1, …), train_dataset=pairs, …)

What it cannot have there, and `beta-dpo fit` has: one β, one kept set and one update of M0 and σ per optimizer
step (with `gradient_accumulation_steps` above 1 there is one of each per micro-batch); no backward pass for
dropped pairs (they stand in the rows that TRL has forwarded: their loss is left out, their cost is not); rewards
in the log, the packed forward, the audit. Over several processes the gaps are gathered, so that all use the same
β; that has not been run. Evaluation is TRL's, at β0.
"""

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import DPOTrainer

from app.method.dynamic_beta import (
    RunningMoments,
    batch_beta,
    gaussian_log_weights,
    gumbel_top_k,
    number_kept,
    selection_noise,
)
from app.method.losses import SigmoidLoss
from app.method.pair_loss import PairLogps


class RewardGapMoments(TrainerCallback, ExportableState):
    """M0 and σ. A callback, because the Trainer puts the state of callbacks into its checkpoints and back."""

    def __init__(self, momentum: float = 0.9):
        self.running = RunningMoments(momentum=momentum)

    def state(self) -> dict:
        return {"args": {"momentum": self.running.momentum}, "attributes": {"numbers": self.running.state_dict()}}

    numbers = property(fset=lambda self, numbers: self.running.load_state_dict(numbers))


class BetaDPOTrainer(DPOTrainer):
    """`DPOConfig.beta` is β0; the other settings are those of `PairFilter` and `BetaScheduler`."""

    def __init__(self, *args, alpha=0.6, keep_ratio=0.8, floor=0.01, momentum=0.9, **settings):
        super().__init__(*args, **settings)
        self.alpha, self.keep_ratio, self.floor = alpha, keep_ratio, floor
        self.args.restore_callback_states_from_checkpoint = True
        self.add_callback(RewardGapMoments(momentum))

    def _compute_loss(self, model, inputs, return_outputs):
        if return_outputs or not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        pairs = self.pair_logps(model, inputs)
        gaps = self.accelerator.gather(pairs.reward_gap.detach()).double().cpu()
        running = next(c for c in self.callback_handler.callbacks if isinstance(c, RewardGapMoments)).running
        noise = selection_noise(self.args.seed, running.mean_updates, len(gaps))
        moments = running.update(gaps)
        k = number_kept(len(gaps), self.keep_ratio)
        kept = gumbel_top_k(gaussian_log_weights(gaps, moments), k, noise)
        beta = batch_beta(self.beta, self.alpha, gaps[kept], moments).clamp(min=self.beta * self.floor)
        for name, value in {"beta/used": beta, "gap/running_mean": moments.mean, "gap/mean": gaps.mean()}.items():
            self._metrics["train"][name].append(float(value))
        processes = self.accelerator.num_processes
        own = kept.chunk(processes)[self.accelerator.process_index].to(pairs.policy_chosen.device)
        return SigmoidLoss()(pairs.select(own), beta.to(pairs.policy_chosen)).sum() * processes / k

    def pair_logps(self, model, inputs) -> PairLogps:
        """Summed log-probabilities by TRL's own forward passes; a batch is the chosen rows, then the rejected."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        policy = model(**rows, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1).chunk(2)
        reference = self.compute_ref_log_probs(self.ref_model or model, inputs)
        return PairLogps(*policy, *reference, *inputs["completion_mask"].sum(1).chunk(2))
