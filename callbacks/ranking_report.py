"""What a run shows of its rankings: a figure and examples in TensorBoard, ranks in Parquet, and a closing table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from recsys.data import HistoryDataModule, card_markdown, data_card
from recsys.functional import window_bounds
from recsys.module import Recommender
from recsys.types import Batch


@dataclass
class Validation:
    """One validation (or test) of the policy."""

    phase: str
    step: int
    row: np.ndarray  # [R] row ids, ascending
    user: np.ndarray  # [R] the user of each row
    values: dict[str, np.ndarray]  # each metric's [R], and the rank's
    train_seconds: float  # since the validation before
    seconds: float

    def mean(self, metric: str) -> float:
        """Return the metric over all rows."""
        return float(self.values[metric].mean())

    def user_mean(self, metric: str) -> float:
        """Return the mean over users of the metric over a user's rows: active users count no more than others."""
        return float(pd.Series(self.values[metric]).groupby(self.user).mean().mean())

    def user_means(self, part: str) -> dict[str, float]:
        """Return the user means of the metrics of full lists, by the names that loggers get."""
        plain = [name for name in self.metrics if not name.startswith("filtered_")]
        return {f"{part}_user_mean/{name}": self.user_mean(name) for name in plain}

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return [name for name in self.values if name != "rank"]


