"""The callbacks of β-DPO, those that record a run, and the named slots of a configuration for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar

from app.core.errors import UserError
from callbacks.control import CONTROLS, Control
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


@dataclass(frozen=True)
class Slot:
    """A slot for one callback; `name` is its key in a configuration, `kinds` are the classes made for it."""

    name: str
    kinds: tuple[type[Callback], ...]
    text: str  # its line in `fit --help`
    on: bool = False  # whether the first kind, with its default options, is the default

    @property
    def accepted(self) -> Any:
        """Return the type for jsonargparse: one of the kinds, a callback of the user's own, or null."""
        own = ProgressBar if self.kinds == (TextProgress,) else Callback
        return Union[(*self.kinds, own, None)]

    @property
    def default(self) -> dict[str, str] | None:
        return {"class_path": f"callbacks.{self.kinds[0].__name__}"} if self.on else None


# Those that change the step, in the order in which they run, but for `control`, which follows the slot that it
# controls. With all of them empty a run is plain DPO.
DECIDING = (
    Slot("reward", (ExplicitRewardGap,), "reward gap M from columns of the data; null: the policy's"),
    Slot("statistics", (RewardGapStatistics,), "running mean M0 and standard deviation σ of M"),
    Slot("filter", (PairFilter,), "which pairs of the batch are trained on; null: all"),
    Slot("schedule", (BetaScheduler, EpsilonBeta), "β of the step or of each pair; null: β0"),
    Slot("margin", (StandardisedMargin, GammaPOMargin, AMaPOMargin), "margin subtracted from each logit; null: 0"),
    Slot("confidence", (AnnotatorReliability,), "probability that each label is right; null: 1"),
    Slot("weights", (ReferenceWeights, LossWeights, ScoreWeights), "weight of each pair in the loss; null: 1"),
    Slot("control", (Control,), "breaks the link between one decision and its pairs; null: none"),
)
# after the user's trainer.callbacks, those that only observe
OBSERVING = (
    Slot("audit", (PairAudit,), "every pair of every step as parquet", on=True),
    Slot("dashboard", (BetaDashboard,), "charts, histograms and KL in TensorBoard", on=True),
    Slot("health", (HealthMonitor,), "warnings in the log, and a stop if asked for", on=True),
    Slot("samples", (PolicySamples,), "answers sampled at every validation"),
    Slot("scores", (ScoreWriter,), "the file that `predict` writes", on=True),
    Slot("checkpoint", (RunCheckpoint,), "checkpoints, and a clean stop at a signal", on=True),
    Slot("progress", (TextProgress,), "lines of progress; a bar on a terminal", on=True),
)
SLOTS = (*DECIDING, *OBSERVING)
BY_NAME = {slot.name: slot for slot in SLOTS}


def slot_of(kind: type) -> Slot | None:
    """Return the slot of a callback class; None for a callback of the user's own."""
    if issubclass(kind, ProgressBar):
        return BY_NAME["progress"]
    return next((slot for slot in SLOTS if issubclass(kind, slot.kinds)), None)


def in_order(filled: Mapping[str, Callback | None], own: Sequence[Callback] = ()) -> list[Callback]:
    """Return the callbacks that decide, the user's `own`, and those that observe. Raises UserError."""
    for name, callback in filled.items():
        right = slot_of(type(callback))
        if right is not None and right.name != name:
            raise UserError(f"{name}: {type(callback).__name__} belongs in the slot {right.name!r}.")
        if callback is not None and BY_NAME[name] in DECIDING and not hasattr(callback, "on_reward_gaps"):
            lacks = "has no method on_reward_gaps, so it would decide nothing"
            raise UserError(f"{name}: {type(callback).__name__} {lacks}.")
    control = filled.get("control")
    order = [slot.name for slot in DECIDING]
    if isinstance(control, Control):
        slots = CONTROLS[control.by][1]
        controlled = [name for name in slots if filled.get(name) is not None]
        if not controlled:
            cure = f"fill the slot {' or '.join(slots)}, or --control null"
            raise UserError(f"control: {control.by} has nothing to control: {cure}.")
        order.insert(order.index(controlled[-1]) + 1, order.pop())
    deciding = [one for name in order if (one := filled.get(name)) is not None]
    observing = [one for slot in OBSERVING if (one := filled.get(slot.name)) is not None]
    return [*deciding, *own, *observing]


def refuse_listed(kinds: Sequence[type]) -> None:
    """Raise UserError for a class of this project among the `kinds` that trainer.callbacks lists."""
    for kind in kinds:
        if slot := slot_of(kind):
            name = slot.name
            cure = f"`{name}: {{option: value}}` at the top of the configuration, or --{name}.OPTION VALUE"
            told = f"give {kind.__name__} to the slot {name!r} ({cure})"
            raise UserError(f"trainer.callbacks is for callbacks of your own: {told}.")


def entries(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the callbacks of a recorded configuration, also of version 0.1, as `class_path` and `init_args`."""
    own = (config.get("trainer") or {}).get("callbacks") or []
    yield from (entry for slot in DECIDING if (entry := config.get(slot.name)))
    yield from own if isinstance(own, list) else [own]
    yield from (entry for slot in OBSERVING if (entry := config.get(slot.name)) and slot.name != "scores")


def arguments(entry: Any) -> Mapping[str, Any]:
    """Return the `init_args` of a `class_path` entry; empty if there are none."""
    return (entry.get("init_args") if isinstance(entry, Mapping) else None) or {}
