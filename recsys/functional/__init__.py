"""The mathematics as pure functions of tensors: metrics, advantages and losses."""

from recsys.functional.advantages import Gate, gate_open, group_advantages, tawin_advantages
from recsys.functional.partial_auc import (
    window_around,
    window_bounds,
    window_weights,
    windowed_partial_auc,
    won_share,
)
from recsys.functional.policy_loss import (
    kl_divergence,
    llpauc_loss,
    policy_loss,
    softmax_at_k_loss,
    softmax_dpo_loss,
)
from recsys.functional.ranking import Place, expected_rank, ndcg_at_k, place_positive, recall_at_k
from recsys.functional.sampling import sample_outside
from recsys.functional.schedule import linear_schedule

__all__ = [
    "Gate",
    "Place",
    "expected_rank",
    "gate_open",
    "group_advantages",
    "kl_divergence",
    "linear_schedule",
    "llpauc_loss",
    "ndcg_at_k",
    "place_positive",
    "policy_loss",
    "recall_at_k",
    "sample_outside",
    "softmax_at_k_loss",
    "softmax_dpo_loss",
    "tawin_advantages",
    "window_around",
    "window_bounds",
    "window_weights",
    "windowed_partial_auc",
    "won_share",
]
