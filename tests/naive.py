"""Independent references: one full row through the whole causal LM per item, no trie, no tree, no cache."""

from __future__ import annotations

import torch

from recsys.policy import Policy


def item_logprob(policy: Policy, prompt: list[int], sequences: list[list[int]], index: int, normalization: str):
    """Score of one item after one prompt: the sum over its tokens, by the definition of both distributions."""
    sequence = sequences[index]
    tokens = torch.tensor([prompt + sequence])
    logits = policy.model(input_ids=tokens).logits[0].float()
    total = logits.new_zeros(())
    for i, token in enumerate(sequence):
        at = logits[len(prompt) + i - 1]
        if normalization == "vocab":
            total = total + at.log_softmax(0)[token]
        else:
            legal = sorted({s[i] for s in sequences if s[:i] == sequence[:i] and len(s) > i})
            total = total + at[legal].log_softmax(0)[legal.index(token)]
    return total


def all_logprobs(policy: Policy, prompt: list[int], sequences: list[list[int]], normalization: str) -> torch.Tensor:
    """Scores of all items after one prompt, [M]."""
    return torch.stack([item_logprob(policy, prompt, sequences, i, normalization) for i in range(len(sequences))])
