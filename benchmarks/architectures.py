"""Which architectures of `transformers` the tree engine runs: each as a small random model, against full rows.

    python benchmarks/architectures.py

Every causal language model that the library knows is made with random weights, in sizes as in `SMALL` and all else at
its defaults, in a process of its own. Where the check at the start of a run lets it pass, the engine's scores, and the
gradient of their mean, are compared with those of one full row per title through the whole model. Prints a table:
exact; refused, with the kind of reason; wrong (passed, but not exact); traceback; and those not to be made so small.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import warnings
from collections import defaultdict
from typing import Any

import jsonargparse
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recsys.agreement import check_agreement
from recsys.engine import TreeEngine
from recsys.policy import Policy
from recsys.tree import Places
from recsys.trie import Trie
from recsys.types import UserError

PROMPT = [7 * i % 250 for i in range(48)]
TITLES = [[*title.encode(), 256] for title in ("Heat", "Heart", "Hearts of fire", "Alien", "Aliens", "Brazil")]
# Names that configurations have for sizes, by what they contain, the first that fits; each with its value.
SMALL = (
    (r"^vocab_size", 257),
    (r"^(pad|bos|eos|sep|cls|unk|decoder_start)_token_id$", 0),
    (r"layers$|^n_layers?$|^num_layers$|depth$", "layers"),
    (r"(key_value|kv)_heads$|^multi_query_group_num$", "key_value_heads"),
    (r"heads$|^n_heads?$", 4),
    (r"head_dim$|^d_kv$|rotary_dim$", 8),
    (r"experts_per_tok$|top_k$|^n_group$|topk_group$", 1),
    (r"experts$", 4),
    (r"(intermediate|ffn|inner|mlp).*(size|dim)$|^d_ff$|^n_inner$", 64),
    (r"^(hidden_size|d_model|n_embd|embedding_size|dim|emb_dim|word_embed_proj_dim|n_embed|input_hidden_size)$", 32),
    (r"max_position_embeddings$|^n_positions$|^n_ctx$|max_seq_len$", 128),
    (r"^initializer_range$", 0.2),  # smaller weights hardly look back, and what a model sees would not show
)
# What refusals say, and what the table makes of them.
REASONS = {
    "logits are not its output head": "its logits are not its head's (capped, scaled, or a head of several layers)",
    "and a full row through the model differ": "sees other tokens than those that precede, or is random in training",
    "cannot run titles as a tree": "takes no tree: a recurrence, a cache of its own, no mask or positions to give",
    "trained weights have no part": "has weights beside those of a causal language model",
}


class Given(Policy):
    """A policy around a model."""

    lora = None

    def __init__(self, name: str, model: Any) -> None:
        super().__init__()
        self.name, self.given = name, model

    def load(self, device: torch.device) -> Any:
        """Return the model."""
        return self.given


def small_model(kind: str, key_value_heads: int, all_layers: bool) -> Any:
    """Return a random model of an architecture, that runs.

    Raises:
        Exception: of any kind, if the sizes do not suit it.
    """
    config_class = CONFIG_MAPPING[kind]
    sizes: dict[str, Any] = {}
    for name, value in config_class().to_dict().items():
        name = config_class.attribute_map.get(name, name)
        found = next((size for pattern, size in SMALL if re.search(pattern, name)), None)
        if found == "layers" and all_layers:
            continue
        if found is not None and isinstance(value, int | float) and not isinstance(value, bool):
            sizes[name] = {"layers": 2, "key_value_heads": key_value_heads}.get(found, found)
    config = config_class(**sizes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > 20e6:
        raise ValueError(f"{count:,} weights")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        if not bool(model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits.isfinite().all()):
            raise ValueError("logits are not finite")
    return model


def by_rows(policy: Policy) -> torch.Tensor:
    """Return the score of each title by a full row through the whole model, with gradients."""
    scores = []
    for title in TITLES:
        logits = policy.model(input_ids=torch.tensor([PROMPT + title]), use_cache=False).logits[0, len(PROMPT) - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(1, torch.tensor(title)[:, None]).sum())
    return torch.stack(scores)


def gradient(policy: Policy, scores: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the scores' mean, as one vector."""
    weights = list(policy.trainable().values())
    found = torch.autograd.grad(scores.mean(), weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found, strict=True)])


def outcome(kind: str) -> tuple[str, str]:
    """Return what comes of an architecture, and why."""
    warnings.filterwarnings("ignore")
    model, problem = None, ""
    for key_value_heads, all_layers in (
        (2, False),
        (4, False),
        (4, True),
    ):  # some share no keys or list layers
        try:
            model = small_model(kind, key_value_heads, all_layers)
            break
        except Exception as error:
            problem = problem or str(error).strip().split("\n")[0][:80]
    if model is None:
        return "not made", problem
    policy = Given(kind, model)
    try:
        policy.build(torch.device("cpu"))
        engine = TreeEngine(policy, Trie.from_sequences(TITLES), "vocab")
        check_agreement(engine, PROMPT)
    except UserError as error:
        return "refused", str(error).removeprefix(kind).lstrip(": ")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}".split("\n")[0]
    tokens, items = torch.tensor([PROMPT]), torch.arange(len(TITLES))[None]
    places = Places(torch.tensor([0]), torch.tensor([len(PROMPT)]))
    scores, _ = engine.forward(tokens, places, items)
    exact = by_rows(policy)
    score_error = float((scores[0] - exact).abs().max())
    expected = gradient(policy, exact)
    gradient_error = float((gradient(policy, scores) - expected).norm() / expected.norm())
    found = f"scores to {score_error:.0e}, gradient to {gradient_error:.0e}"
    if not bool(expected.isfinite().all()):  # of such random weights; there is nothing to compare with
        found, gradient_error = f"{found}, the model's own has NaN", 0.0
    return ("exact" if score_error < 1e-3 and gradient_error < 1e-3 else "wrong"), found


def child(kind: str, pipe: Any) -> None:
    """Send the outcome, within four gigabytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        pipe.send(outcome(kind))
    except MemoryError:
        pipe.send(("not made", "too much memory"))


def main(kinds: list[str] | None = None, seconds: float = 120) -> None:
    """Try architectures, and print the table.

    Args:
        kinds: Names as in a model's `config.json` (`model_type`); null tries all.
        seconds: Time for each.
    """
    torch.set_num_threads(1)
    kinds = kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    context = multiprocessing.get_context("fork")
    for place, kind in enumerate(kinds):
        here, there = context.Pipe()
        process = context.Process(target=child, args=(kind, there))
        process.start()
        there.close()
        try:
            result, why = here.recv() if here.poll(seconds) else ("not made", f"not within {seconds:g} s")
        except EOFError:
            result, why = "traceback", "the process died"
        process.kill()
        process.join()
        print(f"{place + 1}/{len(kinds)} {kind}: {result}: {why}", flush=True)
        reason = next((short for part, short in REASONS.items() if part in why), why) if result == "refused" else ""
        found[result, reason].append(kind)
    print(f"\ntransformers {transformers.__version__}\n\n| outcome | count | architectures |\n|---|---|---|")
    order = {name: i for i, name in enumerate(("wrong", "traceback", "exact", "refused", "not made"))}
    for (result, reason), names in sorted(found.items(), key=lambda entry: (order[entry[0][0]], -len(entry[1]))):
        print(f"| {result}{': ' if reason else ''}{reason} | {len(names)} | {', '.join(names)} |")


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
