"""What the rest of the package needs of a language model.

A policy is built in two steps, so that a wrong name fails before anything long starts: the tokenizer when the data
is prepared, the weights when the trainer knows its device. After :meth:`Policy.build` it offers the two halves of
the language model that the tree engine needs apart: the decoder (tokens to hidden states) and the output head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from recsys.policy.lora import Lora
from recsys.types import UserError


class Policy(nn.Module):
    """What the engine, the Lightning module and the callbacks need of a language model."""

    name: str
    lora: Lora | None
    model: Any  # PeftModel, or the causal LM itself where every weight is trained
    sharded = False  # whether each process holds a part of the base, see recsys/shard.py

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; loading it needs no weights."""
        raise NotImplementedError

    def load(self, device: torch.device) -> Any:
        """Return the causal language model that is trained, adapters included."""
        raise NotImplementedError

    def build(self, device: torch.device) -> None:
        """Load the weights and switch every dropout off, for training mode; does nothing the second time.

        The policy that finds a group is scored without dropout, so the one that is updated on it has to be, too: else
        their ratio is noise before anything has changed.

        Raises:
            UserError: if the head is not a linear layer that the engine can read, or is adapted: the engine applies its
                weight alone.
        """
        if hasattr(self, "model"):
            return
        self.model = self.load(device)
        switch_dropout_off(self.model)
        self.train()  # from_pretrained leaves a model in eval mode
        head = self.head
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            raise UserError(
                f"{self.name}: its output head is a {type(head).__name__}, not a plain linear layer; leave it out of "
                "the adapter's target_modules and modules_to_save, or use another model"
            )

    @property
    def causal_lm(self) -> Any:
        """The ``transformers`` model; PEFT puts its layers into it in place."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def head(self) -> nn.Linear:
        """The output head, ``weight [V, H]``."""
        return self.causal_lm.get_output_embeddings()

    def hidden(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the decoder: ``tokens [B, L]`` to the last hidden states ``[B, L, H]``.

        Args:
            tokens: ``[B, L]`` token ids.
            attention_mask: ``[B, 1, L, cached + L]`` bool, or None for causal attention.
            position_ids: ``[B, L]``, or None to count on from the cache.
            cache: Keys and values of what precedes; the new ones are appended to it.
        """
        decoder = self.causal_lm.base_model
        if attention_mask is not None and decoder.config._attn_implementation == "eager":  # it adds what it is given
            unseen = torch.finfo(self.head.weight.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=self.head.weight.dtype).masked_fill_(
                ~attention_mask, unseen
            )
        # The argument was renamed in the course of transformers 5; the old name warns at every call.
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
        return decoder(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            **{name: cache},
        ).last_hidden_state

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters (the adapter's, or all) by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters, for :meth:`using`."""
        return {name: p.detach().clone() for name, p in self.trainable().items()}

    @contextmanager
    def using(self, snapshot: dict[str, Tensor]) -> Iterator[None]:
        """Run the block with the parameters of ``snapshot``, then put the present ones back.

        Switching the adapter off would give the base model, which is not the policy that a run from a trained
        adapter or a warm start began with.
        """
        present = self.snapshot()
        self._copy(snapshot)
        try:
            yield
        finally:
            self._copy(present)

    @torch.no_grad()
    def _copy(self, snapshot: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable().items():
            parameter.copy_(snapshot[name])

    def num_parameters(self) -> tuple[int, int]:
        """Return the trained and the total number of weights; two 4-bit weights are packed in a byte."""
        trained = sum(p.numel() for p in self.trainable().values())
        total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in self.parameters())
        return trained, total

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's own format (the whole model where every weight is trained)."""
        options = {"save_embedding_layers": False} if self.lora else {}  # "auto" would ask the hub
        self.model.save_pretrained(str(directory), **options)


def switch_dropout_off(model: nn.Module) -> None:
    """Set every dropout of a ``transformers`` model and of its adapters to 0: layers, numbers in layers, config."""
    for owner in (*model.modules(), getattr(model, "config", None)):
        for name, value in list(vars(owner).items()) if owner is not None else []:
            is_rate = "drop" in name or (name == "p" and "Dropout" in type(owner).__name__)
            if is_rate and isinstance(value, float):
                setattr(owner, name, 0.0)
