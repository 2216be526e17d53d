"""How a window's gain at K grows with the rows that it trains on and with the policy: a figure and a table.

For each size of a policy compare.py makes a warm start and, by its rungs, phases of growing length behind it:

    for size in 16 32 64; do
        OMP_NUM_THREADS=1 python benchmarks/compare.py --config benchmarks/window.yaml --data=online-retail-ii \
            --out=runs/growth/$size --fit+=--model.policy.init_args.hidden_size=$size --seeds='[0]' --seconds=360 \
            --only='["TAWin, K=10"]' --chosen='{}' \
            --grid='[[{model.objective.init_args.learning_rate: 4.0e-4, model.objective.init_args.anchor_coef: 0}]]' \
            --rungs='[0.125, 0.25, 0.5, 1]' --test=false --against='[warm start]'
    done
    python benchmarks/growth.py --variant "TAWin, K=10" --out runs/growth \
        --sizes '{"16 x 2": runs/growth/16, "32 x 2": runs/growth/32, "64 x 2": runs/growth/64}'

Shows the change of Recall@K from the warm start of the same size on the validation rows, with its 95 % interval
over rows and seeds. Writes `growth.md` and `growth.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import pandas as pd
from compare import WARM_START, Run
from matplotlib.figure import Figure
from report import change, hits, read


def main(sizes: dict[str, str], variant: str, out: str, k: int = 10, seeds: tuple[int, ...] = (0,)) -> None:
    """Write the table and the figure.

    Args:
        sizes: Folders that compare.py wrote, by the names of the policies.
        variant: Name of the window's variant in them.
        out: Folder to write to.
        k: The cut-off.
        seeds: Seeds that the runs were made with.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lines = [f"| policy | R@{k} of the warm start | stretches | change of R@{k} |", "|---|---|---|---|"]
    for place, (size, folder) in enumerate(sizes.items()):
        ends = phases(Path(folder), variant)
        start = ranks_of(Path(folder), WARM_START, "", seeds)
        level = hits(start, [k]).mean()
        points = []
        for stretches, label in sorted(ends.items()):
            ranks = {"end": ranks_of(Path(folder), variant, label, seeds), "start": start}
            mean, low, high = change(ranks, "end", "start", [k])[:, 0]
            points.append((stretches, mean, low, high))
            lines.append(f"| {size} | {level:.4f} | {stretches:,} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] |")
        rows, means, lows, highs = zip(*points, strict=True)
        axes.plot(rows, means, color=f"C{place}", marker="o", label=f"{size}, warm start {level:.3f}")
        axes.fill_between(rows, lows, highs, color=f"C{place}", alpha=0.12, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="stretches of the second phase", ylabel=f"change of Recall@{k} from the warm start")
    axes.legend(fontsize=8)
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out) / "growth.png", dpi=110)
    text = "\n".join(lines) + "\n"
    (Path(out) / "growth.md").write_text(text)
    print(text)


def ranks_of(folder: Path, variant: str, label: str, seeds: Sequence[int]) -> pd.DataFrame:
    """Return what each row got at the last validation of a run with these seeds."""
    return read([Run(folder, variant, (), seed, label).ranks(test=False) for seed in seeds])


def phases(folder: Path, variant: str) -> dict[int, str]:
    """Return the labels of the variant's runs, by their numbers of stretches.

    Raises:
        SystemExit: there is none, or two differ in their settings alone.
    """
    labels = {path.parts[-3] for path in (folder / variant).glob("*stretches=*/seed*/cost.json")}
    if not labels:
        raise SystemExit(f"{folder / variant}: no run of compare.py with a number of stretches has ended here")
    found = {int(label.rpartition("=")[2]): label for label in labels}
    if len(found) < len(labels):
        same = ", ".join(sorted(labels))
        raise SystemExit(f"{folder / variant}: runs with other settings and as many stretches: {same}")
    return found


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
