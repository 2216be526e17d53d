"""Random items outside a few that are excluded, in memory that does not grow with the catalogue."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample_outside"]


def sample_outside(excluded: Tensor, num_items: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw items uniformly, without replacement, among those that a row does not exclude.

    Floyd's algorithm (Bentley and Floyd, Communications of the ACM 30(9), 1987, p. 754) on the numbers of the items
    that are left, of which the excluded ones are then skipped.

    Args:
        excluded: ``[R, X]`` int64 items, different within a row; -1 for none.
        num_items: M; each row leaves at least ``count`` of them.
        count: n, items to draw.
        generator: On the device of ``excluded``.

    Returns:
        ``[R, n]`` int64, different within a row, in no particular order but not a random one.
    """
    rows, device = len(excluded), excluded.device
    left = num_items - (excluded >= 0).sum(1)  # [R]
    drawn = torch.full((rows, count), -1, dtype=torch.int64, device=device)
    for step in range(count):
        last = left - count + step
        number = torch.randint(2**62, (rows,), device=device, generator=generator) % (last + 1)
        taken = (drawn == number[:, None]).any(1)
        drawn[:, step] = torch.where(taken, last, number)
    # The k-th item that is left has as many excluded ones before it as there are i with excluded_i - i <= k.
    sorted_out = torch.where(excluded < 0, 2 * num_items, excluded).sort(1).values
    gap = sorted_out - torch.arange(excluded.shape[1], device=device)
    return drawn + torch.searchsorted(gap, drawn, right=True)
