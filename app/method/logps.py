"""The log-probabilities of preference pairs, and the gaps that losses and statistics use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PairLogps:
    """The log-probabilities of B pairs, in nats, summed over response tokens (end-of-turn included, no prompt)."""

    policy_chosen: Tensor  # [B] log π(y_w|x)
    policy_rejected: Tensor  # [B] log π(y_l|x)
    reference_chosen: Tensor | None  # [B] log π_ref(y_w|x); None without a reference
    reference_rejected: Tensor | None  # [B] log π_ref(y_l|x)
    chosen_tokens: Tensor  # [B] int, |y_w|
    rejected_tokens: Tensor  # [B] int, |y_l|

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return log π − log π_ref of chosen and rejected responses, [B] each; ValueError without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this quantity needs the reference's log-probabilities, and there are none")
        return self.policy_chosen - self.reference_chosen, self.policy_rejected - self.reference_rejected

    @property
    def reward_gap(self) -> Tensor:
        """Return h [B], the chosen minus the rejected log-ratio."""
        chosen, rejected = self.log_ratios
        return chosen - rejected

    @property
    def normalised_reward_gap(self) -> Tensor:
        """Return h [B] with each log-ratio divided by its token count."""
        chosen, rejected = self.log_ratios
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    @property
    def reference_margin(self) -> Tensor | None:
        """Return log π_ref(y_w|x)/|y_w| − log π_ref(y_l|x)/|y_l| [B], nats per token; None without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            return None
        return self.reference_chosen / self.chosen_tokens - self.reference_rejected / self.rejected_tokens

    @property
    def finite(self) -> Tensor:
        """Return [B] bool: whether all log-probabilities of a pair are finite."""
        return torch.stack([torch.isfinite(column) for column in vars(self).values() if column is not None]).all(0)

    @property
    def normalised_gap(self) -> Tensor:
        """Return log π(y_w|x)/|y_w| − log π(y_l|x)/|y_l| [B], nats per token; needs no reference."""
        return self.policy_chosen / self.chosen_tokens - self.policy_rejected / self.rejected_tokens

    def swapped(self) -> PairLogps:
        """Return the same pairs with the rejected response in the place of the chosen one."""
        policy, tokens = (self.policy_rejected, self.policy_chosen), (self.rejected_tokens, self.chosen_tokens)
        return PairLogps(*policy, self.reference_rejected, self.reference_chosen, *tokens)

    def select(self, index: Tensor) -> PairLogps:
        """Return the pairs at `index`: int64 positions or a bool mask [B]."""
        return self._with_each(lambda column: column[index])

    def detach(self) -> PairLogps:
        """Return the same values without a graph."""
        return self._with_each(Tensor.detach)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> PairLogps:
        columns: dict[str, Any] = {name: None if c is None else change(c) for name, c in vars(self).items()}
        return PairLogps(**columns)

    @staticmethod
    def cat(parts: Sequence[PairLogps]) -> PairLogps:
        """Return all pairs of `parts`, which all have a reference or all have none, in order."""
        columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        joined: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
        return PairLogps(**joined)


def token_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return KL(π‖π_ref) of the next-token distributions given by two sets of logits [N, V]: [N], in nats."""
    ours, fixed = (torch.log_softmax(part, dim=-1) for part in (logits, reference_logits))
    return F.kl_div(fixed, ours, reduction="none", log_target=True).sum(dim=-1)  # torch's order: the policy second
