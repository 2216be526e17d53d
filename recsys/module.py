"""The LightningModule: a policy, an objective for each phase of training, and the ranking metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection

from recsys.data import HistoryDataModule
from recsys.functional import (
    expected_rank,
    ndcg_at_k,
    recall_at_k,
    window_bounds,
    windowed_partial_auc,
)
from recsys.metrics import NDCG, WPAUC, Recall
from recsys.objectives import GroupObjective, Objective, ScoredGroups, SupervisedFineTuning
from recsys.policy import Policy
from recsys.search import Ranking, beam_search
from recsys.tree import Normalization, TreeEngine
from recsys.trie import Trie
from recsys.types import Batch, Groups, UserError
from recsys.window import Window


class Recommender(lightning.LightningModule):
    """An LLM policy that recommends items by the log-probability of their titles.

    Training runs in at most two phases: ``warm_start_epochs`` epochs of ``warm_start`` (supervised), then ``objective``
    until the trainer stops. The learning rate of each phase rises linearly over its first ``lr_warmup`` and falls
    linearly to 0 at its end.

    Args:
        policy: The language model.
        objective: What is optimised after the warm start.
        window: Window of false positive rates that ``wpauc`` measures and TAWin optimises.
        warm_start: Supervised objective of the first epochs.
        warm_start_epochs: Epochs of the warm start; 0 to start with ``objective`` at once.
        normalization: Distribution over items: ``trie`` (softmax over the legal tokens) or ``vocab`` (over all).
        beams: Width of the beam search in validation, test and prediction: the length of the ranked list.
        exact: Score the whole catalogue there in place of a search; the ranked list then holds every item.
        cutoffs: Values of K for ``recall@K`` and ``ndcg@K``.
        weight_decay: AdamW's weight decay.
        lr_warmup: Share of each phase in which the learning rate rises.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        window: Window,
        warm_start: SupervisedFineTuning | None = None,
        warm_start_epochs: int = 0,
        normalization: Normalization = "trie",
        beams: int = 50,
        exact: bool = False,
        cutoffs: tuple[int, ...] = (1, 5, 10, 20),
        weight_decay: float = 0.0,
        lr_warmup: float = 0.05,
    ) -> None:
        super().__init__()
        if warm_start_epochs and warm_start is None:
            raise UserError("model.warm_start_epochs is above 0: give model.warm_start too")
        self.policy = policy
        self.objective = objective
        self.window = window
        self.warm_start = warm_start
        self.warm_start_epochs = warm_start_epochs
        self.normalization: Normalization = normalization
        self.beams = beams
        self.exact = exact
        self.cutoffs = cutoffs
        self.weight_decay = weight_decay
        self.lr_warmup = lr_warmup
        self.strict_loading = False  # checkpoints hold the adapter alone; on_load_checkpoint checks its keys
        self.finds_negatives = False  # set by the BeamNegatives callback, which then provides the groups
        self.groups: Groups | None = None
        self.engine: TreeEngine
        self._clock = (time.perf_counter(), 0)  # at the last training step: seconds, token rows

    # ---- set-up -----------------------------------------------------------------------------------------------

    @property
    def data(self) -> HistoryDataModule:
        """The trainer's data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.policy.tokenizer

    def setup(self, stage: str) -> None:
        """Check the settings against each other and the catalogue, and make the metrics.

        Raises:
            UserError: if the window or a cut-off does not fit the ranked list, nothing finds negatives, the precision
                is not the policy's own, or the strategy neither averages the gradients of a pass through the decoder
                alone nor needs to.
        """
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"trainer.strategy: {type(self.trainer.strategy).__name__} is not supported; use ddp, or "
                "recsys.shard.ShardedStrategy to divide the base among the processes"
            )
        if self.trainer.precision != "32-true":  # would round the log-probabilities, or the adapter's weights
            raise UserError(
                f"trainer.precision is {self.trainer.precision}: leave it at 32-true, and set the compute type of an "
                "LLMPolicy by its dtype"
            )
        if stage == "fit" and isinstance(self.objective, GroupObjective) and not self.finds_negatives:
            raise UserError(
                f"{type(self.objective).__name__} needs negatives: add callbacks.BeamNegatives to trainer.callbacks"
            )
        items = len(self.data.catalog)
        self.num_negatives = items - 1
        self.alpha, self.d = self.window.rates(self.num_negatives)
        self.listed = items if self.exact else min(self.beams, items)
        _, end = window_bounds(self.alpha, self.d, self.num_negatives)
        if end > self.listed - 1:
            raise UserError(
                f"model.window ends at negative {end:g}, but a list of {self.listed} items holds {self.listed - 1} of "
                "them: raise model.beams or lower the window"
            )
        for k in self.cutoffs:
            if not 1 <= k <= self.listed:
                raise UserError(
                    f"model.cutoffs: {k} is not within the ranked list of {self.listed} items; raise model.beams"
                )
        metrics: dict[str, Any] = {f"recall@{k}": Recall(k) for k in self.cutoffs}
        metrics |= {f"ndcg@{k}": NDCG(k) for k in self.cutoffs}
        # Compute groups would merge metrics whose states agree after the first batch, such as two recalls of 0.
        filtered = MetricCollection(metrics, compute_groups=False)
        everything = MetricCollection({**metrics, "wpauc": WPAUC(self.alpha, self.d)}, compute_groups=False)
        self.val_metrics, self.test_metrics = everything.clone(prefix="val/"), everything.clone(prefix="test/")
        # Names of their own before the slash: TensorBoard shows them as groups of their own.
        self.val_filtered = filtered.clone(prefix="val_filtered/")
        self.test_filtered = filtered.clone(prefix="test_filtered/")

    def configure_model(self) -> None:
        """Load the weights on the trainer's device, and put the catalogue's trie beside them.

        Raises:
            UserError: if a prompt with the longest title does not fit the model's context.
        """
        device = self.trainer.strategy.root_device
        self.policy.build(device)
        context = getattr(self.policy.causal_lm.config, "max_position_embeddings", None)
        needed = self.data.prompt.max_tokens + max(map(len, self.data.item_tokens))
        if context is not None and needed > context:
            raise UserError(
                f"data.prompt.max_tokens and the longest title need {needed} positions, but {self.policy.name} has "
                f"{context}: lower max_tokens"
            )
        self.policy.train()  # from_pretrained leaves the base in eval mode
        trie = Trie.from_sequences(self.data.item_tokens).to(device)
        self.engine = TreeEngine(self.policy, trie, self.normalization)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trained weights; :meth:`on_train_batch_start` sets its learning rate."""
        # Fused: an adapter has hundreds of small tensors, and a loop over them takes a tenth of a step on a CPU.
        return torch.optim.AdamW(self.policy.trainable().values(), lr=0.0, weight_decay=self.weight_decay, fused=True)

    # ---- training ---------------------------------------------------------------------------------------------

    def objective_at(self, epoch: int) -> Objective:
        """Return the objective of an epoch."""
        return self.warm_start if epoch < self.warm_start_epochs and self.warm_start else self.objective

    def trains_on_windows(self, epoch: int) -> bool:
        """Return whether an epoch trains on every title of history windows, not on single rows with negatives."""
        return isinstance(self.objective_at(epoch), SupervisedFineTuning)

    def on_fit_start(self) -> None:
        """Report the number of weights."""
        trained, total = self.policy.num_parameters()
        rank_zero_info(f"Policy: {self.policy.name}, {trained:,} of {total:,} weights are trained")
        for logger in self.trainer.loggers:
            logger.log_metrics({"policy/trained_weights": trained, "policy/weights": total}, step=0)

    def on_train_epoch_start(self) -> None:
        """Start the clock of the token rate."""
        self._clock = (time.perf_counter(), self.engine.token_rows)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate from the place within the phase; it has no state that a resumed run could lose."""
        epoch, last = self.current_epoch, self.trainer.max_epochs or -1
        warm = epoch < self.warm_start_epochs
        start, end = (0, self.warm_start_epochs) if warm else (self.warm_start_epochs, last)
        place = epoch - start + batch_idx / self.trainer.num_training_batches
        factor = 1.0
        if end > start:
            place /= end - start
            factor = 1 - place
            if self.lr_warmup:
                factor *= min(1.0, place / self.lr_warmup + 0.1)  # the very first step should move something
        rate = self.objective_at(epoch).learning_rate * factor
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.log("train/lr", rate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch under the objective of the epoch.

        Raises:
            RuntimeError: if the loss is not finite; the batch is saved, and the message names its rows.
        """
        objective = self.objective_at(self.current_epoch)
        if isinstance(objective, GroupObjective):
            parts = self._group_step(batch, objective)
        else:
            scores, hidden = self.engine.forward(batch.tokens, batch.length, batch.target[:, None])
            titles = self.engine.history_logprobs(hidden, batch.history, batch.history_start)
            parts = {"loss": -(scores.sum() + titles.sum()) / (len(batch) + (batch.history >= 0).sum())}
        if not bool(parts["loss"].isfinite()):
            path = Path(self.trainer.default_root_dir) / f"bad_batch_step{self.global_step}_rank{self.global_rank}.pt"
            torch.save(batch.to("cpu"), path)
            loss, rows = parts["loss"].item(), batch.row.tolist()
            raise RuntimeError(f"the loss is {loss} on rows {rows}; batch saved as {path}")
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, batch_size=len(batch))
        before, self._clock = self._clock, (time.perf_counter(), self.engine.token_rows)
        self.log("train/tokens_per_second", (self._clock[1] - before[1]) / (self._clock[0] - before[0]))
        self.log("train/token_rows", float(self.engine.token_rows))  # of this process, searches included
        return parts["loss"]

    def _group_step(self, batch: Batch, objective: GroupObjective) -> dict[str, Tensor]:
        assert self.groups is not None  # setup made sure of the callback
        index = self.groups.find(batch.row)
        trains = objective.trains(self.groups.behaviour[index])
        rows = len(batch)
        # One group at least goes through the model: a process without a backward pass would leave the others waiting.
        weight = trains.float()
        trains[0] |= ~trains.any()
        batch, index, weight = batch[trains], index[trains], weight[trains]
        scores, _ = self.engine.forward(batch.tokens, batch.length, self.groups.items[index])
        reference = self.groups.reference
        groups = ScoredGroups(
            scores,
            self.groups.behaviour[index],
            None if reference is None else reference[index],
            (self.alpha, self.d, self.num_negatives),
        )
        # Means over the whole batch, to which a group that is not trained adds nothing.
        parts = {name: (weight * value).sum() / rows for name, value in objective.loss(groups).items()}
        return {**parts, "groups": weight.sum() / rows}

    # ---- evaluation -------------------------------------------------------------------------------------------

    def rank(self, batch: Batch) -> Ranking:
        """Return the best items of each row."""
        with torch.no_grad():
            prompt = self.engine.prefill(batch.tokens, batch.length)
            if not self.exact:
                return beam_search(self.engine, prompt, self.beams)
            scores, items = self.engine.score_all(prompt).sort(dim=1, descending=True, stable=True)
            return Ranking(items, scores, torch.ones_like(items, dtype=torch.bool))

    def _evaluate(self, batch: Batch, metrics: MetricCollection, filtered: MetricCollection) -> dict[str, Tensor]:
        found = self.rank(batch)
        real = batch.row >= 0
        row, scores, items = batch.row[real], found.scores[real], found.items[real]
        relevance = (items == batch.target[real, None]) & found.valid[real]
        seen = torch.from_numpy(self.data.histories.seen(row.cpu().numpy(), items.cpu().numpy())).to(items.device)
        unseen = scores.masked_fill(seen & ~relevance, -torch.inf)
        if len(scores):
            metrics.update(scores, relevance, self.num_negatives)
            filtered.update(unseen, relevance)
        logged = dict(metrics.items()) | dict(filtered.items())
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(batch))
        values: dict[str, Tensor] = {}
        for prefix, ranked in (("", scores), ("filtered_", unseen)):
            values |= {f"{prefix}recall@{k}": recall_at_k(ranked, relevance, k) for k in self.cutoffs}
            values |= {f"{prefix}ndcg@{k}": ndcg_at_k(ranked, relevance, k) for k in self.cutoffs}
        values["wpauc"] = windowed_partial_auc(scores, relevance, self.alpha, self.d, self.num_negatives)
        return {
            "row": row,
            "items": items,
            "rank": expected_rank(scores, relevance),
            **values,
        }

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Rank the rows, update the metrics, and return what each row got, for the callbacks.

        Returns:
            ``row [B]``, ``items [B, W]``, ``rank [B]`` (inf if not in the list), and each metric's ``[B]`` by its name.
            Metrics with ``filtered_`` are of the list without the items that the user has seen, the target apart.
        """
        return self._evaluate(batch, self.val_metrics, self.val_filtered)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`, on the test rows."""
        return self._evaluate(batch, self.test_metrics, self.test_filtered)

    def predict_step(self, batch: Batch, batch_idx: int) -> Ranking:
        """Return the best items of each row."""
        return self.rank(batch)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights alone: megabytes, not the base model."""
        trained = {f"policy.{name}" for name in self.policy.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["policy"] = self.policy.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, or one that lacks trained weights.

        Raises:
            UserError: see above.
        """
        if checkpoint.get("policy") != self.policy.name:
            raise UserError(
                f"ckpt_path: the checkpoint is of the model {checkpoint.get('policy')!r}, the config's is "
                f"{self.policy.name!r}"
            )
        found = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        expected = {f"policy.{name}": p.shape for name, p in self.policy.trainable().items()}
        if found != expected:
            wrong = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            raise UserError(
                f"ckpt_path: {len(wrong)} trained weights are missing from the checkpoint, unknown to the model or of "
                f"another shape, first {wrong[0]}; use the config that the checkpoint was made with"
            )
