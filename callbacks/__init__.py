"""The callbacks that turn DPO into β-DPO and those that record a run; `callbacks.slots` defines their order."""

from callbacks.control import Control
from callbacks.dashboard import BetaDashboard
from callbacks.dynamic_beta import BetaScheduler, EpsilonBeta, ExplicitRewardGap, PairFilter, RewardGapStatistics
from callbacks.health import HealthMonitor
from callbacks.margins import AMaPOMargin, GammaPOMargin, StandardisedMargin
from callbacks.pair_audit import PairAudit
from callbacks.policy_samples import PolicySamples
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.score_writer import ScoreWriter
from callbacks.text_progress import TextProgress
from callbacks.weights import AnnotatorReliability, LossWeights, ReferenceWeights, ScoreWeights
