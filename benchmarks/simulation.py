"""Where objectives must disagree: a policy that is too small for its data, with as much data as it wants.

    python benchmarks/simulation.py                    # objectives by metrics, ten worlds
    python benchmarks/simulation.py --table width      # how wide a window, and whether it should narrow
    python benchmarks/simulation.py --table ablation   # what the gate and the weights bring, and softer gates

A world is a true distribution over 1,000 items for a user with 32 standard normal features x: softmax(3 x.W / sqrt(32))
with a random W of full rank. The policy is softmax(x.A.V) of rank 4. Each objective starts at the policy of maximum
likelihood, trains for the same number of Adam steps on the same users and positives, with the learning rate that was
best for the metric that it is meant for (on other worlds), linearly decayed. Negatives are the policy's own at
each step. Metrics are exact expectations over items, on users of their own; only users are sampled.

Prints the sweep of learning rates and the change of each metric against the start, paired by world, in percentage
points with 95 % t intervals. Writes the table, each world's numbers as CSV and a heat map.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import matplotlib
import numpy as np
import torch
from torch import Tensor

from recsys.functional import (
    Gate,
    gate_open,
    group_advantages,
    policy_loss,
    tawin_advantages,
    window_around,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES, RANK, M = 32, 4, 1000
N = M - 1  # negatives of a user
BEAM = 64  # negatives of a group, more where a window needs them
COLUMNS = ["R@1", "R@5", "R@10", "R@20", "R@50", "R@100", "N@10", "AUC"]

Policy = list[Tensor]  # A [S, FEATURES, RANK] and V [S, RANK, M] of S worlds at once
Advantages = Callable[[Tensor, Tensor, float], Tensor]  # scores [B, G], relevance [B, G], progress in [0, 1) -> [B, G]


@dataclass(frozen=True)
class Objective:
    """What to train, and the metric that it is meant to raise; its learning rate is chosen by that."""

    name: str
    metric: str
    advantages: Advantages | None = None  # None: negative log-likelihood of the positive
    negatives: int = BEAM
    random: bool = False  # negatives drawn uniformly, not the policy's best
    ranks: tuple[float, float] = (0, math.inf)  # (low, high]: elsewhere a positive has no advantages, nor a group here


def grpo(scores: Tensor, relevance: Tensor, progress: float) -> Tensor:
    return group_advantages(relevance.to(scores.dtype))


def windowed(name: str, k: int, half_width: float, advantages: Advantages, gated: bool = False) -> Objective:
    """An objective at cut-off k. Its groups list a negative more than the window, so that the gate can shut below."""
    first, last = math.floor(max(k - half_width, 0)), math.ceil(k + half_width)
    ranks = (first, last + 1) if gated else (0, math.inf)
    return Objective(f"{name}, K={k}", f"R@{k}", advantages, max(BEAM, last + 1), ranks=ranks)


def tawin(k: int, half_width: float, gate: Gate = "threshold", temperature: float = 1.0) -> Advantages:
    window = window_around(k, half_width, N)
    return lambda scores, relevance, _: tawin_advantages(scores, relevance, *window, N, gate, temperature)


def narrowing(k: int, widest: float, narrowest: float) -> Advantages:
    """TAWin whose window narrows linearly over the steps."""

    def advantages(scores: Tensor, relevance: Tensor, progress: float) -> Tensor:
        half_width = widest + (narrowest - widest) * progress
        return tawin_advantages(scores, relevance, *window_around(k, half_width, N), N)

    return advantages


def gate_only(k: int, half_width: float) -> Advantages:
    """GRPO on the groups whose gate is open: all listed negatives weigh the same."""

    def advantages(scores: Tensor, relevance: Tensor, progress: float) -> Tensor:
        is_open = gate_open(scores, relevance, *window_around(k, half_width, N), N)
        return grpo(scores, relevance, progress) * is_open[:, None]

    return advantages


def window_scores(scores: Tensor, k: int, half_width: float) -> tuple[Tensor, Tensor]:
    """Scores [B, 1] of the first and the last negative of the window."""
    negatives = scores[:, 1:].sort(dim=1, descending=True).values
    first, last = math.floor(k - half_width), math.ceil(k + half_width) - 1
    return negatives[:, first : first + 1], negatives[:, last : last + 1]


def gaussian_gate(k: int, half_width: float) -> Advantages:
    """A gate that closes gradually: a Gaussian of s+ around the window, as wide as half the window's span of scores."""
    free = tawin(k, half_width, "none")

    def advantages(scores: Tensor, relevance: Tensor, progress: float) -> Tensor:
        first, last = window_scores(scores, k, half_width)
        z = (2 * scores[:, :1] - first - last) / (first - last + 1e-3)
        return free(scores, relevance, progress) * torch.exp(-z.square() / 2)

    return advantages


