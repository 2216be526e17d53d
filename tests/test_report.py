"""The figure, the bootstrap and the closing table."""

from __future__ import annotations

from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from recsys.data import Catalog, Histories, card_markdown
from recsys.reporting import Validation, bootstrap_interval, closing_table, examples_table, roc_figure
from recsys.window import Dial, DialSettings, Window


def dial(*cutoffs: int, window: Window = Window(k=10)) -> Dial:
    return DialSettings(window, cutoffs, num_beams=21).resolve(num_items=101, most_negatives=100)


def validation(phase: str, ranks: list[float], step: int = 0, user: list[int] | None = None) -> Validation:
    rank = np.array(ranks)
    values = {f"recall@{k}": (rank <= k).astype(float) for k in (1, 10)}
    values |= {f"ndcg@{k}": (rank <= k) / np.log2(rank + 1) for k in (1, 10)}
    window = np.arange(3, 8)  # recalls of the window (2, 7]
    values |= {"filtered_recall@10": (rank <= 20).astype(float)}  # as if ten items were seen
    values |= {"wpauc": (rank[:, None] <= window).mean(1), "rank": rank}
    row = np.arange(len(rank))
    return Validation(phase, step, row, row if user is None else np.array(user), values, train_seconds=2.0, seconds=1.0)


def test_bootstrap_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(0.3, 2.0, size=400)
    low, high = bootstrap_interval(difference, 4000)
    error = difference.std() / np.sqrt(400)
    assert low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)


def test_closing_table_takes_the_last_of_each_phase_and_pairs_the_rows() -> None:
    runs = [
        validation("start", [50, 50, 50, 50]),
        validation("warm start", [50, 50, 50, 9]),
        validation("warm start", [50, 50, 9, 9]),
        validation("TAWin", [50, 1, 9, 9]),
    ]
    text = closing_table(runs, dial(1, 10), resamples=200)
    lines = [line.split() for line in text.splitlines() if line]
    assert lines[1][:2] == ["start", "4"]
    assert lines[2][:5] == ["warm", "start", "4", "0.0000", "0.5000"]
    assert lines[2][-2:] == ["4", "2"]  # seconds of both warm-start epochs
    assert lines[3][:4] == ["TAWin", "4", "0.2500", "0.7500"]
    assert "recall@10: TAWin - start = +0.7500" in text
    assert "recall@10: TAWin - warm start = +0.2500" in text


def test_closing_table_gives_user_means_and_filtered_means() -> None:
    """User 0 has three rows of four."""
    text = closing_table([validation("start", [1, 15, 15, 50], user=[0, 7, 0, 0])], dial(1, 10), resamples=50)
    assert "start: mean over 2 users: recall@10 0.1667, wpauc 0.1667; without seen items: recall@10 0.7500" in text


def test_closing_table_of_a_run_that_was_resumed_with_other_cutoffs() -> None:
    text = closing_table([validation("start", [1, 50]), validation("TAWin", [1, 9])], dial(1, 5, 10), resamples=50)
    assert text.split()[3:9] == ["R@1", "R@10", "N@1", "N@10", "WPAUC", "train"]


def test_closing_table_pairs_the_rows_that_a_resumed_run_still_validates() -> None:
    start, end = validation("start", [1, 1, 1, 50]), validation("TAWin", [50, 1])
    end.row = np.array([0, 3])
    text = closing_table([start, end], dial(1, 10), resamples=50)
    assert "recall@10: TAWin - start = +0.0000 [" in text  # row 0 falls, row 3 rises
    assert "over 2 rows" in text
    end.row += 10
    assert "TAWin - start" not in closing_table([start, end], dial(1, 10), resamples=50)


def test_roc_figure_draws_recall_against_rank_and_shades_the_window() -> None:
    ranks = [1, 1, 4, 9, 30, np.inf]
    axes = roc_figure(validation("TAWin", ranks), dial(1, 5, 10, window=Window(alpha=0.02, d=0.05))).axes[0]
    curve = axes.lines[0]
    for k in range(1, 21):
        assert curve.get_ydata()[k - 1] == pytest.approx(np.mean([r <= k for r in ranks]))
    [shade] = [p for p in axes.patches if p.get_alpha() == 0.15]
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((2, 7))
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[1:]]
    assert marks == [(k - 1, pytest.approx(np.mean([r <= k for r in ranks]))) for k in (1, 5, 10)]


def test_the_report_is_of_the_chosen_k() -> None:
    ranks = [1, 3, 50]
    values = {f"recall@{k}": (np.array(ranks) <= k).astype(float) for k in (1, 3)} | {"rank": np.array(ranks, float)}
    row = np.arange(3)
    shown = [Validation(phase, 0, row, row, values, 0.0, 0.0) for phase in ("start", "TAWin")]
    text = closing_table(shown, dial(1, window=Window(k=3)), resamples=50)
    assert "recall@3: TAWin - start = " in text
    assert "recall@1: " not in text


class Page(HTMLParser):
    """The tags of a page, and the texts of its table's cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and data.strip():
            self.cells[-1] += data


TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
HOSTILE = [
    "<img src=http://example.com/a.png>",
    "![x](http://example.com/a.png)",
    "a [link](http://example.com)",
    "<http://example.com>",
    "a|b",
    "*x* _y_ `z` ~~w~~ $1 #2 \\| &lt;img src=x&gt; &amp;",
]


def test_texts_of_the_data_are_shown_as_they_are() -> None:
    """By what TensorBoard makes of Markdown."""
    items = np.arange(6)
    data = SimpleNamespace(
        catalog=Catalog([str(i) for i in items], HOSTILE),
        histories=Histories(np.zeros(6, int), items, items),
        user_ids=pd.Index(["<img src=x>\n|_u_"]),
    )
    page = Page(markdown_to_safe_html(examples_table(data, np.array([5]), items[None, [4, 5, 1]], 1)))
    assert page.tags <= TABLE | {"strong"}
    first, target, top = page.cells[3:]
    user, history = first.split(": ", 1)
    assert user.split() == ["<img", "src=x>", "|_u_"]
    assert history == "; ".join(HOSTILE[:5])
    assert target == HOSTILE[5]
    assert top == "; ".join(HOSTILE[i] for i in (4, 5, 1))
    page = Page(markdown_to_safe_html(card_markdown({"dropped": dict.fromkeys(HOSTILE, 0.5)})))
    assert page.tags <= TABLE
    assert page.cells[-1] == ", ".join(f"{name} 0.5" for name in HOSTILE)