class RankingReport(Callback):
    """Reports every validation, the one of the untrained policy (Lightning's sanity check) included.

    TensorBoard gets the data card, the low end of the ROC curve with the window and the cut-offs, and a table of a few
    users' histories, targets and top items; every logger gets the means over users as ``val_user_mean/<metric>``.
    ``<log folder>/ranks/`` gets each row's rank and metrics as Parquet, for significance tests. When training ends, a
    table compares start, warm start and end with paired bootstrap intervals. A test gets the means over users
    (``test_user_mean/<metric>``) and the ranks alone.

    Args:
        examples: Users in the text table.
        top: Items listed for each of them.
        resamples: Bootstrap resamples of the rows.
    """

    def __init__(self, examples: int = 5, top: int = 5, resamples: int = 2000) -> None:
        self.examples = examples
        self.top = top
        self.resamples = resamples
        self.validations: list[Validation] = []
        self._outputs: list[dict[str, Tensor]] = []
        self._began = 0.0  # of the present validation
        self._ended = time.perf_counter()  # of the last one

    def on_fit_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Write the data card."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("data/card", card_markdown(data_card(pl_module.data)))

    # ---- each validation --------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Start the clock."""
        self._outputs = []
        self._began = time.perf_counter()

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: Recommender,
        outputs: dict[str, Tensor],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what each row got."""
        items = outputs["items"][:, : self.top]
        self._outputs.append({k: v.cpu() for k, v in {**outputs, "items": items}.items()})

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """As for validation."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """As for validation."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_test_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Log the means over users, and write ``ranks/test.parquet``."""
        result = self._collect(trainer, pl_module)
        del result.values["items"]
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "ranks"  # asks all processes
        for logger in trainer.loggers:
            logger.log_metrics(result.user_means("test"), result.step)
        if trainer.is_global_zero:
            _write_ranks(pl_module.data, result, folder / "test.parquet")

    def on_validation_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Write figure, examples and ranks."""
        if trainer.sanity_checking and self.validations:
            return  # a resumed run repeats the validation that its checkpoint ends with
        result = self._collect(trainer, pl_module)
        items = result.values.pop("items")
        self.validations.append(result)
        self._ended = time.perf_counter()
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "ranks"  # asks all processes
        if not trainer.is_global_zero:
            return
        logged = result.user_means("val")
        if trainer.sanity_checking:  # Lightning does not log it
            logged |= {_tag(name): result.mean(name) for name in result.metrics}
        for logger in trainer.loggers:
            logger.log_metrics(logged, result.step)
        _write_ranks(pl_module.data, result, folder / f"step{result.step}.parquet")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("val/roc", roc_figure(result, pl_module), result.step)
                text = self._examples(pl_module.data, result.row, items)
                logger.experiment.add_text("val/examples", text, result.step)

    def _collect(self, trainer: Trainer, module: Recommender) -> Validation:
        """Join the batches and processes, in the order of the rows."""
        values = {k: torch.cat([out[k] for out in self._outputs]).numpy() for k in self._outputs[0]}
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, values)
            values = {k: np.concatenate([part[k] for part in parts]) for k in values}
        order = values["row"].argsort()
        row = values.pop("row")[order]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            phase = "start"
        else:
            warm = trainer.current_epoch < module.warm_start_epochs
            phase = "warm start" if warm else type(module.objective_at(trainer.current_epoch)).__name__
        return Validation(
            phase=phase,
            step=trainer.global_step,
            row=row,
            user=module.data.histories.users[row],
            values={k: v[order] for k, v in values.items()},
            train_seconds=self._began - self._ended,
            seconds=time.perf_counter() - self._began,
        )

    def _examples(self, data: HistoryDataModule, row: np.ndarray, items: np.ndarray) -> str:
        titles = data.catalog.titles
        lines = ["| user | history (newest last) | target | top items |", "|---|---|---|---|"]
        for r, best in list(zip(row, items, strict=True))[:: max(1, len(row) // self.examples)][: self.examples]:
            history = "; ".join(titles[i] for i in data.histories.history(r, self.top))
            target = data.histories.items[r]
            top = "; ".join(f"**{titles[i]}**" if i == target else titles[i] for i in best)
            user = data.user_ids[data.histories.users[r]]
            lines.append("|" + "|".join(str(c).replace("|", "\\|") for c in (user, history, titles[target], top)) + "|")
        return "\n".join(lines)

    # ---- the end ----------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Print the closing table."""
        if trainer.is_global_zero and self.validations:
            print(closing_table(self.validations, pl_module.cutoffs, self.resamples), flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the validations so far: a resumed run still compares with its start.

        As tensors: Lightning loads checkpoints with ``weights_only``, which refuses arrays.
        """
        return {"validations": [_map_arrays(vars(v), torch.from_numpy) for v in self.validations]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.validations = [Validation(**_map_arrays(v, Tensor.numpy)) for v in state_dict["validations"]]


def _map_arrays(fields: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    values = {name: convert(array) for name, array in fields["values"].items()}
    return {**fields, "row": convert(fields["row"]), "user": convert(fields["user"]), "values": values}


def _tag(metric: str) -> str:
    """Return the name under which the Lightning module logs a metric of the rows."""
    name = metric.removeprefix("filtered_")
    return f"val/{name}" if name == metric else f"val_filtered/{name}"


def _write_ranks(data: HistoryDataModule, result: Validation, path: Path) -> None:
    """Write what each row got, with the source's ids of its user and its target."""
    frame = pd.DataFrame(
        {
            "row": result.row,
            "user_id": data.user_ids[result.user],
            "item_id": np.array(data.catalog.item_ids)[data.histories.items[result.row]],
            **result.values,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path)


def roc_figure(result: Validation, module: Recommender) -> Figure:
    """Plot the share of rows whose positive is beaten by at most x negatives, for the x around the cut-offs."""
    beaten = result.values["rank"] - 1
    x = np.arange(min(module.listed, 4 * max(module.cutoffs)))
    rate = (beaten[None] <= x[:, None]).mean(1)
    everyone = module.num_negatives
    a, b = window_bounds(module.alpha, module.d, everyone)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(x, rate, where="post", color="C0", label="ROC curve")
    axes.fill_between(x, rate, step="post", where=(x >= a) & (x <= b), color="C1", alpha=0.35, linewidth=0)
    label = f"window: WPAUC = {result.mean('wpauc'):.4f}"
    axes.axvspan(a, b, color="C1", alpha=0.15, linewidth=0, label=label)
    for k in module.cutoffs:
        axes.plot(k - 1, rate[k - 1], "o", color="C3", markersize=4)
        axes.annotate(f"K={k}", (k - 1, rate[k - 1]), textcoords="offset points", xytext=(4, -11), fontsize=8)
    axes.set(xlim=(0, x[-1]), ylim=(0, None), ylabel="true positive rate (Recall@x+1)")
    axes.set_xlabel("negatives above the positive, x")
    top = axes.secondary_xaxis("top", (lambda n: np.divide(n, everyone), lambda f: np.multiply(f, everyone)))
    top.set_xlabel("false positive rate")
    axes.set_title(f"{result.phase}, step {result.step}, {len(result.row)} rows", fontsize=10)
    axes.legend(loc="upper left", fontsize=8)
    return figure


def bootstrap_interval(difference: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``difference [R]`` over resampled rows."""
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def closing_table(validations: list[Validation], cutoffs: tuple[int, ...], resamples: int) -> str:
    """Return a table of the first validation and the last of each phase, and the paired differences from the end.

    Below the table stand the means over users, and the means over rows of the lists without the items already seen.
    """
    last_of_phase = {v.phase: v for v in validations}
    shown = list(last_of_phase.values())
    names = [f"recall@{k}" for k in cutoffs] + [f"ndcg@{k}" for k in cutoffs] + ["wpauc"]
    names = [n for n in names if all(n in v.values for v in shown)]  # a resumed run may have other cut-offs
    trained = {p: sum(v.train_seconds for v in validations if v.phase == p) for p in last_of_phase}
    validated = {p: sum(v.seconds for v in validations if v.phase == p) for p in last_of_phase}
    short = [name.replace("recall", "R").replace("ndcg", "N").upper() for name in names]
    header = ["validation after", "rows", *short, "train s", "val s"]
    lines = [header]
    for v in shown:
        times = ["-" if v is validations[0] else f"{trained[v.phase]:.0f}", f"{validated[v.phase]:.0f}"]
        lines.append([v.phase, str(len(v.row)), *(f"{v.mean(n):.4f}" for n in names), *times])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["", *("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines), ""]
    end, compared = shown[-1], [n for n in ("recall@10", "wpauc") if n in names]
    for v in shown:
        of_users = ", ".join(f"{n} {v.user_mean(n):.4f}" for n in compared)
        text.append(f"{v.phase}: mean over {len(np.unique(v.user))} users: {of_users}")
        if "filtered_recall@10" in v.values:
            text[-1] += f"; without seen items: recall@10 {v.mean('filtered_recall@10'):.4f}"
    text.append("")
    for before in shown[:-1]:
        _, at_end, at_before = np.intersect1d(end.row, before.row, return_indices=True)  # the rows may differ, too
        for name in compared if len(at_end) else []:
            difference = end.values[name][at_end] - before.values[name][at_before]
            low, high = bootstrap_interval(difference, resamples)
            text.append(
                f"{name}: {end.phase} - {before.phase} = {difference.mean():+.4f} "
                f"[{low:+.4f}, {high:+.4f}] (paired bootstrap over {len(difference)} rows, 95 %)"
            )
    return "\n".join(text)
