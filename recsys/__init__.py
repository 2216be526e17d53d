"""Windowed partial AUC optimisation with hard negatives for LLM recommenders (arXiv 2604.22504)."""

__version__ = "0.1.0"
