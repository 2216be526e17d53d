"""Are there rows enough? How much of a loss' gradient is signal, and whether steps along it help rows it is not of.

    recsys fit --config configs/small.yaml --trainer.max_epochs 5
    python benchmarks/noise.py --ckpt_path checkpoints/small/version_0/last.ckpt --config configs/small.yaml

At the checkpoint, takes the gradients of the config's objective on groups (its policy loss alone) and of the mean
negative log-likelihood per title over many rows, in two halves. The halves' gradients share the signal |G|^2, and each
has noise that falls with its rows; the noise scale (arXiv 1812.06162, B_simple) is the number of rows at which the two
are equal. With fewer rows than that a step mostly learns the rows by heart. Then goes plain steps along the gradient of
the policy loss, and shows the change of WPAUC on rows that the gradient is of, and on as many others. Where only the
first rises, the window has nothing to learn from these rows. What follows ``--config`` goes to ``recsys``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from checkpoint import load
from torch import Tensor
from tqdm import tqdm

from callbacks.beam_negatives import BeamNegatives, best_others
from recsys.functional import windowed_partial_auc
from recsys.module import Recommender
from recsys.objectives import GroupObjective, StepContext
from recsys.search import best_first_search
from recsys.tree import Places
from recsys.types import Batch

Gradient = list[Tensor]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of this config, at the end of its warm start")
    parser.add_argument("--stretches", type=int, default=1024, help="stretches that the gradients are of")
    parser.add_argument("--checked", type=int, default=256, help="stretches of either kind whose WPAUC is measured")
    parser.add_argument(
        "--steps", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="lengths, in shares of the weights' norm"
    )
    arguments, rest = parser.parse_known_args()
    model, negatives = load(arguments.ckpt_path, rest)
    model.eval()
    data = model.data
    data.policy_stretches = arguments.stretches + arguments.checked
    stretches = data.stretches(0, warm_start=False)
    train, held = stretches[: -arguments.checked], stretches[-arguments.checked :]
    checked = {
        "those": list(data.batches(train[: arguments.checked], negatives.batch_size, False)),
        "others": list(data.batches(held, negatives.batch_size, False)),
    }
    policy, nll, rows, groups = gradients(model, negatives, list(data.batches(train, negatives.batch_size, False)))
    print(f"{rows:,} rows, {groups:,} groups trained by {type(model.objective).__name__}; {model.dial}\n")
    print("| gradient of | signal, norm | cosine of two halves | noise scale, rows |\n|---|---|---|---|")
    for name, halves in {"policy loss": policy, "NLL": nll}.items():
        print(f"| {name} | {' | '.join(described(halves, rows))} |")
    print("\n| step | WPAUC of those rows | WPAUC of others |\n|---|---|---|")
    start = {name: wpauc(model, batches) for name, batches in checked.items()}
    whole = [a + b for a, b in zip(*policy, strict=True)]
    before = [weight.detach().clone() for weight in weights(model)]
    scale = norm(before) / norm(whole)
    for step in arguments.steps:
        with torch.no_grad():
            for weight, old, direction in zip(weights(model), before, whole, strict=True):
                weight.copy_(old - step * scale * direction)
        cells = []
        for name, batches in checked.items():
            change = wpauc(model, batches) - start[name]
            cells.append(f"{change.mean():+.4f} ±{1.96 * change.std() / len(change) ** 0.5:.4f}")
        print(f"| {step:g} | {' | '.join(cells)} |", flush=True)


def weights(model: Recommender) -> list[Tensor]:
    """Return the trained weights."""
    return list(model.policy.trainable().values())


def norm(gradient: Sequence[Tensor]) -> float:
    """Return the length of a gradient or of all weights."""
    return sum(part.double().square().sum().item() for part in gradient) ** 0.5


def gradients(
    model: Recommender, negatives: BeamNegatives, batches: list[Batch]
) -> tuple[list[Gradient], list[Gradient], int, int]:
    """Return the gradients of the policy loss and of the NLL, in two halves each, and the numbers of rows and groups.

    A half's gradient is that of the mean over its rows.
    """
    objective, trained = model.objective, weights(model)
    assert isinstance(objective, GroupObjective)
    objective.anchor_coef = objective.anchor_end = 1.0  # has the NLL of the same pass computed
    sums = [[[torch.zeros_like(weight) for weight in trained] for _ in range(2)] for _ in range(2)]
    rows, groups = [0, 0], 0
    generator = torch.Generator(model.device).manual_seed(0)
    for place, batch in enumerate(tqdm(batches, desc="gradients", leave=False)):
        with torch.no_grad():
            found = negatives.groups_of(model, batch, generator).groups
            found = found[found.row.argsort()]
        parts = objective.step(model.engine, batch, StepContext(found, model.dial.window))
        count = int((batch.event >= 0).sum())
        for loss, halves in zip((parts["policy_loss"], parts["anchor"]), sums, strict=True):
            if loss.requires_grad:
                gradient = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                for total, part in zip(halves[place % 2], gradient, strict=True):
                    if part is not None:
                        total += part * count
        rows[place % 2] += count
        groups += len(found.row)
    policy, nll = [[[total / n for total in half] for half, n in zip(halves, rows, strict=True)] for halves in sums]
    return policy, nll, sum(rows), groups


def described(halves: list[Gradient], rows: int) -> tuple[str, str, str]:
    """Return the signal's length, the cosine of the halves, and the noise scale in rows."""
    signal = sum((a.double() * b.double()).sum().item() for a, b in zip(*halves, strict=True))  # |G|^2, unbiased
    lengths = [norm(half) for half in halves]
    if signal <= 0:
        return "none", f"{signal / (lengths[0] * lengths[1]):.3f}", "no end in sight"
    noise = max((lengths[0] ** 2 + lengths[1] ** 2) / 2 - signal, 0.0)  # of half of the rows
    return f"{signal**0.5:.2g}", f"{signal / (lengths[0] * lengths[1]):.3f}", f"{noise * rows / 2 / signal:,.0f}"


@torch.no_grad()
def wpauc(model: Recommender, batches: list[Batch]) -> Tensor:
    """Return the WPAUC of each row ``[R]``, exact over the catalogue."""
    values, window = [], model.dial.window
    count = min(int(-(-window.end // 1)), model.engine.trie.num_items - 1)
    for batch in batches:
        at = (batch.event >= 0).nonzero(as_tuple=True)
        prompt, places = model.engine.prefill(batch.tokens), Places(at[0], batch.start[at])
        positive = model.engine.head.title_logprobs(prompt.hidden, batch.titles, batch.start)[at][:, None]
        ranking = best_first_search(model.engine, prompt, places, count + 1)
        scores = torch.cat([positive, best_others(model.engine.trie, ranking, batch.titles[at][:, None], count)[1]], 1)
        relevance = torch.zeros_like(scores, dtype=torch.bool)
        relevance[:, 0] = True
        values.append(windowed_partial_auc(scores, relevance, *window.rates))
    return torch.cat(values)


if __name__ == "__main__":
    main()
