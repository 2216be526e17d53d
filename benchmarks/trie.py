"""The catalogue's trie: its building, and a step of constrained decoding against a dictionary of prefixes, in one run.

    python benchmarks/trie.py                    # titles of uniformly random tokens: few shared prefixes
    python benchmarks/trie.py --shared true      # tokens of a Zipf law: many
    python benchmarks/trie.py --codes 10000000   # semantic IDs as well: 8 codes of 256 symbols, and an end token

Every line comes from a process of its own. A step finds the legal next tokens of ``users * beams`` partial titles, and
their log-probabilities. The alternative is what people use: the prefix function of ``transformers.generate`` over a
dictionary, with transformers' own ``PrefixConstrainedLogitsProcessor``. The columns of a step are

* lookup: legal tokens and their log-probabilities, from given log-probabilities of the vocabulary;
* step: the same from hidden states, with the output head (of a small model: it costs both sides about the same).

At the root, ``generate`` asks for every beam, and the search here once per user. The trie's time grows with the number
of children of the nodes that are asked for, not with the number of items.
"""

from __future__ import annotations

import resource
import statistics
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jsonargparse
import torch
from measure import Memory, in_new_process, timed
from torch import Tensor
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from recsys.logprobs import TrieHead
from recsys.trie import Trie

VOCAB, LENGTH = 49_152, 12  # SmolLM2's vocabulary; tokens of a title
SYMBOLS, CODES = 256, 8  # of a semantic ID


def sequences_of(items: int, kind: str) -> Tensor:
    """Return random token sequences ``[items, T]`` int32: ``uniform`` or ``shared`` titles, or ``codes``."""
    torch.manual_seed(0)
    if kind == "uniform":
        return torch.randint(VOCAB, (items, LENGTH), dtype=torch.int32)
    if kind == "shared":
        mass = (1 / torch.arange(1, VOCAB + 1, dtype=torch.float64)).cumsum(0)
        draw = torch.rand(items, LENGTH, dtype=torch.float64) * mass[-1]
        return torch.searchsorted(mass, draw, out_int32=True).clamp(max=VOCAB - 1)
    codes = torch.full((items, CODES + 1), CODES * SYMBOLS, dtype=torch.int32)  # the last column is the end token
    for position in range(CODES):  # each position has symbols of its own
        codes[:, position] = position * SYMBOLS + torch.randint(SYMBOLS, (items,), dtype=torch.int32)
    return codes


