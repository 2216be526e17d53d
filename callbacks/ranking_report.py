"""Reports every validation: figure and examples in TensorBoard, ranks in Parquet, and a closing table."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from recsys.data import card_markdown, data_card
from recsys.module import Recommender
from recsys.reporting import Validation, closing_table, examples_table, roc_figure
from recsys.reporting.tables import SHOWN
from recsys.runs import results_folder
from recsys.types import UserError


class RankingReport(Callback):
    """Reports every validation, the one of the untrained policy (Lightning's sanity check) included.

    TensorBoard gets the data card, the low end of the ROC curve with the window and the cut-offs, and a table of a few
    users' histories, targets and top items; every logger gets the means over users as ``val_user_mean/<metric>``.
    ``<log folder>/ranks/`` gets each row's rank and metrics as Parquet, for significance tests; without a logger it is
    the checkpoint folder, in training alone. When training ends, a table compares start, warm start and end with paired
    bootstrap intervals. A test gets the means over users (``test_user_mean/<metric>``) and the ranks alone.

    Args:
        examples: Users in the text table; 0 leaves it out.
        resamples: Bootstrap resamples of the rows.
    """

    def __init__(self, examples: int = 5, resamples: int = 2000) -> None:
        if examples < 0:
            raise UserError(f"report.examples must be at least 0, but it is {examples}")
        if resamples < 1:
            raise UserError(f"report.resamples must be at least 1, but it is {resamples}")
        self.examples = examples
        self.resamples = resamples
        self.validations: list[Validation] = []
        self._phase = "start"  # whose step was the last
        self._outputs: list[dict[str, Tensor]] = []
        self._began = 0.0  # of the present validation
        self._ended = time.perf_counter()  # of the last one

    def on_fit_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Write the data card."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("data/card", card_markdown(data_card(pl_module.data)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Recommender, *args: Any) -> None:  # type: ignore[override]
        """Remember the phase."""
        objective = pl_module.phase_at(trainer.current_epoch).objective
        self._phase = "warm start" if objective is pl_module.warm_start else type(objective).__name__

    def on_validation_epoch_start(self, *args: Any) -> None:
        """Start the clock."""
        self._outputs = []
        self._began = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Keep what each row got."""
        kept = {**outputs, "items": outputs["items"][:, :SHOWN]}
        self._outputs.append({name: value.cpu() for name, value in kept.items()})

    on_test_epoch_start = on_validation_epoch_start  # type: ignore[assignment]
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_test_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Log the means over users, and write ``ranks/test.parquet``."""
        result, _ = self._collect(trainer, pl_module)
        folder = results_folder(trainer)  # asks all processes
        for logger in trainer.loggers:
            logger.log_metrics(result.user_means("test"), result.step)
        if trainer.is_global_zero and folder is not None:
            result.write(pl_module.data, pl_module.dial.list_length, folder / "ranks" / "test.parquet")

    def on_validation_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Write figure, examples and ranks."""
        if trainer.sanity_checking and self.validations and self.validations[-1].step == trainer.global_step:
            return  # a resumed run repeats the validation that its checkpoint ends with
        result, items = self._collect(trainer, pl_module)
        self.validations.append(result)
        self._ended = time.perf_counter()
        folder = results_folder(trainer)  # asks all processes
        logged = result.user_means("val")
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged.items()})  # for monitors
        if not trainer.is_global_zero:
            return
        if trainer.sanity_checking:  # Lightning does not log it
            logged |= result.means("val")
        for logger in trainer.loggers:
            logger.log_metrics(logged, result.step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("val/roc", roc_figure(result, pl_module.dial), result.step)
                if self.examples:
                    examples = examples_table(pl_module.data, result.row, items, self.examples)
                    logger.experiment.add_text("val/examples", examples, result.step)
        if folder is not None:
            result.write(pl_module.data, pl_module.dial.list_length, folder / "ranks" / f"step{result.step}.parquet")

    def _collect(self, trainer: Trainer, module: Recommender) -> tuple[Validation, np.ndarray]:
        """Join the batches and processes, in the order of the rows; return the best items of each too."""
        values = {k: torch.cat([out[k] for out in self._outputs]).numpy() for k in self._outputs[0]}
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, values)
            values = {k: np.concatenate([part[k] for part in parts]) for k in values}
        order = values["row"].argsort()
        values = {name: value[order] for name, value in values.items()}
        row, items = values.pop("row"), values.pop("items")
        result = Validation(
            phase=self._phase,
            step=trainer.global_step,
            row=row,
            user=module.data.histories.users[row],
            values=values,
            train_seconds=self._began - self._ended,
            seconds=time.perf_counter() - self._began,
        )
        return result, items

    def on_fit_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Print the closing table."""
        if trainer.is_global_zero and self.validations:
            print(closing_table(self.validations, pl_module.dial, self.resamples), flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the validations so far: a resumed run still compares with its start."""
        return {"validations": [v.to_state() for v in self.validations], "phase": self._phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.validations = [Validation.from_state(v) for v in state_dict["validations"]]
        self._phase = state_dict["phase"]
