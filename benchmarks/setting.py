"""What the benchmarks of the engine share: the default policy with real titles and prompts, and exact scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers.utils.logging import disable_progress_bar

from recsys.data import Catalog, HistoryDataModule, MovieLens100K, PromptEncoder, PromptTemplate
from recsys.policy import LLMPolicy
from recsys.tree import Places
from recsys.trie import Trie


@dataclass
class Setting:
    """A policy on its device, a catalogue, and a few users' prompts."""

    policy: LLMPolicy
    items: list[list[int]]  # token ids of each title, its end included
    prompts: list[list[int]]
    targets: list[int]  # what each user chose next

    @classmethod
    def make(cls, users: int, history: int, joined: int, dtype: str) -> Setting:
        """Load MovieLens-100K and the default 4-bit policy, on the GPU if there is one.

        Args:
            users: Prompts.
            history: Titles in a prompt.
            joined: Titles of MovieLens-100K that make one title, for a catalogue of longer ones.
            dtype: Compute type of the policy.
        """
        disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy = LLMPolicy(dtype=dtype)
        template = PromptTemplate(max_history=history, max_tokens=4000)
        data = HistoryDataModule(MovieLens100K(), template)
        data.load()
        titles = np.array(data.catalog.titles)
        others = np.random.default_rng(0).integers(len(titles), size=(joined - 1, len(titles)))
        long = ["; ".join(row) for row in np.concatenate([titles[None], titles[others]]).T.tolist()]
        items = Catalog(data.catalog.item_ids, long).tokenize(policy.tokenizer, template.end)
        encoder = PromptEncoder(policy.tokenizer, items, template)
        rows = data.histories.val[:: len(data.histories.val) // users][:users]
        prompts = [encoder.encode(data.histories.history(row, history)).tokens for row in rows]
        policy.build(device)
        policy.eval()
        return cls(policy, items, prompts, data.histories.items[rows].tolist())

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.head.weight.device

    def trie(self) -> Trie:
        """Return the catalogue's trie on the policy's device."""
        return Trie.from_sequences(self.items).to(self.device)

    def prompt(self, user: int) -> tuple[torch.Tensor, Places]:
        """Return one user's prompt as a batch of one, tokens ``[1, L]``, and its end."""
        tokens = torch.tensor([self.prompts[user]], device=self.device)
        return tokens, Places.ends(torch.tensor([tokens.shape[1]], device=self.device))

    def __str__(self) -> str:
        lengths = [len(sequence) for sequence in self.items], [len(prompt) for prompt in self.prompts]
        return (
            f"{self.device}, {torch.get_num_threads()} threads, {self.policy.dtype}: {len(self.items)} titles of "
            f"{np.mean(lengths[0]):.1f} tokens, {len(self.prompts)} prompts of {np.mean(lengths[1]):.0f} tokens"
        )


class Exact:
    """Scores by definition: a full row through a float64 copy of the policy, its 4-bit weights unpacked."""

    def __init__(self, setting: Setting) -> None:
        self.items = setting.items
        base = copy.deepcopy(setting.policy.model).unload()  # a new adapter adds nothing
        for name, layer in list(base.named_modules()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight.data = weight
                if layer.bias is not None:
                    plain.bias.data = layer.bias.data
                base.set_submodule(name, plain)
        self.model = base.double()

    @torch.no_grad()
    def score(self, prompt: list[int], item: int, normalization: str) -> float:
        """Return s(x, y) of one item after one prompt."""
        sequence = self.items[item]
        tokens = torch.tensor([prompt + sequence], device=self.model.device)
        logits = self.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]  # [T, V]
        total = 0.0
        for i, token in enumerate(sequence):
            legal = {s[i] for s in self.items if s[:i] == sequence[:i]} if normalization == "trie" else None
            everything = logits[i] if legal is None else logits[i][list(legal)]
            total += (logits[i, token] - everything.logsumexp(0)).item()
        return total