def rank_gate(k: int, half_width: float, sd: float = 0.3) -> Advantages:
    """A gate that closes gradually: a Gaussian of the log rank around K."""
    free = tawin(k, half_width, "none")

    def advantages(scores: Tensor, relevance: Tensor, progress: float) -> Tensor:
        beaten_by = (scores[:, 1:] > scores[:, :1]).sum(dim=1, keepdim=True)
        z = (torch.log(beaten_by + 0.5) - math.log(k)) / sd
        return free(scores, relevance, progress) * torch.exp(-z.square() / 2)

    return advantages


def per_score(k: int, half_width: float) -> Advantages:
    """The threshold gate divided by the window's span of scores: the density of s+ at the window, not its mass."""
    gated = tawin(k, half_width)

    def advantages(scores: Tensor, relevance: Tensor, progress: float) -> Tensor:
        first, last = window_scores(scores, k, half_width)
        return gated(scores, relevance, progress) / (first - last + 0.05)

    return advantages


def objectives(table: str) -> list[Objective]:
    if table == "main":
        return [
            Objective("NLL", "LL"),
            Objective("GRPO, random", "AUC", grpo, random=True),
            Objective("GRPO, beam", "pAUC", grpo),
            *(windowed("window without gate", k, k / 2, tawin(k, k / 2, "none")) for k in (5, 10, 20, 50)),
            *(windowed("TAWin", k, k / 2, tawin(k, k / 2), gated=True) for k in (5, 10, 20, 50)),
        ]
    rows = []
    for k in (10, 20):
        if table == "width":
            for name, half_width in [("1", 1), ("K/4", k / 4), ("K/2", k / 2), ("K", k)]:
                rows.append(windowed(f"half width {name}", k, half_width, tawin(k, half_width), gated=True))
            rows.append(windowed("K to K/4", k, k, narrowing(k, k, k / 4), gated=True))
        else:
            half = k / 2
            rows += [
                windowed("weights only", k, half, tawin(k, half, "none")),
                windowed("gate only", k, half, gate_only(k, half), gated=True),
                windowed("gate and weights", k, half, tawin(k, half), gated=True),
                windowed("gate per score", k, half, per_score(k, half), gated=True),
                windowed("Gaussian gate", k, half, gaussian_gate(k, half)),
                windowed("rank gate", k, half, rank_gate(k, half)),
                windowed("sigmoid 0.1", k, half, tawin(k, half, "sigmoid", 0.1)),
                windowed("sigmoid 0.3", k, half, tawin(k, half, "sigmoid", 0.3)),
            ]
    return rows


