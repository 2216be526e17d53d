"""Metrics with state: thin ``torchmetrics.Metric`` classes around :mod:`recsys.functional`."""

from recsys.metrics.ranking import NDCG, Recall
from recsys.metrics.wpauc import WPAUC

__all__ = ["NDCG", "WPAUC", "Recall"]
