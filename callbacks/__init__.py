"""The callbacks that turn DPO into β-DPO and those that record a run; `callbacks.slots` defines their order."""

from callbacks.annotator_reliability import AnnotatorReliability
from callbacks.beta_scheduler import BetaScheduler
from callbacks.control import Control
from callbacks.dashboard import BetaDashboard
from callbacks.epsilon_beta import EpsilonBeta
from callbacks.explicit_reward_gap import ExplicitRewardGap
from callbacks.health_monitor import HealthMonitor
from callbacks.loss_weights import LossWeights, ScoreWeights
from callbacks.margins import AMaPOMargin, GammaPOMargin, StandardisedMargin
from callbacks.pair_audit import PairAudit
from callbacks.pair_filter import PairFilter
from callbacks.policy_samples import PolicySamples
from callbacks.reference_weights import ReferenceWeights
from callbacks.reward_gap_statistics import RewardGapStatistics
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.score_writer import ScoreWriter
from callbacks.text_progress import TextProgress

__all__ = [
    "AMaPOMargin",
    "AnnotatorReliability",
    "BetaDashboard",
    "BetaScheduler",
    "Control",
    "EpsilonBeta",
    "ExplicitRewardGap",
    "GammaPOMargin",
    "HealthMonitor",
    "LossWeights",
    "PairAudit",
    "PairFilter",
    "PolicySamples",
    "ReferenceWeights",
    "RewardGapStatistics",
    "RunCheckpoint",
    "ScoreWeights",
    "ScoreWriter",
    "StandardisedMargin",
    "TextProgress",
]