class Worlds:
    """True distributions, one per seed, and all random draws from them."""

    def __init__(self, seeds: range) -> None:
        draws = [torch.randn(FEATURES, M, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.weight = torch.stack(draws) * 3 / math.sqrt(FEATURES)  # [S, FEATURES, M]

    def users(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return features [S, count, FEATURES] and true probabilities [S, count, M]."""
        x = torch.randn(len(self.weight), count, FEATURES, generator=generator)
        return x, torch.bmm(x, self.weight).softmax(dim=-1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return features [S, count, FEATURES] and one positive each [S, count, 1]."""
        x, probability = self.users(count, generator)
        cumulative = probability.cumsum(dim=-1)
        u = torch.rand(*cumulative.shape[:2], 1, generator=generator) * cumulative[..., -1:]
        return x, torch.searchsorted(cumulative, u).clamp(max=M - 1)

    def maximum_likelihood(self, steps: int = 1500, batch: int = 256) -> Policy:
        """The policy that all objectives start from; the exact cross-entropy keeps the noise of positives out."""
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.weight), FEATURES, RANK), (len(self.weight), RANK, M)
        policy = [(0.3 * torch.randn(s, generator=generator)).requires_grad_() for s in shape]
        optimizer = torch.optim.Adam(policy)
        for step in range(steps):
            x, probability = self.users(batch, generator)
            loss = -(probability * logits(policy, x).log_softmax(dim=-1)).sum() / batch
            update(optimizer, loss, 0.03 * (1 - step / steps))
        return [parameter.detach() for parameter in policy]

    @torch.no_grad()
    def evaluate(self, policy: Policy, count: int = 2000, chunk: int = 250) -> tuple[Tensor, Tensor]:
        """Return the chance that the positive has rank r, [S, M], and its mean log-probability, [S]."""
        generator = torch.Generator().manual_seed(1)
        at_rank, likelihood = torch.zeros(len(self.weight), M), torch.zeros(len(self.weight))
        for _ in range(count // chunk):
            x, probability = self.users(chunk, generator)
            z = logits(policy, x)
            at_rank += probability.gather(-1, z.argsort(dim=-1, descending=True)).sum(dim=1) / count
            likelihood += (probability * z.log_softmax(dim=-1)).sum(dim=(1, 2)) / count
        return at_rank, likelihood


def logits(policy: Policy, x: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x, policy[0]), policy[1])  # [S, B, M]


def update(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # Adam is elementwise: the worlds in one tensor do not touch each other


def metric(evaluation: tuple[Tensor, Tensor], name: str) -> Tensor:
    """One number per world, [S]: in percent, but nats for LL."""
    at_rank = 100 * evaluation[0].double()
    recall = at_rank.cumsum(dim=1)  # Recall@k at k - 1
    if name == "LL":
        return evaluation[1].double()
    if name in ("AUC", "pAUC"):  # means of Recall@k
        return recall[:, : N if name == "AUC" else BEAM].mean(dim=1)
    k = int(name[2:])
    if name.startswith("R"):
        return recall[:, k - 1]
    return (at_rank[:, :k] / torch.arange(2, k + 2).log2()).sum(dim=1)  # NDCG@k


def loss(
    objective: Objective, policy: Policy, x: Tensor, positive: Tensor, progress: float, generator: torch.Generator
) -> Tensor:
    z = logits(policy, x)
    if objective.advantages is None:
        return -z.log_softmax(dim=-1).gather(-1, positive).sum() / x.shape[1]
    flat, positive = z.flatten(0, 1), positive.flatten(0, 1)  # [S * B, M], [S * B, 1]
    rank = 1 + (flat > flat.gather(1, positive)).sum(dim=1)
    row = ((objective.ranks[0] < rank) & (rank <= objective.ranks[1])).nonzero()[:, 0]  # [R]
    flat, positive = flat.index_select(0, row), positive.index_select(0, row)
    if objective.random:
        negatives = torch.randint(M - 1, (len(row), objective.negatives), generator=generator)
        negatives += negatives >= positive
    else:
        among = flat.detach().scatter(1, positive, -torch.inf).numpy()
        # in any order; twice as fast as torch.topk on a CPU
        negatives = torch.from_numpy(np.argpartition(among, -objective.negatives)[:, -objective.negatives :])
    # Logits in place of log-probabilities: a user's normaliser cancels, because the advantages of a group sum to zero.
    scores = flat.gather(1, torch.cat([positive, negatives], dim=1))  # [R, G]
    relevance = torch.zeros_like(scores, dtype=torch.bool)
    relevance[:, 0] = True
    advantages = objective.advantages(scores.detach(), relevance, progress)
    return policy_loss(scores, scores.detach(), advantages, clip_eps=0.2).sum() / x.shape[1]


def train(
    worlds: Worlds, start: Policy, runs: list[tuple[Objective, float]], steps: int, batch: int
) -> list[tuple[Tensor, Tensor]]:
    """Train each objective at its learning rate, all on one stream of users and positives; return the evaluations."""
    data, others = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)
    policies = [[parameter.clone().requires_grad_() for parameter in start] for _ in runs]
    optimizers = [torch.optim.Adam(policy) for policy in policies]
    for step in range(steps):
        x, positive = worlds.sample(batch, data)
        progress = step / steps
        for (objective, rate), policy, optimizer in zip(runs, policies, optimizers, strict=True):
            update(optimizer, loss(objective, policy, x, positive, progress, others), rate * (1 - progress))
    return [worlds.evaluate(policy) for policy in policies]


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish-Fisher expansion, within 0.3 % from 8 degrees of freedom on)."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(change: Tensor) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over worlds."""
    half = t_quantile(len(change) - 1) * change.std() / math.sqrt(len(change))
    return change.mean().item(), half.item()


