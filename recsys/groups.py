"""Groups: for each train row its positive and the negatives that policy optimisation compares it with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Callback
from torch import Tensor


@dataclass
class Groups:
    """The groups of R rows, as last refreshed, G = 1 + n items each; a row that would not be trained has none."""

    row: Tensor  # [R] int64, ascending event indices
    items: Tensor  # [R, G] int64, the positive first
    old_logprobs: Tensor  # [R, G] float32, log-probabilities under the policy that made the groups
    ref_logprobs: Tensor | None  # [R, G] float32, under the policy at the start of the phase, if a loss reads them

    def __getitem__(self, index: Tensor) -> Groups:
        """Return some groups, ``[R]`` bool or int64 ascending."""
        reference = None if self.ref_logprobs is None else self.ref_logprobs[index]
        return Groups(self.row[index], self.items[index], self.old_logprobs[index], reference)

    def to(self, device: torch.device) -> Groups:
        """Move every field to ``device``."""
        reference = None if self.ref_logprobs is None else self.ref_logprobs.to(device)
        return Groups(self.row.to(device), self.items.to(device), self.old_logprobs.to(device), reference)

    def find(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of each row id, and whether it has a group, both of the shape of ``row``."""
        if not len(self.row):
            return torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool)
        index = torch.searchsorted(self.row, row.contiguous()).clamp(max=len(self.row) - 1)
        return index, self.row[index] == row


class GroupSource(Callback):
    """A callback that keeps ``module.groups`` filled with the groups of the rows that are about to be trained on.

    Attributes:
        count: n, negatives of a group, or None to have it follow from the window (``module.dial.group_negatives``).
        best_share: Share of a group's negatives that are the policy's best.
    """

    count: int | None
    best_share: float
