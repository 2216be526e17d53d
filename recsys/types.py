"""The one batch type and the one error type that every stage shares.

Letters in shapes: B users in a batch, G items in a group, L prompt tokens, T item tokens, H hidden size, V
vocabulary, M items in the catalogue, N negatives of one user (M minus the positives).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


class UserError(Exception):
    """A mistake in the user's input: the message names the file, row or key and says what to do.

    The command line prints the message alone and exits with code 1; every other exception keeps its traceback.
    """


@dataclass
class Batch:
    """Rows (history -> target) of B users, ready for the model. Padding is told by length, never by token id.

    In training the target's title stands behind the prompt as the last of its titles, and each title that is a row of
    its own, given what precedes it, names its event; in evaluation ``titles`` is the history alone.
    """

    row: Tensor  # [B] int64, event index that names the row; -1 marks a row that only fills up a batch
    tokens: Tensor  # [B, L] int64, token ids, padded on the right
    length: Tensor  # [B] int64, real tokens, >= 1
    titles: Tensor  # [B, C] int64, catalogue index of each title in `tokens`, oldest first, -1 = none
    start: Tensor  # [B, C] int64, position in `tokens` of that title's first token, >= 1
    event: Tensor  # [B, C] int64, event index of each title that is a row to train on, -1 = it is not
    target: Tensor  # [B] int64, catalogue index of the positive

    def to(self, *args: object, **kwargs: object) -> Batch:
        """Move every field, as ``Tensor.to``; Lightning calls this to move a batch to the device."""
        return Batch(**{f.name: getattr(self, f.name).to(*args, **kwargs) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Tensor) -> Batch:
        """Return the rows of ``index``, ``[B]`` bool or ``[R]`` int64, with no more padding than they need."""
        part = Batch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})
        part.tokens = part.tokens[:, : int(part.length.max())]
        return part
