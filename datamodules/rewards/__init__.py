"""Rewards of an external reward model, scored once and kept as label columns of the pairs."""

from datamodules.rewards.scores import RewardScoring, reward_scores
from datamodules.rewards.table import RewardedTable, rows_with_reward

__all__ = ["RewardScoring", "RewardedTable", "reward_scores", "rows_with_reward"]
