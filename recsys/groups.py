"""Groups: for each train row its positive and the negatives that policy optimisation compares it with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Callback
from torch import Tensor


@dataclass
class Groups:
    """The groups of R rows, as last refreshed. G = 1 + n items each."""

    row: Tensor  # [R] int64, ascending row ids
    items: Tensor  # [R, G] int64, the positive first
    old_logprobs: Tensor  # [R, G] float32, log-probabilities under the policy that made the groups
    ref_logprobs: Tensor | None  # [R, G] float32, under the policy at the start of the phase, if a loss reads them

    def to(self, device: torch.device) -> Groups:
        """Move every field to ``device``."""
        reference = None if self.ref_logprobs is None else self.ref_logprobs.to(device)
        return Groups(self.row.to(device), self.items.to(device), self.old_logprobs.to(device), reference)

    def find(self, row: Tensor) -> Tensor:
        """Return the index ``[B]`` of each row id.

        Raises:
            KeyError: if a row has no group.
        """
        index = torch.searchsorted(self.row, row).clamp(max=len(self.row) - 1)
        if bool((self.row[index] != row).any()):
            raise KeyError(f"row {row[self.row[index] != row][0].item()} has no negatives")
        return index


class GroupSource(Callback):
    """A callback that keeps ``module.groups`` filled with the groups of the rows that an epoch trains on.

    Attributes:
        count: n, negatives of a group, or None to have it follow from the window (``module.dial.group_negatives``).
        best_share: Share of a group's negatives that are the policy's best.
    """

    count: int | None
    best_share: float
