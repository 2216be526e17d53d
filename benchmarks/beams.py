"""How much of the exact list a beam finds, by its width, and the time that it takes.

    recsys fit --config configs/small.yaml
    python benchmarks/beams.py --ckpt_path checkpoints/small/version_0/last.ckpt --config configs/small.yaml

Recommends to users after all of their events, without what they have seen. What follows ``--config`` goes to
``recsys``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import pandas as pd
from checkpoint import load

from recsys import TrainedRecommender


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of this config")
    parser.add_argument("--users", type=int, default=256, help="users to recommend to")
    parser.add_argument("--k", type=int, default=10, help="items in each list")
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 15, 20, 30, 60, 120], help="widths of the beam")
    arguments, rest = parser.parse_known_args()
    model, _ = load(arguments.ckpt_path, rest)
    data = model.data
    recommender = TrainedRecommender(model.trainer, model, data)
    log, ids = data.histories, pd.Series(data.catalog.item_ids)
    starts = data.requests.start[: arguments.users]
    histories = {int(log.users[a]): ids[log.items[log.users == log.users[a]]].tolist() for a in starts}

    def lists() -> tuple[pd.DataFrame, float]:
        began = time.perf_counter()
        return recommender.recommend(histories, arguments.k), time.perf_counter() - began

    model.exact = True
    exact, exact_seconds = lists()
    model.exact = False
    best = exact[exact["rank"] == 1]
    print("| num_beams | of the exact list | of the best items | ms a user |\n|---|---|---|---|")
    for width in arguments.beams:
        model.dial = replace(model.dial, list_length=width)
        found, seconds = lists()
        shares = (len(found.merge(part, on=["user_id", "item_id"])) / len(part) for part in (exact, best))
        print(f"| {width} | {' | '.join(f'{share:.1%}' for share in shares)} | {1e3 * seconds / len(histories):.1f} |")
    print(f"| exact | 100.0% | 100.0% | {1e3 * exact_seconds / len(histories):.1f} |")


if __name__ == "__main__":
    main()
