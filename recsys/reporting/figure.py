"""The low end of the ROC curve, with the window."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from recsys.reporting.validation import Validation
from recsys.window import Dial


def roc_figure(result: Validation, dial: Dial) -> Figure:
    """Plot the share of rows whose positive is beaten by at most x negatives, for the x around the cut-offs."""
    beaten, window = result.values["rank"] - 1, dial.window
    x = np.arange(min(dial.list_length, 4 * max(dial.cutoffs)))
    rate = (beaten[None] <= x[:, None]).mean(1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(x, rate, where="post", color="C0", label="ROC curve")
    inside = (x >= window.start) & (x <= window.end)
    axes.fill_between(x, rate, step="post", where=inside, color="C1", alpha=0.35, linewidth=0)
    label = f"window: WPAUC = {result.mean('wpauc'):.4f}"
    axes.axvspan(window.start, window.end, color="C1", alpha=0.15, linewidth=0, label=label)
    for k in dial.cutoffs:
        axes.plot(k - 1, rate[k - 1], "o", color="C3", markersize=4)
        axes.annotate(f"K={k}", (k - 1, rate[k - 1]), textcoords="offset points", xytext=(4, -11), fontsize=8)
    axes.set(xlim=(0, x[-1]), ylim=(0, None), ylabel="true positive rate (Recall@x+1)")
    axes.set_xlabel("negatives above the positive, x")
    everyone = window.num_negatives
    top = axes.secondary_xaxis("top", (lambda n: np.divide(n, everyone), lambda f: np.multiply(f, everyone)))
    top.set_xlabel("false positive rate")
    axes.set_title(f"{result.phase}, step {result.step}, {len(result.row)} rows", fontsize=10)
    axes.legend(loc="upper left", fontsize=8)
    return figure
