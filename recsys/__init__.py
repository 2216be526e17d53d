"""Windowed partial AUC optimisation with hard negatives for LLM recommenders (arXiv 2604.22504).

What a person imports stands here; each name is loaded when it is first used, so that the metrics alone do not wait for
Lightning and ``transformers``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys.data import DataFrames, HistoryDataModule, MovieLens100K, PromptTemplate, Table
    from recsys.functional import group_advantages, tawin_advantages, windowed_partial_auc
    from recsys.metrics import NDCG, WPAUC, Recall
    from recsys.module import Recommender
    from recsys.objectives import GRPO, LLPAUC, SoftmaxAtK, SoftmaxDPO, SupervisedFineTuning, TAWin
    from recsys.policy import LLMPolicy, Lora, TinyPolicy
    from recsys.trained import TrainedRecommender
    from recsys.window import Window

__version__ = version("recsys-tawin")

_MODULES = {
    "recsys.data": ("DataFrames", "HistoryDataModule", "MovieLens100K", "PromptTemplate", "Table"),
    "recsys.functional": ("group_advantages", "tawin_advantages", "windowed_partial_auc"),
    "recsys.metrics": ("NDCG", "WPAUC", "Recall"),
    "recsys.module": ("Recommender",),
    "recsys.objectives": ("GRPO", "LLPAUC", "SoftmaxAtK", "SoftmaxDPO", "SupervisedFineTuning", "TAWin"),
    "recsys.policy": ("LLMPolicy", "Lora", "TinyPolicy"),
    "recsys.trained": ("TrainedRecommender",),
    "recsys.window": ("Window",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GRPO",
    "LLPAUC",
    "NDCG",
    "WPAUC",
    "DataFrames",
    "HistoryDataModule",
    "LLMPolicy",
    "Lora",
    "MovieLens100K",
    "PromptTemplate",
    "Recall",
    "Recommender",
    "SoftmaxAtK",
    "SoftmaxDPO",
    "SupervisedFineTuning",
    "TAWin",
    "Table",
    "TinyPolicy",
    "TrainedRecommender",
    "Window",
    "__version__",
    "group_advantages",
    "tawin_advantages",
    "windowed_partial_auc",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
