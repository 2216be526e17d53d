"""Ranking metrics over many users: this project's against ``torchmetrics.retrieval``, in one run.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --users 100000 --alternative-users 100000

Every line comes from a process of its own, and counts its users: the alternative groups them in a Python loop, so it
runs on fewer, and is compared per user with this project's metric on the same ones. The lists are a beam's: negative
log-probabilities, and a part of them lacks the target.

``torchmetrics.retrieval`` wants flat predictions, targets and user numbers, and keeps all three. Its recall takes no
prediction at or below 0 for a hit (log-probabilities score 0, see the last line), so it is given their exponentials.
A list without its target is 0 in both (``empty_target_action="neg"``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jsonargparse
import torch
from measure import Memory, in_new_process, timed
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG, RetrievalRecall

from recsys.functional.partial_auc import window_around
from recsys.metrics import NDCG, WPAUC, Recall

K, NEGATIVES = 10, 10_000  # cut-off; negatives of a user, most of them not listed
OURS: dict[str, Callable[[], Metric]] = {
    f"Recall({K})": lambda: Recall(K),
    f"NDCG({K})": lambda: NDCG(K),
    f"WPAUC({K} +- 5)": lambda: WPAUC(*window_around(K, 5, NEGATIVES)),
}
ALTERNATIVES: dict[str, tuple[str, Callable[[], Metric]]] = {  # and the name of ours with the same value
    f"RetrievalRecall({K})": (f"Recall({K})", lambda: RetrievalRecall(top_k=K)),
    f"RetrievalHitRate({K})": (f"Recall({K})", lambda: RetrievalHitRate(top_k=K)),
    f"RetrievalNormalizedDCG({K})": (f"NDCG({K})", lambda: RetrievalNormalizedDCG(top_k=K)),
}


class Cost(NamedTuple):
    """What a metric took; seconds are medians."""

    update: float  # of all users
    compute: float
    states: list[int]  # bytes after 10 %, 50 % and 100 % of the users
    peak: int  # bytes above the start
    value: float

    def text(self, name: str, users: int) -> str:
        """Return the line to print."""
        states = " / ".join(f"{state:,}" for state in self.states)
        return (
            f"{name:26s} {users:8d} users   update {self.update:7.2f} s, compute {self.compute:8.4f} s, "
            f"{self.per_user(users) * 1e6:7.2f} us/user   state {states} B, peak {self.peak / 1e6:5.0f} MB"
            f"   value {self.value:.6f}"
        )

    def per_user(self, users: int) -> float:
        """Return the seconds of update and compute per user."""
        return (self.update + self.compute) / users


def batches(users: int, listed: int, batch: int, missing: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield log-probabilities, marks and user numbers, each ``[batch, listed]``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    for start in range(0, users, batch):
        user = torch.arange(start, min(start + batch, users), device=device)
        scores = torch.randn(len(user), listed, device=device, generator=generator).mul(3).log_softmax(1)
        target = torch.randint(listed, (len(user), 1), device=device, generator=generator)
        found = torch.rand(len(user), 1, device=device, generator=generator) >= missing
        relevance = torch.zeros_like(scores, dtype=torch.bool).scatter(1, target, found)
        yield scores, relevance, user[:, None].expand_as(scores)


def state_bytes(metric: Metric) -> int:
    """Return the memory of a metric's state."""
    states = [state if isinstance(state, list) else [state] for state in metric.metric_state.values()]
    return sum(tensor.nbytes for state in states for tensor in state)


def measure(name: str, users: int, listed: int, batch: int, missing: float, repeats: int, exp: bool = True) -> Cost:
    """Update a metric with all users, ``repeats`` times, and compute it."""
    alternative = name in ALTERNATIVES
    metric = ALTERNATIVES[name][1]() if alternative else OURS[name]()
    metric.to("cuda" if torch.cuda.is_available() else "cpu")

    def feed(scores: Tensor, relevance: Tensor, user: Tensor) -> None:
        if alternative:
            metric.update(scores.exp() if exp else scores, relevance, indexes=user)
        else:
            metric.update(scores, relevance, NEGATIVES)

    updates, computes = [], []
    marks = [round(users * share) for share in (0.1, 0.5, 1)]
    with Memory() as memory:
        for _ in range(repeats):
            metric.reset()
            seconds, states, seen = 0.0, [], 0
            for scores, relevance, user in batches(users, listed, batch, missing):
                seconds += timed(feed, scores, relevance, user)[0]
                seen += len(scores)
                while len(states) < 3 and seen >= marks[len(states)]:
                    states.append(state_bytes(metric))
            updates.append(seconds)
            took, value = timed(metric.compute)
            computes.append(took)
    return Cost(statistics.median(updates), statistics.median(computes), states, memory.bytes, value.item())


def main(
    users: int = 1_000_000,
    alternative_users: int = 20_000,
    listed: int = 50,
    batch: int = 1_000,
    missing: float = 0.3,
    repeats: int = 3,
) -> None:
    """Run the comparison. Seconds are medians.

    Args:
        users: Users for this project's metrics.
        alternative_users: Users for the metrics of torchmetrics, and for ours that they are compared with.
        listed: Candidates per user, at least 16.
        batch: Users per update.
        missing: Share of the lists that lack the target.
        repeats: How often each metric goes over all users.
    """
    setting = (listed, batch, missing, repeats)
    print(
        f"{'cuda' if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads: lists of {listed}, "
        f"{batch} users per update, {missing:.0%} of the lists lack the target; median of {repeats}; "
        "state after 10 / 50 / 100 % of the users"
    )
    for name in OURS:
        print(in_new_process(measure, name, users, *setting).text(name, users), flush=True)
    print(f"Against torchmetrics, on the first {alternative_users} of these users (WPAUC has no counterpart)")
    same_users = {}
    for name in dict.fromkeys(ours for ours, _ in ALTERNATIVES.values()):
        same_users[name] = in_new_process(measure, name, alternative_users, *setting)
        print(same_users[name].text(name, alternative_users), flush=True)
    for name, (ours, _) in ALTERNATIVES.items():
        cost, mine = in_new_process(measure, name, alternative_users, *setting), same_users[ours]
        gap = abs(cost.value - mine.value)
        print(
            f"{cost.text(name, alternative_users)}: {'agrees' if gap < 1e-5 else 'DIFFERS'} with {ours}'s within "
            f"{gap:.0e}; {ours} takes {cost.per_user(alternative_users) / mine.per_user(alternative_users):.1f} "
            f"times less per user, its state is {cost.states[-1] / mine.states[-1]:.0f} times smaller",
            flush=True,
        )
    name, few = f"RetrievalRecall({K})", min(alternative_users, 1_000)
    value = in_new_process(measure, name, few, *setting, False).value
    print(f"{name} given the log-probabilities themselves ({few} users): value {value:.6f}")


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
