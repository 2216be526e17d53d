"""Popularity, item-kNN and SASRec of RecTools on the rows, with the ranking and by the metrics of this project.

RecTools needs an older numpy than `constraints.txt` names, so it gets an environment of its own:

    python -m venv ~/baselines && ~/baselines/bin/pip install -e ".[baselines]"
    ~/baselines/bin/python benchmarks/baselines.py --data configs/data/movielens100k.yaml
    ~/baselines/bin/python benchmarks/baselines.py --data mydata.yaml --data.val_rows null --data.test_rows null

Prints a Markdown table for the validation and one for the test rows, as means over seeds and rows with intervals from a
bootstrap that resamples both.

* Models learn from the events of the train rows alone: histories and targets. SASRec learns from the stretches that
  supervised fine-tuning goes through too, so that long histories count whole. Its epochs are chosen for each seed by
  Recall@10 on the validation rows, as checkpoints are.
* A row is evaluated on earlier events of its user, those after the training time too, as prompts are: the newest ones,
  as many as SASRec reads, and for item-kNN as many as Recall@10 on the validation rows chooses. Every item of the
  catalogue is ranked. Items without a score, as the model does not know them, share the last place. A row that gets no
  scores, as all of those events are unknown, is ranked by popularity.
* "filtered" ranks without the items that the user has seen.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings

import jsonargparse
import numpy as np
import pandas as pd
import torch
from implicit.nearest_neighbours import CosineRecommender
from lightning.pytorch import seed_everything
from rectools import Columns
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import ImplicitItemKNNWrapperModel, PopularModel, SASRecModel
from rectools.models.base import ModelBase
from report import interval

from recsys.data import HistoryDataModule
from recsys.functional import place_positive, window_around
from recsys.metrics import NDCG, WPAUC, Recall

CHUNK = 500  # rows that are ranked at a time
METRICS = {**{f"R@{k}": Recall(k) for k in (1, 5, 10, 20)}, "NDCG@10": NDCG(10)}
PARTS = {"val": "validation", "test": "test"}
SHOWN_WITH_INTERVAL = ("R@10", "WPAUC(10±5)")
SASREC = {"n_blocks": 2, "n_heads": 2, "n_factors": 64, "dropout_rate": 0.2, "lr": 1e-3, "batch_size": 64}


def main(
    data: HistoryDataModule,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: tuple[int, ...] = (5, 10, 20, 40, 60),
    history: int = 50,
    newest: tuple[int, ...] = (1, 3, 10, 30, 100, 1000),
    sampled: int | None = None,
) -> None:
    """Train and evaluate the models and print the tables.

    Args:
        data: The data module; a file of `configs/data/` or one like it.
        seeds: Seeds of SASRec. The other models do not depend on chance.
        epochs: Lengths of SASRec's training among which validation chooses.
        history: Most events that SASRec reads.
        newest: Numbers of newest events among which validation chooses those that item-kNN goes by.
        sampled: Negatives drawn at random for each title of SASRec's softmax loss, for a large catalogue; null takes
            the whole catalogue.
    """
    warnings.filterwarnings("ignore", module="pytorch_lightning|rectools|pydantic|torch")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data.load()
    whole = train_sessions(data, len(data.histories.items))
    popular = PopularModel(popularity="n_interactions").fit(whole)
    neighbours = ImplicitItemKNNWrapperModel(CosineRecommender(K=100)).fit(whole)
    stretches = train_sessions(data, history)
    values = {
        "popularity": [{part: evaluate(popular, popular, data, part, 1) for part in PARTS}],
        "item-kNN": [item_knn(neighbours, newest, popular, data)],
        "SASRec": [sasrec(seed, stretches, epochs, history, sampled, popular, data) for seed in seeds],
    }
    for part, name in PARTS.items():
        print(
            table(
                f"{name}, {len(data.evaluation_rows(part)):,} rows", {m: [v[part] for v in values[m]] for m in values}
            )
        )


def sessions(data: HistoryDataModule, rows: np.ndarray, start: np.ndarray, end: np.ndarray) -> Dataset:
    """Make a user of each row, whose events are those of the row's user from ``start`` to before ``end``.

    Args:
        data: Loaded data module.
        rows: [R] event indices, the ids of the users.
        start: [R] event indices.
        end: [R] event indices.
    """
    counts = end - start
    event = np.arange(counts.sum()) + np.repeat(end - np.cumsum(counts), counts)
    events = pd.DataFrame(
        {
            Columns.User: np.repeat(rows, counts),
            Columns.Item: data.histories.items[event],
            Columns.Weight: 1.0,
            Columns.Datetime: event,  # only the order counts, and no two are equal
        }
    )
    users, items = IdMap.from_values(rows), IdMap.from_values(np.arange(len(data.catalog)))
    return Dataset(users, items, Interactions.from_raw(events, users, items))


def train_sessions(data: HistoryDataModule, history: int) -> Dataset:
    """Make a user of each stretch of at most ``history`` events and a target, which the train rows hold."""
    rows = data.histories.stretches(data.histories.train, history)
    return sessions(data, rows, data.histories.history_start(rows, history), rows + 1)


def item_knn(
    model: ModelBase, newest: tuple[int, ...], popular: ModelBase, data: HistoryDataModule
) -> dict[str, pd.DataFrame]:
    """Return the metrics of each part's rows with the number of newest events that is best on validation."""
    val = {count: evaluate(model, popular, data, "val", count) for count in newest}
    shown = ", ".join(f"{count} {metrics['R@10'].mean():.4f}" for count, metrics in val.items())
    print(f"item-kNN, newest events: R@10 {shown}", file=sys.stderr, flush=True)
    best = max(val, key=lambda count: val[count]["R@10"].mean())
    return {"val": val[best], "test": evaluate(model, popular, data, "test", best)}


