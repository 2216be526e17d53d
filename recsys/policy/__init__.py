"""Policies: causal language models whose log-probabilities rank items."""

from recsys.policy.base import Policy
from recsys.policy.llm import DEFAULT_MODEL, LLMPolicy, compute_dtype
from recsys.policy.lora import Lora
from recsys.policy.tiny import TinyPolicy, byte_tokenizer

__all__ = ["DEFAULT_MODEL", "LLMPolicy", "Lora", "Policy", "TinyPolicy", "byte_tokenizer", "compute_dtype"]
