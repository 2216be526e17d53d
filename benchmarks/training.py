"""One training step on groups: the tree engine against full rows as GRPO trainers compute them, in one run.

    pip install -e ".[benchmarks]" && python benchmarks/training.py

A step is the log-probabilities of one user's group and the backward pass. The alternatives are ``trl``'s own: what its
GRPOTrainer calls, and its ``selective_log_softmax`` on the logits of the titles alone. Each method runs in a process of
its own. Prints the median seconds of a step, token rows, peak memory above the loaded policy, and the relative
difference of the adapter's gradient from that of the first method.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import jsonargparse
import torch
from measure import Memory, in_new_process, timed
from setting import Setting
from torch import Tensor

from recsys.engine import TreeEngine
from recsys.search import beam_search

Scores = Callable[[int], Tensor]  # user -> [G] log-probabilities of the group


def groups_of(setting: Setting, size: int) -> Tensor:
    """Return ``[users, G]``: what each user chose, and the best other titles under the policy."""
    engine = TreeEngine(setting.policy, setting.trie(), "vocab")
    groups = []
    for user, target in enumerate(setting.targets):
        tokens, places = setting.prompt(user)
        found = beam_search(engine, engine.prefill(tokens), places, size + engine.trie.max_duplicates)
        others = found.items[0][engine.trie.leaf[found.items[0]] != engine.trie.leaf[target]]
        groups.append(torch.cat([others.new_tensor([target]), others[: size - 1]]))
    return torch.stack(groups)


def full_rows(setting: Setting, groups: Tensor) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """Return a function that makes the rows ``[G, L + T]`` of a user, their mask, and that of the titles ``[G, T]``."""

    def rows(user: int) -> tuple[Tensor, Tensor, Tensor]:
        prompt, titles = setting.prompts[user], [setting.items[i] for i in groups[user].tolist()]
        width = max(map(len, titles))
        tokens = torch.tensor([prompt + title + [0] * (width - len(title)) for title in titles], device=setting.device)
        title = torch.arange(width, device=setting.device) < torch.tensor([[len(t)] for t in titles]).to(setting.device)
        return tokens, torch.cat([title.new_ones(len(titles), len(prompt)), title], 1).long(), title

    return rows


def trl_trainer(setting: Setting, groups: Tensor) -> Scores:
    """The function that trl's GRPOTrainer calls, on a stand-in for the trainer."""
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(setting.policy.causal_lm)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=True))
    rows = full_rows(setting, groups)

    def scores(user: int) -> Tensor:
        tokens, mask, title = rows(user)
        logprobs, *_ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, setting.policy.model, tokens, mask, title.shape[1]
        )
        return (logprobs * title).sum(1)

    return scores


def trl_selective(setting: Setting, groups: Tensor) -> Scores:
    """The output head on the titles alone, and trl's log-softmax of the chosen tokens."""
    from trl.trainer.utils import selective_log_softmax

    rows = full_rows(setting, groups)

    def scores(user: int) -> Tensor:
        tokens, mask, title = rows(user)
        keep = title.shape[1]
        output = setting.policy.model(input_ids=tokens, attention_mask=mask, logits_to_keep=keep + 1)
        return (selective_log_softmax(output.logits[:, :-1].float(), tokens[:, -keep:]) * title).sum(1)

    return scores


def tree(normalization: str) -> Callable[[Setting, Tensor], Scores]:
    """The engine's single pass."""

    def make(setting: Setting, groups: Tensor) -> Scores:
        engine = TreeEngine(setting.policy, setting.trie(), normalization)
        return lambda user: engine.forward(*setting.prompt(user), groups[user : user + 1])[0][0]

    return make


METHODS = {
    "trl, GRPOTrainer": trl_trainer,
    "trl, head on titles alone": trl_selective,
    "tree, vocab": tree("vocab"),
    "tree, trie": tree("trie"),
}


def measure(name: str, users: int, size: int, arguments: tuple) -> tuple[str, float, float, float, Tensor]:
    """Run one method; returns the setting's text, median seconds, rows per step, peak bytes and the gradient."""
    torch.manual_seed(0)
    setting = Setting.make(users, *arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        groups = groups_of(setting, size)
        for parameter in setting.policy.trainable().values():  # half of a new adapter is 0 and hides a gradient
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.01).to(parameter.device))
    setting.policy.train()
    scores = METHODS[name](setting, groups)
    weight = torch.linspace(1, -1, size, device=setting.device)
    rows = 0

    def count(_: object, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += args[0].numel()

    setting.policy.causal_lm.get_input_embeddings().register_forward_pre_hook(count)

    def step(user: int) -> None:
        (scores(user) * weight).sum().backward()

    with Memory() as memory:
        seconds = [timed(step, user)[0] for user in range(users)]
        gradient = torch.cat([p.grad.flatten().cpu() for p in setting.policy.trainable().values()])
        seconds = seconds[1:] or seconds  # the first touches new memory
    return str(setting), statistics.median(seconds), rows / users, memory.bytes, gradient


def main(users: int = 4, group: int = 16, history: int = 20, joined: int = 1, dtype: str = "bfloat16") -> None:
    """Run the comparison.

    Args:
        users: Steps, each on one user's group; the first only warms up.
        group: Items in a group, the positive included.
        history: Titles in a prompt.
        joined: Titles of MovieLens-100K joined into one, for a catalogue of longer titles.
        dtype: Compute type: in float32 the gradients of the `vocab` methods agree closely.
    """
    base: tuple[float, float, float, Tensor] | None = None
    for name in METHODS:
        setting, seconds, rows, memory, gradient = in_new_process(measure, name, users, group, (history, joined, dtype))
        line = f"{name:28s} {seconds:8.2f} s/step {rows:8.0f} token rows/step {memory / 1e6:8.0f} MB"
        if base is None:
            print(f"{setting}, G = {group}", flush=True)
            base = (seconds, rows, memory, gradient)
        else:
            faster, fewer, part = base[0] / seconds, base[1] / rows, memory / base[2]
            line += f"   {faster:5.1f} times faster, {fewer:5.1f} times fewer rows, {part:.2f} of the memory"
        if name != "tree, trie":  # another distribution has another gradient
            line += f", gradient differs by {((gradient - base[3]).norm() / base[3].norm()).item():.1e}"
        print(line, flush=True)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