def sasrec(
    seed: int,
    stretches: Dataset,
    epochs: tuple[int, ...],
    history: int,
    sampled: int | None,
    popular: ModelBase,
    data: HistoryDataModule,
) -> dict[str, pd.DataFrame]:
    """Return the metrics of each part's rows after the epochs that are best on validation."""
    seed_everything(seed, verbose=False)
    loss = {"loss": "softmax"} if sampled is None else {"loss": "sampled_softmax", "n_negatives": sampled}
    model = SASRecModel(session_max_len=history, **SASREC, **loss)
    best: dict[str, pd.DataFrame] = {}
    trained = 0
    for epoch in sorted(epochs):
        began = time.perf_counter()
        model.fit_partial(stretches, min_epochs=epoch - trained, max_epochs=epoch - trained)
        trained = epoch
        seconds = time.perf_counter() - began
        val = evaluate(model, popular, data, "val", history)
        recall = val["R@10"].mean()
        print(f"SASRec, seed {seed}, {epoch} epochs: R@10 {recall:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        if not best or recall > best["val"]["R@10"].mean():
            best = {"val": val, "test": evaluate(model, popular, data, "test", history)}
    return best


def evaluate(model: ModelBase, popular: ModelBase, data: HistoryDataModule, part: str, newest: int) -> pd.DataFrame:
    """Return each metric of the rows of one part, [R, metrics], by the newest events of each row's history."""
    every = data.evaluation_rows(part)
    negatives = len(data.catalog) - 1
    window = window_around(10, 5, negatives)
    frames = []
    for rows in np.split(every, range(CHUNK, len(every), CHUNK)):
        scores = torch.from_numpy(score(model, popular, data, rows, newest))
        items = np.broadcast_to(np.arange(len(data.catalog)), scores.shape)
        relevance = torch.from_numpy(items == data.histories.items[rows][:, None])
        seen = torch.from_numpy(data.histories.seen(rows, items))
        place = place_positive(scores, relevance)
        metrics = {name: metric.place_values(place, negatives).numpy() for name, metric in METRICS.items()}
        metrics["WPAUC(10±5)"] = WPAUC(*window).place_values(place, negatives).numpy()
        metrics["filtered R@10"] = place_positive(scores, relevance, ~seen).recall(10).numpy()
        frames.append(pd.DataFrame(metrics))
    return pd.concat(frames)


def score(model: ModelBase, popular: ModelBase, data: HistoryDataModule, rows: np.ndarray, newest: int) -> np.ndarray:
    """Return the score of each item after the newest events of each row's history, [R, M] float64."""
    histories = sessions(data, rows, data.histories.history_start(rows, newest), rows)
    if isinstance(model, ImplicitItemKNNWrapperModel):
        # its matrix ends with the last item of the train rows; of a later one its own loop reads memory beyond that
        similarity = model.model.similarity.copy()
        similarity.resize(len(data.catalog), len(data.catalog))
        scores = (histories.get_user_item_matrix(include_warm_items=True) @ similarity).toarray()
        scores[scores == 0] = np.nan
    elif isinstance(model, PopularModel) and len(rows) > 1:
        scores = score(model, popular, data, rows[:1], newest).repeat(len(rows), 0)  # the same for all
    else:
        found = model.recommend(
            rows, histories, len(data.catalog), filter_viewed=False, add_rank_col=False, on_unsupported_targets="ignore"
        )
        scores = np.full((len(rows), len(data.catalog)), np.nan)
        scores[pd.Index(rows).get_indexer(found[Columns.User]), found[Columns.Item]] = found[Columns.Score]
    lost = np.isnan(scores).all(1)
    if lost.any():
        scores[lost] = score(popular, popular, data, rows[lost], newest)
    return np.where(np.isnan(scores), np.nanmin(scores) - 1, scores)


def table(title: str, values: dict[str, list[pd.DataFrame]]) -> str:
    """Return the means over seeds and rows of each model, and the 95 % intervals of some."""
    metrics = next(iter(values.values()))[0].columns
    lines = [f"| {title} | seeds | {' | '.join(metrics)} |", "|---" * (len(metrics) + 2) + "|"]
    for name, frames in values.items():
        every = np.stack([frame.to_numpy() for frame in frames])  # [S, R, metrics]
        cells = [
            f"{mean:.4f} [{low:.4f}, {high:.4f}]" if metric in SHOWN_WITH_INTERVAL else f"{mean:.4f}"
            for metric, mean, low, high in zip(metrics, every.mean((0, 1)), *interval(every), strict=True)
        ]
        lines.append(f"| {name} | {len(frames)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