def build(items: int, kind: str, repeats: int) -> str:
    """Build the trie and say what it took."""
    padded = sequences_of(items, kind).to("cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    with Memory() as memory:
        for _ in range(repeats):
            trie = None  # one trie at a time
            took, trie = timed(Trie.from_padded, padded)
            seconds.append(took)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    some = torch.randint(items, (1000,), device=padded.device)
    agree = "agree" if torch.equal(trie.tokens[trie.paths(some)], padded[some]) else "DIFFER"
    return (
        f"{kind:8s} {items:9d} items {statistics.median(seconds):8.3f} s {len(trie):9d} nodes "
        f"{trie.nbytes / 1e6:7.1f} MB   peak {memory.bytes / 1e6:6.0f} MB above the input, "
        f"{process / 1e6:6.0f} MB of the process; paths and input {agree}"
    )


def prefix_dictionary(sequences: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return the legal next tokens of every proper prefix. The size that is printed leaves out the integers."""
    legal: dict = {}
    for sequence in sequences:
        for i, token in enumerate(sequence):
            legal.setdefault(tuple(sequence[:i]), set()).add(token)
    for prefix in legal:
        legal[prefix] = list(legal[prefix])
    return legal


def lookup(trie: Trie, node: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :meth:`TrieHead.child_logprobs` does, from given ``logprobs [R, V]`` of the vocabulary."""
    child, row = trie.children(node)
    return logprobs[row, trie.tokens[child].long()], child, row


def over_vocabulary(trie: Trie, found: tuple[Tensor, Tensor, Tensor], rows: int) -> Tensor:
    """Return ``[R, V]`` log-probabilities, -inf where a token is illegal, from those of the children."""
    logprobs, child, row = found
    dense = logprobs.new_full((rows, VOCAB), -torch.inf)
    dense[row, trie.tokens[child].long()] = logprobs
    return dense


class Steps(NamedTuple):
    """What the steps of one size took."""

    text: str
    children: list[int]  # the most that a node of each depth had
    lookups: list[tuple[float, float]]  # seconds at each depth: dictionary, trie


def steps(items: int, kind: str, users: int, beams: int, depths: tuple[int, ...], hidden: int, repeats: int) -> Steps:
    """Walk down the trie along random titles, ``repeats`` times, and time both methods at every depth."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    padded = sequences_of(items, kind)
    sequences = padded.tolist()
    build_seconds, trie = timed(Trie.from_sequences, sequences)
    dictionary_seconds, legal = timed(prefix_dictionary, sequences)
    size = sys.getsizeof(legal) + sum(sys.getsizeof(k) + sys.getsizeof(v) for k, v in legal.items())
    trie, padded = trie.to(device), padded.to(device)

    head = torch.nn.Linear(hidden, VOCAB, device=device).requires_grad_(False)
    trie_head = TrieHead(SimpleNamespace(head=head), trie, "vocab")  # of the policy, this uses the head alone
    constrain = PrefixConstrainedLogitsProcessor(lambda _, ids: legal[tuple(ids.tolist())], beams)

    def generate(ids: Tensor, states: Tensor) -> Tensor:
        return constrain(ids, head(states).log_softmax(1))

    times: list[list[list[float]]] = [[] for _ in range(LENGTH)]  # of each depth, for each repeat, of each method
    width, gap, same = [0] * LENGTH, 0.0, True
    for repeat in range(-1, repeats):  # -1 warms up and checks
        drawn = torch.randint(items, (users * beams,), device=device)
        path = torch.nn.functional.pad(trie.paths(drawn), (1, 0))
        for depth in range(LENGTH):
            ids, rows = padded[drawn, :depth].long(), slice(None, users if depth == 0 else None)
            node, states = path[:, depth], torch.randn(users * beams, hidden, device=device)
            logprobs = head(states).log_softmax(1)
            alternative, masked = timed(constrain, ids, logprobs)
            ours, found = timed(lookup, trie, node[rows], logprobs[rows])
            whole_alternative, _ = timed(generate, ids, states)
            whole_ours, head_found = timed(trie_head.child_logprobs, states[rows], node[rows])
            width[depth] = max(width[depth], int(trie.degree(node).max()))
            if repeat >= 0:
                times[depth].append([alternative, ours, whole_alternative, whole_ours])
                continue
            same &= torch.equal(over_vocabulary(trie, found, len(node[rows])), masked[rows])
            gap = max(gap, float((head_found[0] - found[0]).abs().max()))
    medians = torch.tensor(times).median(1).values  # [LENGTH, 4]

    lines = [
        f"{kind} {items} items, built from lists: dictionary {dictionary_seconds:.2f} s {size / 1e6:.1f} MB, trie "
        f"{build_seconds:.2f} s {trie.nbytes / 1e6:.1f} MB: {dictionary_seconds / build_seconds:.1f} times faster, "
        f"{size / trie.nbytes:.1f} times smaller; legal tokens {'agree' if same else 'DIFFER'}, log-probabilities of "
        f"the engine within {gap:.0e}"
    ]
    rows = {f"depth {depth}": (width[depth], medians[depth]) for depth in depths}
    rows[f"mean 1-{LENGTH - 1}"] = max(width[1:]), medians[1:].mean(0)
    for name, (children, row) in rows.items():
        a, b, c, d = row.tolist()
        lines.append(
            f"  {name:9s} up to {children:5d} children"
            f"   lookup: dictionary {a * 1e3:8.2f} ms, trie {b * 1e3:7.3f} ms, {a / b:7.1f} times faster"
            f"   step: dictionary {c * 1e3:8.1f} ms, trie {d * 1e3:7.1f} ms, {c / d:5.1f} times faster"
        )
    return Steps("\n".join(lines), width, [(row[0], row[1]) for row in medians.tolist()])


def main(
    items: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    shared: bool = False,
    codes: int = 0,
    users: int = 16,
    beams: int = 50,
    depths: tuple[int, ...] = (0, 1, 3, 8),
    hidden: int = 64,
    repeats: int = 3,
) -> None:
    """Run the comparison. Times are medians.

    Args:
        items: Sizes of the catalogue, smallest first, as in ``--items "[1000, 5000]"``.
        shared: Draw the tokens from a Zipf law instead of a uniform one, so that titles share prefixes.
        codes: Also build the trie of this many semantic IDs, once.
        users: Users of a decoding step.
        beams: Partial titles per user.
        depths: Depths to print a line for, below 12. The mean is over all but the root.
        hidden: Width of the hidden states before the output head.
        repeats: Builds, and walks down the trie.
    """
    kind = "shared" if shared else "uniform"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads\nBuilding, median of {repeats}")
    for size in items:
        print(in_new_process(build, size, kind, repeats), flush=True)
    if codes:
        print(in_new_process(build, codes, "codes", 1), flush=True)
    print(f"A decoding step of {users} * {beams} partial titles, median of {repeats} walks; vocabulary {VOCAB}")
    found = []
    for size in items:
        found.append(in_new_process(steps, size, kind, users, beams, depths, hidden, repeats))
        print(found[-1].text, flush=True)
    small, large = found[0], found[-1]
    for depth in depths:
        growth = [b / a for a, b in zip(small.lookups[depth], large.lookups[depth], strict=True)]
        print(
            f"{items[0]} -> {items[-1]} items at depth {depth}: children {small.children[depth]} -> "
            f"{large.children[depth]}, time of a lookup: dictionary {growth[0]:.2f} times, trie {growth[1]:.2f} times"
        )


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
