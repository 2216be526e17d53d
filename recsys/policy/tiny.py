"""A small model with random weights, and a tokenizer that needs no file."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from recsys.paths import NameOrFolder
from recsys.policy.base import Policy
from recsys.policy.llm import LLMPolicy
from recsys.policy.lora import Lora, add_adapter
from recsys.types import UserError


class TinyPolicy(Policy):
    """A small Llama with random weights, every weight trained: for tests and for experiments on a CPU.

    Args:
        hidden_size: H; a multiple of twice ``heads``.
        layers: Number of decoder layers.
        heads: Number of attention heads.
        seed: Of the random weights, apart from the run's own seed.
        lora: Train adapters of this shape in place of all weights.
        tokenizer: Model whose tokenizer it takes, as :class:`LLMPolicy` names models; null has one token per byte.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 2,
        seed: int = 0,
        lora: Lora | None = None,
        tokenizer: NameOrFolder | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"hidden_size": hidden_size, "layers": layers, "heads": heads}.items():
            if value < 1:
                raise UserError(f"model.policy: {name} must be at least 1, but it is {value}")
        if hidden_size % (2 * heads):
            raise UserError(
                f"model.policy: hidden_size must be a multiple of twice heads, {2 * heads}, but it is {hidden_size}"
            )
        if lora is not None:
            lora.check()
        self.name = f"tiny-llama-{hidden_size}x{layers}-seed{seed}"
        self.tokenizer_of = tokenizer
        self.hidden_size = hidden_size
        self.layers = layers
        self.heads = heads
        self.seed = seed
        self.lora = lora

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of ``tokenizer``, or one token per byte and an end token."""
        return byte_tokenizer() if self.tokenizer_of is None else LLMPolicy(self.tokenizer_of).tokenizer

    def load(self, device: torch.device) -> Any:
        """Make the model from its seed; the run's random state is left as it was."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4096,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(config).to(device)
            return add_adapter(model, self.lora) if self.lora else model


def byte_tokenizer() -> Any:
    """Return a ``transformers`` tokenizer with the 256 bytes and ``<|end|>`` as its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
