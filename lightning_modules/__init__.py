"""The two training stages as LightningModules, supervised fine-tuning and preference optimisation."""

from lightning_modules.preference import PreferenceOptimization
from lightning_modules.schedules import WarmupCosine
from lightning_modules.sft import SupervisedFineTuning
from lightning_modules.sharding import ShardedStrategy

__all__ = ["PreferenceOptimization", "ShardedStrategy", "SupervisedFineTuning", "WarmupCosine"]
