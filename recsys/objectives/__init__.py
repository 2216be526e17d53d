"""What a phase of training optimises: supervised fine-tuning, or a loss on groups (a positive and n negatives)."""

from recsys.objectives.base import (
    Counts,
    GroupObjective,
    Objective,
    ScoredGroups,
    StepContext,
    SupervisedFineTuning,
)
from recsys.objectives.policy import GRPO, TAWin
from recsys.objectives.rivals import LLPAUC, SoftmaxAtK, SoftmaxDPO

__all__ = [
    "GRPO",
    "LLPAUC",
    "Counts",
    "GroupObjective",
    "Objective",
    "ScoredGroups",
    "SoftmaxAtK",
    "SoftmaxDPO",
    "StepContext",
    "SupervisedFineTuning",
    "TAWin",
]