def draw(path: Path, names: list[str], cells: list[list[tuple[float, float]]]) -> None:
    """Heat map of changes: a change whose interval excludes 0 is bold; colours saturate at 0.5 percentage points."""
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.2), layout="constrained")
    image = axes.imshow([[mean for mean, _ in row] for row in cells], cmap="RdBu", vmin=-0.5, vmax=0.5, aspect="auto")
    for i, row in enumerate(cells):
        for j, (mean, half) in enumerate(row):
            sure = abs(mean) > half
            axes.text(
                j,
                i,
                f"{mean:+.2f}",
                ha="center",
                va="center",
                weight="bold" if sure else "normal",
                color="white" if abs(mean) > 0.35 else "black",
            )
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.tick_top()
    figure.colorbar(image, label="change, percentage points", extend="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    output: Path = Path("runs/simulation"),
    table: Literal["main", "width", "ablation"] = "main",
    worlds: int = 10,
    sweep_worlds: int = 2,
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3),
    steps: int = 400,
    batch: int = 512,
) -> None:
    """Run one table.

    Args:
        output: Folder for <table>.md, <table>.csv and <table>.png.
        table: Which objectives to compare.
        worlds: Worlds of the final comparison.
        sweep_worlds: Other worlds, on which the learning rates are chosen.
        learning_rates: Learning rates to choose from.
        steps: Adam steps from the maximum-likelihood policy.
        batch: Users per step and world.
    """
    began = time.perf_counter()
    rows = objectives(table)

    sweep = Worlds(range(1000, 1000 + sweep_worlds))
    start = sweep.maximum_likelihood()
    before = sweep.evaluate(start)
    runs = [(objective, rate) for objective in rows for rate in learning_rates]
    swept = iter(train(sweep, start, runs, steps, batch))
    rates = []
    print(f"Sweep: change of the tuned metric on {sweep_worlds} other worlds (LL in 0.01 nats)\n")
    print("| objective | metric | " + " | ".join(f"{rate:g}" for rate in learning_rates) + " |")
    print("|---" * (2 + len(learning_rates)) + "|")
    for objective in rows:
        scale = 100 if objective.metric == "LL" else 1
        gains = [
            scale * (metric(next(swept), objective.metric) - metric(before, objective.metric)).mean().item()
            for _ in learning_rates
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        rates.append(learning_rates[best])
        shown = [f"**{gain:+.2f}**" if i == best else f"{gain:+.2f}" for i, gain in enumerate(gains)]
        print(f"| {objective.name} | {objective.metric} | " + " | ".join(shown) + " |", flush=True)

    final = Worlds(range(worlds))
    start = final.maximum_likelihood()
    before = final.evaluate(start)
    evaluations = train(final, start, list(zip(rows, rates, strict=True)), steps, batch)
    changes = [{name: metric(after, name) - metric(before, name) for name in COLUMNS} for after in evaluations]
    cells = [[interval(change[name]) for name in COLUMNS] for change in changes]
    levels = " | ".join(f"{metric(before, name).mean():.2f}" for name in COLUMNS)
    lines = [
        f"Change against the start, percentage points, {worlds} worlds, 95 % intervals; bold: excludes 0\n",
        "| objective | lr | " + " | ".join(COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
        f"| start (level, %) | | {levels} |",
    ]
    for objective, rate, row in zip(rows, rates, cells, strict=True):
        marked = [(f"**{mean:+.2f}**" if abs(mean) > half else f"{mean:+.2f}") + f" ±{half:.2f}" for mean, half in row]
        lines.append(f"| {objective.name} | {rate:g} | " + " | ".join(marked) + " |")
    print("\n" + "\n".join(lines))

    output.mkdir(parents=True, exist_ok=True)
    (output / f"{table}.md").write_text("\n".join(lines) + "\n")
    with (output / f"{table}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["objective", "learning_rate", "metric", "world", "start", "change"])
        for objective, rate, change in zip(rows, rates, changes, strict=True):
            for name in COLUMNS:
                for world, (level, value) in enumerate(
                    zip(metric(before, name).tolist(), change[name].tolist(), strict=True)
                ):
                    writer.writerow([objective.name, rate, name, world, f"{level:.4f}", f"{value:.4f}"])
    draw(output / f"{table}.png", [objective.name for objective in rows], cells)
    print(f"\n{time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads; files in {output}")


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
