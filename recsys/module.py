"""The LightningModule: a policy, an objective for each phase of training, and the ranking metrics."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from recsys.agreement import check_agreement
from recsys.allowed import Allowed
from recsys.checks import check_interval, check_monitors, check_strategy
from recsys.data import HistoryDataModule, Requests
from recsys.engine import TreeEngine
from recsys.evaluation import Evaluation
from recsys.fingerprint import check_fingerprint, fingerprint, report_changes, settings_of
from recsys.groups import Groups, GroupSource
from recsys.logprobs import Normalization
from recsys.objectives import Counts, GroupObjective, Objective, StepContext, SupervisedFineTuning
from recsys.phase import Phase
from recsys.policy import Policy
from recsys.runs import check_checkpoint
from recsys.search import Ranking, beam_search
from recsys.tree import Places
from recsys.trie import Trie
from recsys.types import Batch, UserError
from recsys.window import DEFAULT_CUTOFFS, DEFAULT_K, Dial, DialSettings, Window


class Recommender(lightning.LightningModule):
    """An LLM policy that recommends items by the log-probability of their titles.

    Training runs in at most two phases: ``warm_start_epochs`` epochs of ``warm_start`` (supervised), then ``objective``
    until the trainer stops. Each phase begins with a fresh optimiser, and its learning rate rises linearly over its
    first ``lr_warmup`` and falls linearly to 0 at its end.

    Args:
        policy: The language model.
        objective: What is optimised after the warm start.
        window: Which Top-K to improve: the window of false positive rates that ``wpauc`` measures and TAWin optimises.
        warm_start: Supervised objective of the first epochs.
        warm_start_epochs: Epochs of the warm start; 0 to start with ``objective`` at once.
        normalization: Distribution over items: ``trie`` (softmax over the legal tokens) or ``vocab`` (over all).
        num_beams: Width of the beam search in validation, test and prediction: the length of the ranked list; null
            reaches beyond the window and the largest cut-off.
        exact: Score the whole catalogue there in place of a search; the ranked list then holds every item.
        cutoffs: Values of K for ``recall@K`` and ``ndcg@K``; the window's own K is added; null is 1, 5, 10, 20.
        lr_warmup: Share of each phase in which the learning rate rises.
    """

    dial: Dial  # after setup
    engine: TreeEngine  # after configure_model

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        window: Window = Window(),
        warm_start: SupervisedFineTuning | None = None,
        warm_start_epochs: int = 0,
        normalization: Normalization = "trie",
        num_beams: int | None = None,
        exact: bool = False,
        cutoffs: tuple[int, ...] | None = None,
        lr_warmup: float = 0.05,
    ) -> None:
        super().__init__()
        if warm_start_epochs < 0:
            raise UserError(f"model.warm_start_epochs must be at least 0, but it is {warm_start_epochs}")
        if warm_start_epochs and warm_start is None:
            raise UserError("model.warm_start_epochs is above 0: give model.warm_start too")
        for name, phase in (("objective", objective), ("warm_start", warm_start)):
            if phase is not None and not 0 <= phase.learning_rate < math.inf:
                raise UserError(
                    f"model.{name}: learning_rate must be at least 0 and finite, but it is {phase.learning_rate:g}"
                )
        if not 0 <= lr_warmup <= 1:
            raise UserError(f"model.lr_warmup is a share of a phase, from 0 to 1, but it is {lr_warmup:g}")
        self.policy = policy
        self.objective = objective
        self.window = window
        self.warm_start = warm_start
        self.warm_start_epochs = warm_start_epochs
        self.normalization: Normalization = normalization
        self.num_beams = num_beams
        self.exact = exact
        self.cutoffs = cutoffs
        self.lr_warmup = lr_warmup
        self.strict_loading = False  # checkpoints hold the adapter alone; on_load_checkpoint checks its keys
        self.groups: Groups | None = None  # of the present epoch, from the GroupSource among the callbacks
        self._clock = (time.perf_counter(), 0)  # at the last training step: seconds, token rows
        self._validated = -1  # optimiser steps before the last validation

    # ---- set-up -----------------------------------------------------------------------------------------------

    @property
    def data(self) -> HistoryDataModule:
        """The trainer's data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.policy.tokenizer

    def prepare(self, trainer: lightning.pytorch.Trainer, data: HistoryDataModule) -> None:
        """Do what a trainer does before its loops, for work outside of them."""
        self.trainer = trainer
        trainer.datamodule = data  # type: ignore[attr-defined]
        self.prepare_data()
        data.tokenize(self.tokenizer)
        self.setup("predict")
        self.configure_model()
        self.to(trainer.strategy.root_device)

    def prepare_data(self) -> None:
        """Check the settings against each other, before data or weights are loaded.

        Raises:
            UserError: if two contradict each other, nothing finds negatives, no metric has the name that a callback
                monitors, or as :func:`recsys.checks.check_strategy`.
        """
        check_strategy(self.trainer)
        settings = self._dial_settings()
        if self.trainer.state.fn == "fit" and not self.objective.supervised and settings.best_share is None:
            raise UserError(
                f"{type(self.objective).__name__} needs negatives: add callbacks.BeamNegatives() to the trainer"
            )
        settings.check(self.window.ends_at())
        if self.window.alpha is None:  # else K depends on the catalogue
            cutoffs = (*(self.cutoffs or DEFAULT_CUTOFFS), self.window.k or DEFAULT_K)
            check_monitors(self.trainer.callbacks, cutoffs)  # type: ignore[attr-defined]

    def _dial_settings(self) -> DialSettings:
        source = next((c for c in self.trainer.callbacks if isinstance(c, GroupSource)), None)  # type: ignore[attr-defined]
        settings = DialSettings(self.window, self.cutoffs, self.num_beams, self.exact)
        trains = self.trainer.state.fn in ("fit", None)  # None: asked for the cost of a fit
        if source is None or not isinstance(self.objective, GroupObjective) or not trains:
            return settings
        reach = self.objective.reach
        return replace(settings, count=source.count, best_share=source.best_share, reach=reach)

    def _shortest_epoch(self) -> int:
        phases = self.phase_at(0), self.phase_at(self.warm_start_epochs)
        return min(len(self.data.plan(0, phase.warm_start, 0, self.trainer.world_size)) for phase in phases)

    def setup(self, stage: str) -> None:
        """Turn the dial to the catalogue, and make the metrics.

        Raises:
            UserError: if a setting does not fit the catalogue.
        """
        trie = Trie.from_sequences(self.data.item_tokens)
        self.dial = self._dial_settings().resolve(trie.num_items, trie.num_items - trie.max_duplicates)
        check_monitors(self.trainer.callbacks, self.dial.cutoffs)  # type: ignore[attr-defined]
        if stage == "fit":
            check_interval(self.trainer, self._shortest_epoch)
        self._trie = trie
        self._fingerprint = fingerprint(self.data, self.tokenizer)
        rank_zero_info(str(self.dial))
        self.evaluations = torch.nn.ModuleDict({part: Evaluation(part, self.dial) for part in ("val", "test")})

    def configure_model(self) -> None:
        """Load the weights on the trainer's device, and put the catalogue's trie beside them.

        Raises:
            UserError: if a prompt with the longest title does not fit the model's context, or the engine cannot run the
                model.
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
        self.engine = TreeEngine(self.policy, self._trie.to(device), self.normalization)
        check_agreement(self.engine, self.data.longest_prompt())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trained weights; :meth:`on_train_batch_start` sets its learning rate."""
        # Fused: an adapter has hundreds of small tensors, and a loop over them takes a tenth of a step on a CPU.
        return torch.optim.AdamW(self.policy.trainable().values(), lr=0.0, weight_decay=0.0, fused=True)

    # ---- training ---------------------------------------------------------------------------------------------

    def phase_at(self, epoch: int) -> Phase:
        """Return the phase of an epoch."""
        last = self.trainer.max_epochs
        if self.warm_start is not None and epoch < self.warm_start_epochs:
            return Phase(self.warm_start, True, 0, self.warm_start_epochs)
        return Phase(self.objective, False, self.warm_start_epochs, None if last is None or last < 0 else last)

    def on_fit_start(self) -> None:
        """Report the number of weights."""
        trained, total = self.policy.num_parameters()
        rank_zero_info(f"Policy: {self.policy.name}, {trained:,} of {total:,} weights are trained")

    def on_train_epoch_start(self) -> None:
        """Start the clock of the token rate."""
        self._clock = (time.perf_counter(), self.engine.token_rows)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin a phase with a fresh optimiser, and set the learning rate from the place in the phase.

        AdamW's second moment has the size of the last phase's gradients: supervised ones are tens of times those of a
        gated policy phase, whose steps they would shrink to nothing.
        """
        epoch = self.current_epoch
        phase = self.phase_at(epoch)
        begins = epoch == phase.start > 0 and batch_idx == 0
        rate = phase.learning_rate(self._place(batch_idx), self.lr_warmup)
        for optimizer in self.trainer.optimizers:
            if begins:
                optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.log("train/lr", rate)

    def _place(self, batch_idx: int) -> float:
        """Return the place of a batch in epochs of the run."""
        return self.current_epoch + batch_idx / self.trainer.num_training_batches

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch under the objective of the epoch.

        Raises:
            UserError: if the loss is not finite; the batch is saved, and the message names its rows.
        """
        phase = self.phase_at(self.current_epoch)
        progress = phase.progress(self._place(batch_idx)) or 0.0
        counts, share = self._counts(batch_idx)
        context = StepContext(self.groups, self.dial.window, progress, counts)
        parts = phase.objective.step(self.engine, batch, context)
        if not bool(parts["loss"].isfinite()):
            raise UserError(self._not_finite(parts["loss"], batch))
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, batch_size=len(batch))
        before, self._clock = self._clock, (time.perf_counter(), self.engine.token_rows)
        self.log("train/tokens_per_second", (self._clock[1] - before[1]) / (self._clock[0] - before[0]))
        self.log("train/token_rows", float(self.engine.token_rows))  # of this process, searches included
        return parts["loss"] / share

    def _counts(self, batch_idx: int) -> tuple[Counts, float]:
        """Return the mean counts of the batches, of all processes, that the optimiser's step takes; and their share.

        Lightning divides each loss by ``accumulate_grad_batches``, also where the epoch ends before there are so many:
        the share of those that there are.
        """
        every = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % every
        dataset: Any = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        counts = dataset.counts[first : min(first + every, int(self.trainer.num_training_batches))]
        mean = torch.tensor(counts.mean(0), dtype=torch.float32, device=self.device)
        titles, rows = self.trainer.strategy.reduce(mean, reduce_op="mean")
        return Counts(titles, rows), len(counts) / every

    def _not_finite(self, loss: Tensor, batch: Batch) -> str:
        """Save a batch, and return what to say of it; that the batch cannot be saved must not hide the rest."""
        path = Path(self.trainer.default_root_dir) / f"bad_batch_step{self.global_step}_rank{self.global_rank}.pt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(batch.to("cpu"), path)
            saved = f"batch saved as {path}"
        except (OSError, RuntimeError) as error:  # torch turns some of the former into the latter
            saved = f"the batch could not be saved as {path} ({error})"
        weights = "" if self._weights_are_finite() else ", as the weights are not finite any more"
        return f"the loss is {loss.item()} on rows {batch.row.tolist()}{weights}; lower the learning rate; {saved}"

    def check_weights(self) -> None:
        """Check the trained weights.

        Raises:
            UserError: if one is not finite.
        """
        if not self._weights_are_finite():
            step = f" after optimiser step {self.global_step}" if self.trainer.state.fn == "fit" else ""
            raise UserError(
                f"the weights are not finite{step}: they are never saved; use an earlier checkpoint, and lower the "
                "learning rate (model.objective, model.warm_start)"
            )

    def check_scores(self, scores: Tensor) -> None:
        """Check scores, which may overflow while the weights are still finite.

        Raises:
            UserError: if one is not a number.
        """
        if bool(scores.isnan().any()):
            raise UserError(
                "the policy's scores are not numbers, as its weights have become too large: use an earlier checkpoint, "
                "and lower the learning rate (model.objective, model.warm_start)"
            )

    def _weights_are_finite(self) -> bool:
        return all(bool(weight.isfinite().all()) for weight in self.policy.trainable().values())

    def on_train_end(self) -> None:
        """Validate what training ends with, unless the last validation was of it."""
        trainer: Any = self.trainer
        if self._validated != self.global_step and trainer.enable_validation and not trainer.fast_dev_run:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    # ---- evaluation -------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Check the weights, which make every score NaN if they are not finite."""
        self.check_weights()

    on_test_start = on_validation_start

    def on_validation_epoch_end(self) -> None:
        """Remember which step was validated."""
        if not self.trainer.sanity_checking:
            self._validated = self.global_step

    @torch.no_grad()
    def rank(self, batch: Batch, k: int = 0, allowed: Allowed | None = None) -> Ranking:
        """Return the best items of each row, at least ``k`` where there are so many, all of them ``allowed``.

        Raises:
            UserError: as :meth:`check_scores`.
        """
        prompt, places = self.engine.prefill(batch.tokens), Places.ends(batch.length)
        if not self.exact:
            ranking = beam_search(self.engine, prompt, places, max(k, self.dial.list_length), allowed)
            self.check_scores(ranking.scores)
            return ranking
        scores = self.engine.score_all(prompt, places)
        self.check_scores(scores)
        if allowed is not None:
            scores = scores.masked_fill(allowed.excludes(len(places)), -torch.inf)
        scores, items = scores.sort(dim=1, descending=True, stable=True)
        return Ranking(items, scores, ~scores.isneginf())

    def _evaluate(self, batch: Batch, part: str) -> dict[str, Tensor]:
        real = batch.row >= 0
        found, row, target = self.rank(batch)[real], batch.row[real], batch.target[real]
        seen = self.data.histories.seen(row.cpu().numpy(), found.items.cpu().numpy())
        evaluation: Any = self.evaluations[part]
        values = evaluation.update(found, target, torch.from_numpy(seen).to(self.device))
        self.log_dict(evaluation.metrics(), on_step=False, on_epoch=True, batch_size=len(batch))
        return {"row": row, "items": found.items, **values}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Rank the rows, update the metrics, and return what each row got, for the callbacks.

        Returns:
            ``row [B]``, ``items [B, W]``, and what :meth:`recsys.evaluation.Evaluation.update` returns.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`, on the test rows."""
        return self._evaluate(batch, "test")

    def allowed(self, requests: Requests) -> Allowed:
        """Return the items that any of the requests may be answered with."""
        only = requests.only
        return Allowed(self.engine.trie, None if only is None else torch.from_numpy(only).to(self.device))

    def answer(self, batch: Batch, requests: Requests, allowed: Allowed) -> Ranking:
        """Return the best items of each request; ``row`` is its number. Raises as :meth:`rank`."""
        row = batch.row.cpu().numpy()
        if requests.exclude_seen:
            allowed = allowed.without(*(torch.from_numpy(part).to(self.device) for part in requests.seen(row)))
        return self.rank(batch, requests.k, allowed)

    def on_predict_start(self) -> None:
        """Refuse weights that are not finite, and look up which items may be recommended."""
        self.check_weights()
        self._allowed = self.allowed(self.data.requests)

    def predict_step(self, batch: Batch, batch_idx: int) -> Ranking:
        """Return the best items of each request of the data module."""
        return self.answer(batch, self.data.requests, self._allowed)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights alone: megabytes, not the base model."""
        trained = {f"policy.{name}" for name in self.policy.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["policy"] = self.policy.name
        checkpoint["fingerprint"] = self._fingerprint
        checkpoint["settings"] = settings_of(self)
        checkpoint["validated"] = self._validated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or of other data, or one that lacks trained weights.

        Raises:
            UserError: see above.
        """
        check_checkpoint(checkpoint)
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
        resumes = self.trainer.state.fn == "fit"
        check_fingerprint(checkpoint["fingerprint"], self._fingerprint, resumes)
        if resumes:
            last = self.trainer.max_epochs
            if last is not None and 0 <= last < checkpoint["epoch"]:
                raise UserError(
                    f"ckpt_path: the checkpoint is of epoch {checkpoint['epoch']}, but trainer.max_epochs is {last}"
                )
            report_changes(checkpoint["settings"], settings_of(self))
            self._validated = checkpoint["validated"]
