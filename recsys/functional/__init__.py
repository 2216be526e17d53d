"""The mathematics as pure functions of tensors: metrics, advantages and losses."""

from recsys.functional.advantages import Gate, gate_open, group_advantages, tawin_advantages
from recsys.functional.partial_auc import window_around, window_bounds, window_weights, windowed_partial_auc
from recsys.functional.policy_loss import kl_divergence, policy_loss, softmax_dpo_loss
from recsys.functional.ranking import expected_rank, ndcg_at_k, recall_at_k

__all__ = [
    "Gate",
    "expected_rank",
    "gate_open",
    "group_advantages",
    "kl_divergence",
    "ndcg_at_k",
    "policy_loss",
    "recall_at_k",
    "softmax_dpo_loss",
    "tawin_advantages",
    "window_around",
    "window_bounds",
    "window_weights",
    "windowed_partial_auc",
]
