"""The data module: loads a source, splits it into rows, and serves batches to training, search and evaluation."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from recsys.data.batches import BatchDataset, ResumableLoader, plan_batches
from recsys.data.catalog import Catalog
from recsys.data.histories import Histories, Split
from recsys.data.prompts import PromptEncoder, PromptTemplate, write_entries
from recsys.data.requests import Requests
from recsys.data.sources import Columns, Source
from recsys.data.tokens import TOKENS_CACHE
from recsys.types import Batch, UserError

_SIZES = ("batch_size", "eval_batch_size")
_COUNTS = ("warm_start_stretches", "policy_stretches", "val_rows", "test_rows")
_MOST = 2**63 - 1  # what an array of integers holds
_LEAST = dict.fromkeys(_SIZES + _COUNTS, 1) | {"num_workers": 0, "seed": 0}


class HistoryDataModule(LightningDataModule):
    """Rows (history -> target) of one source in batches of similar prompt length.

    Training goes through stretches: up to ``max_history`` events and the one after them, in one prompt. A user's
    stretches do not overlap, and every title in one is a row of its own, whose history is what precedes it there.

    The Lightning module provides ``tokenizer``, ready before its ``setup``, and ``phase_at(epoch)``, the phase of an
    epoch: ``warm_start: bool`` tells whether it is the warm start, and ``start: int`` is its first epoch. An epoch is
    counted within its phase wherever it determines what is drawn, so a policy phase after a warm start draws what it
    would draw without one.

    The trainer needs ``reload_dataloaders_every_n_epochs=1`` and ``use_distributed_sampler=False``.

    Args:
        source: Where interactions and titles come from.
        prompt: The prompt's text and how much history it holds.
        split: ``temporal`` cuts all rows 80/10/10 by time; ``leave_one_out`` tests on each user's last event.
        batch_size: Most stretches in a training batch, on each device.
        eval_batch_size: Most rows in a batch of validation, test and prediction, on each device.
        warm_start_stretches: Stretches drawn anew for each epoch of the warm start, without replacement; null uses all.
        policy_stretches: Stretches drawn anew for each epoch of the objective, likewise.
        fresh_share: Share of the train rows, the latest in time, that the warm start leaves out and the objective is
            confined to, so that it meets targets which the policy has not learnt by heart; 0 trains both on all rows.
        val_rows: Validation rows, spread evenly over the split's time; null uses all.
        test_rows: Test rows, spread evenly over the split's time; null uses all.
        num_workers: Processes that build batches; 0 builds them in the main process.
        seed: Determines, with the epoch's number within its phase, the rows drawn and their order.
        cache_dir: Folder that keeps the titles' tokens of a catalogue of 50,000 or more; ``~`` is the home folder; null
            keeps none.

    Attributes:
        catalog: The items; after ``load``.
        items: The source's items, in the order of the catalogue; after ``load``.
        histories: The events and rows; after ``load``.
        user_ids: The source's id of each user in ``histories.users``; after ``load``.
        dropped: What the source left out: reason -> interactions; after ``load``.
        entries: Texts before and after a title in a prompt, which ``histories.entry`` counts; after ``load``.
        item_tokens: Token ids of each item, the end included; after ``setup``.
        encoder: Makes prompts; after ``setup``.
        requests: What prediction goes through: by default, what comes after all events of each user; after ``setup``.

    Raises:
        UserError: A number is below 1 (``num_workers`` and ``seed``: below 0), or too large for an integer.
    """

    catalog: Catalog
    items: pd.DataFrame
    histories: Histories
    user_ids: pd.Index
    dropped: dict[str, int]
    entries: list[tuple[str, str]]
    item_tokens: list[list[int]]
    encoder: PromptEncoder
    requests: Requests

    def __init__(
        self,
        source: Source,
        prompt: PromptTemplate,
        split: Split = "temporal",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        warm_start_stretches: int | None = None,
        policy_stretches: int | None = None,
        fresh_share: float = 0.0,
        val_rows: int | None = None,
        test_rows: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = TOKENS_CACHE,
    ) -> None:
        super().__init__()
        self.source = source
        self.prompt = prompt
        self.split = split
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.warm_start_stretches = warm_start_stretches
        self.policy_stretches = policy_stretches
        self.fresh_share = fresh_share
        self.val_rows = val_rows
        self.test_rows = test_rows
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name} must be at least {least}, but it is {value}")
            if value is not None and value > _MOST:
                raise UserError(f"data.{name} must be at most {_MOST:,}, but it is {value}")
        if not 0 <= fresh_share < 1:
            raise UserError(f"data.fresh_share must be at least 0 and below 1, but it is {fresh_share}")

    def load(self) -> None:
        """Load the source, build ``catalog`` and ``histories`` and report the counts; does nothing a second time.

        Raises:
            UserError: The source's, those of :class:`recsys.data.Histories`, or a field of ``prompt.entry`` is lacking.
        """
        if hasattr(self, "histories"):
            return
        data = self.source.load()
        log, self.dropped = data.interactions, data.dropped
        self.items = data.items
        self.catalog = Catalog(data.items[Columns.ITEM].tolist(), data.items[Columns.TITLE].tolist())
        user, user_ids = pd.factorize(log[Columns.USER])
        self.user_ids = user_ids.astype(object)
        user, item = user.astype(np.int32), self.catalog.index_of(log[Columns.ITEM]).astype(np.int32)
        entry, self.entries = write_entries(self.prompt, data, item)
        time = log[Columns.TIME].to_numpy()
        del data, log  # tens of bytes an event, which the sorting needs; Arrow keeps as many that it does not use
        pa.default_memory_pool().release_unused()
        self.histories = Histories(user, item, time, self.split, entry)
        dropped = {f"dropped_{name}": n for name, n in self.dropped.items()}
        counts = {"items": len(self.catalog)} | self.histories.describe() | dropped
        shown = (f"{name} {n:.3f}" if isinstance(n, float) else f"{name} {n:,}" for name, n in counts.items())
        rank_zero_info(f"Data: {', '.join(shown)}")

    def setup(self, stage: str) -> None:
        """Check the trainer's settings, then :meth:`tokenize` with the Lightning module's tokenizer.

        Raises:
            UserError: The trainer's settings do not fit this module, or a title or the template cannot be used.
        """
        trainer: Any = self.trainer
        if stage == "fit" and trainer.reload_dataloaders_every_n_epochs != 1:
            raise UserError("set trainer.reload_dataloaders_every_n_epochs to 1: each epoch draws its own rows")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "set trainer.use_distributed_sampler to false: the data module divides rows among processes"
            )
        self.tokenize(trainer.lightning_module.tokenizer)

    def tokenize(self, tokenizer: Any) -> None:
        """Load, then tokenise the catalogue and the fixed texts of the prompts.

        Args:
            tokenizer: A ``transformers`` tokenizer.

        Raises:
            UserError: Those of :meth:`load`, or a title or the template cannot be used.
        """
        self.load()
        self.tokenizer = tokenizer
        template = self.prompt
        self.item_tokens = self.catalog.tokenize(tokenizer, template.end, template.max_title_tokens, self.cache_dir)
        self.encoder = PromptEncoder(tokenizer, self.item_tokens, self.prompt, self.entries)
        self.requests = Requests.of_users(self)

    def train_rows(self, warm_start: bool) -> np.ndarray:
        """Rows that a phase may train on: [R] int64 event indices."""
        train = self.histories.train
        fresh = int(self.fresh_share * len(train))
        if not fresh:
            return train
        return train[:-fresh] if warm_start else train[-fresh:]

    def stretches(self, epoch: int, warm_start: bool) -> np.ndarray:
        """Stretches of one epoch of a phase, each named by its last row: [S] int64 event indices."""
        stretches = self.histories.stretches(self.train_rows(warm_start), self.prompt.max_history)
        count = self.warm_start_stretches if warm_start else self.policy_stretches
        if count is None or count >= len(stretches):
            return stretches
        return np.random.default_rng([self.seed, epoch]).choice(stretches, count, replace=False)

    def coming(self, epoch: int, warm_start: bool, world_size: int, batches: slice) -> np.ndarray:
        """Stretches in some batches of one epoch of a phase, those of all processes: [S] int64 event indices."""
        plans = [self.plan(epoch, warm_start, rank, world_size)[batches] for rank in range(world_size)]
        return np.unique(np.concatenate([batch for plan in plans for batch in plan]))

    def plan(self, epoch: int, warm_start: bool, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Stretches in each batch that one process trains on in one epoch of a phase."""
        rows = self.stretches(epoch, warm_start)
        lengths = self.encoder.lengths(self.histories, rows, answers=True)
        return plan_batches(rows, lengths, self.batch_size, [self.seed, epoch], rank, world_size)

    def evaluation_rows(self, part: Literal["val", "test"]) -> np.ndarray:
        """Rows that validation or test goes through: [R] int64 event indices in the order of time."""
        rows, count = {"val": (self.histories.val, self.val_rows), "test": (self.histories.test, self.test_rows)}[part]
        count = min(count or len(rows), len(rows))
        return rows[np.arange(count) * len(rows) // count]

    def longest_prompt(self) -> list[int]:
        """Tokens of the longest prompt of any row."""
        histories = self.histories
        rows = np.concatenate([histories.train, histories.val, histories.test])
        row = rows[self.encoder.lengths(histories, rows).argmax()]
        past = histories.past(row, self.encoder.max_history)
        return self.encoder.encode(histories.items[past], histories.entry[past]).tokens

    def dataset(self, plan: list[np.ndarray], warm_start: bool | None) -> BatchDataset:
        """Batches of a plan, for training in the warm start or behind it; None for evaluation."""
        trained = None
        if warm_start is not None:
            trained = np.zeros(len(self.histories.items), dtype=bool)
            trained[self.train_rows(warm_start)] = True
        return BatchDataset(self.histories, self.encoder, plan, trained)

    def batches(
        self, rows: np.ndarray, batch_size: int, warm_start: bool | None = None, rank: int = 0, world_size: int = 1
    ) -> DataLoader[Batch]:
        """Loader of one process's share of ``rows``, longest first, see :func:`recsys.data.batches.plan_batches`.

        Args:
            rows: [R] int64 event indices. A row that another process has already got carries ``row`` -1.
            batch_size: Most rows in a batch.
            warm_start: As for :meth:`dataset`.
            rank: This process.
            world_size: Number of processes.
        """
        lengths = self.encoder.lengths(self.histories, rows, answers=warm_start is not None)
        plan = plan_batches(rows, lengths, batch_size, None, rank, world_size)
        return DataLoader(self.dataset(plan, warm_start), batch_size=None, num_workers=self.num_workers)

    def train_dataloader(self) -> ResumableLoader:
        """The current epoch's stretches; a run that resumes inside the epoch continues with the next batch."""
        trainer: Any = self.trainer
        epoch = trainer.current_epoch
        phase = trainer.lightning_module.phase_at(epoch)
        plan = self.plan(epoch - phase.start, phase.warm_start, trainer.global_rank, trainer.world_size)
        return ResumableLoader(self.dataset(plan, phase.warm_start), trainer, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation rows."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test rows."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The requests."""
        trainer: Any = self.trainer
        return self.requests.batches(self.eval_batch_size, trainer.global_rank, trainer.world_size, self.num_workers)

    def _evaluation(self, part: Literal["val", "test"]) -> DataLoader[Batch]:
        rows, trainer = self.evaluation_rows(part), self.trainer
        assert trainer is not None
        return self.batches(rows, self.eval_batch_size, None, trainer.global_rank, trainer.world_size)
