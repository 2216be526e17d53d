"""The engine and the search against one full row per item through the whole model."""

import copy
import functools
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recsys.engine import PromptCache, TreeEngine
from recsys.policy import LLMPolicy, Lora, Policy, TinyPolicy
from recsys.search import Wanted, beam_search, best_first_search
from recsys.tree import Places
from recsys.trie import Trie
from tests.naive import all_logprobs, item_logprob

TITLES = ["Toy", "Toy Story", "Toy Story 2", "Heat", "Heat", "He", "Ronin", "Ran", "Alien", "Aliens", "Ça va", "X"]
SEQUENCES = [[*title.encode(), 256] for title in TITLES]
PROMPTS = [[65, 66, 67, 68, 69], [70, 71], [72, 73, 74, 75, 76, 77, 78, 79, 80]]


class Shape(Policy):
    """A small random model of a given architecture."""

    lora = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.name = kind
        size = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(
                Qwen2Config(**size, intermediate_size=64, num_key_value_heads=2, initializer_range=0.2)
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(**size, intermediate_size=64, num_key_value_heads=2, initializer_range=0.2)
            )
        self.fresh = model.eval()

    def load(self, device: torch.device) -> LlamaForCausalLM:
        return self.fresh


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_dropout_of_the_base_and_of_an_adapter_is_off_in_training(name: str) -> None:
    """The policy that finds groups is scored without: a ratio of 1 at the first step needs an update without it too."""
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4),  # 0.1 in its layers by default
        "opt": OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.2),
        "llama": LlamaConfig(**sizes, intermediate_size=64, attention_dropout=0.3),
    }
    policy = Shape("llama")
    base = AutoModelForCausalLM.from_config(configs[name])
    options = {"r": 4, "lora_dropout": 0.5, "target_modules": "all-linear", "init_lora_weights": False}
    policy.lora = Lora()
    policy.fresh = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM"))
    policy.build(torch.device("cpu"))
    engine = TreeEngine(policy, Trie.from_sequences(SEQUENCES), "trie")
    items = torch.arange(len(TITLES)).expand(len(PROMPTS), -1)
    policy.eval()
    with torch.no_grad():
        found = TreeEngine.score(*prefill(engine, PROMPTS), items)
    policy.train()
    updated = forward(engine, PROMPTS, items)
    torch.testing.assert_close(updated, found, atol=2e-5, rtol=1e-5)


def make(kind: str = "llama", normalization: str = "trie") -> TreeEngine:
    policy = Shape(kind)
    policy.build(torch.device("cpu"))
    return TreeEngine(policy, Trie.from_sequences(SEQUENCES), normalization)


def batch(prompts: list[list[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    width = width or max(map(len, prompts))
    return torch.tensor([p + [0] * (width - len(p)) for p in prompts]), torch.tensor([len(p) for p in prompts])


def forward(engine: TreeEngine, prompts: list[list[int]], items: torch.Tensor) -> torch.Tensor:
    """Scores behind the prompts, in one pass."""
    tokens, length = batch(prompts)
    return engine.forward(tokens, Places.ends(length), items)[0]


def prefill(
    engine: TreeEngine, prompts: list[list[int]], width: int | None = None
) -> tuple[TreeEngine, PromptCache, Places]:
    """What a search or a score behind the prompts takes."""
    tokens, length = batch(prompts, width)
    return engine, engine.prefill(tokens), Places.ends(length)


def reference(engine: TreeEngine) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([all_logprobs(engine.policy, p, SEQUENCES, engine.normalization) for p in PROMPTS])


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_one_pass_and_cached_scores_equal_full_rows(kind: str, normalization: str) -> None:
    engine = make(kind, normalization)
    items = torch.arange(len(TITLES)).expand(len(PROMPTS), -1)
    expected = reference(engine)
    torch.testing.assert_close(forward(engine, PROMPTS, items), expected, atol=2e-5, rtol=1e-5)
    _, prompt, places = prefill(engine, PROMPTS)
    for _ in range(2):  # the cache is left as it was
        torch.testing.assert_close(engine.score(prompt, places, items), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_a_head_with_a_bias(normalization: str) -> None:
    engine = make(normalization=normalization)
    engine.policy.causal_lm.set_output_embeddings(torch.nn.Linear(32, 257))
    torch.nn.init.normal_(engine.policy.head.bias)
    items = torch.arange(len(TITLES)).expand(len(PROMPTS), -1)
    scores = forward(engine, PROMPTS, items)
    torch.testing.assert_close(scores, reference(engine), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_exact_scores_of_the_whole_catalogue(normalization: str, chunk: int) -> None:
    engine = make(normalization=normalization)
    found = TreeEngine.score_all(*prefill(engine, PROMPTS), chunk)
    torch.testing.assert_close(found, reference(engine), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_groups_that_differ_by_user(normalization: str) -> None:
    engine = make(normalization=normalization)
    items = torch.tensor([[0, 1, 2], [6, 6, 11], [4, 10, 5]])
    scores = forward(engine, PROMPTS, items)
    torch.testing.assert_close(scores, reference(engine).gather(1, items), atol=2e-5, rtol=1e-5)


def test_only_needed_rows_go_through_the_model() -> None:
    engine = make(normalization="trie")
    forward(engine, PROMPTS[:1], torch.tensor([[6, 11]]))  # Ronin branches from Ran after R; X is forced
    assert engine.token_rows == len(PROMPTS[0]) + 1


def test_items_that_need_no_row_at_all() -> None:
    """X is forced after its first token: only the prompt goes through the model."""
    engine = make(normalization="trie")
    scores = forward(engine, PROMPTS, torch.full((3, 1), 11))
    torch.testing.assert_close(scores[:, 0], reference(engine)[:, 11], atol=2e-5, rtol=1e-5)
    assert engine.token_rows == 3 * len(PROMPTS[2])


def test_trie_normalisation_is_a_distribution_over_titles() -> None:
    engine = make(normalization="trie")
    items = torch.tensor([i for i in range(len(TITLES)) if i != 4]).expand(3, -1)  # item 4 shares item 3's title
    scores = forward(engine, PROMPTS, items)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))


def assert_gradients_equal_full_rows(engine: TreeEngine, tolerance: float) -> None:
    items = torch.tensor([[1, 2, 9], [3, 5, 8], [0, 7, 10]])
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    scores = forward(engine, PROMPTS, items)
    (scores * weight).sum().backward()
    tree = {name: p.grad.clone() for name, p in engine.policy.trainable().items()}
    engine.policy.zero_grad()
    for b, prompt in enumerate(PROMPTS):
        for g in range(3):
            score = item_logprob(engine.policy, prompt, SEQUENCES, int(items[b, g]), engine.normalization)
            (score * weight[b, g]).backward()
    for name, p in engine.policy.trainable().items():
        assert (p.grad - tree[name]).norm() <= tolerance * p.grad.norm() + 1e-8, name


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_gradients_equal_full_rows(normalization: str) -> None:
    assert_gradients_equal_full_rows(make(normalization=normalization), 1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_the_output_head_runs_in_chunks_of_bounded_memory(normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(normalization=normalization)
    sizes = []
    monkeypatch.setattr("recsys.logprobs.MAX_LOGITS", 3 * 257)
    monkeypatch.setattr(
        "recsys.logprobs.linear", lambda x, w, b: sizes.append(len(x) * len(w)) or torch.nn.functional.linear(x, w, b)
    )
    assert_gradients_equal_full_rows(engine, 1e-5)
    assert max(sizes) <= 3 * 257
    found = TreeEngine.score_all(*prefill(engine, PROMPTS))
    torch.testing.assert_close(found, reference(engine), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_base_with_an_adapter(local_model: str, dtype: str, normalization: str) -> None:
    policy = LLMPolicy(local_model, dtype=dtype)
    policy.build(torch.device("cpu"))
    policy.eval()
    with torch.no_grad():
        for parameter in policy.trainable().values():  # a new adapter adds nothing
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    engine = TreeEngine(policy, Trie.from_sequences(SEQUENCES), normalization)
    # bfloat16 has 8 bits, and both sides round: a score of -30 is a sum of ten logits of which each is off by 0.1.
    tolerance = {"atol": 2e-4, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.3, "rtol": 0.02}
    expected = reference(engine)
    items = torch.arange(len(TITLES)).expand(3, -1)
    torch.testing.assert_close(forward(engine, PROMPTS, items), expected, **tolerance)
    found = beam_search(*prefill(engine, PROMPTS), len(TITLES))
    torch.testing.assert_close(found.scores, expected.gather(1, found.items), **tolerance)
    assert_gradients_equal_full_rows(engine, 1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_titles_inside_the_prompt(normalization: str) -> None:
    engine = make(normalization=normalization)
    head, history = [65, 66], [1, 7, 3]
    tokens = head + [t for i in history for t in SEQUENCES[i]]
    starts = [2, 2 + len(SEQUENCES[1]), 2 + len(SEQUENCES[1]) + len(SEQUENCES[7])]
    hidden = engine.hidden(batch([tokens, head])[0])
    found = engine.head.title_logprobs(hidden, torch.tensor([history, [-1] * 3]), torch.tensor([starts, [0] * 3]))
    expected = [
        item_logprob(engine.policy, tokens[:start], SEQUENCES, item, normalization)
        for item, start in zip(history, starts, strict=True)
    ]
    torch.testing.assert_close(found[0], torch.stack(expected), atol=2e-5, rtol=1e-5)
    assert found[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_beam_as_wide_as_the_catalogue_is_exhaustive(kind: str, normalization: str) -> None:
    engine = make(kind, normalization)
    found = beam_search(*prefill(engine, PROMPTS), len(TITLES))
    expected = reference(engine)
    assert found.valid.all()
    assert [sorted(row) for row in found.items.tolist()] == [list(range(len(TITLES)))] * 3
    torch.testing.assert_close(found.scores, expected.sort(1, descending=True).values, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.scores, expected.gather(1, found.items), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_a_narrow_beam_returns_true_scores_of_different_items(beams: int, normalization: str) -> None:
    engine = make(normalization=normalization)
    found = beam_search(*prefill(engine, PROMPTS), beams)
    assert found.items.shape == (3, beams)
    assert found.valid.all()
    assert all(len(set(row)) == beams for row in found.items.tolist())
    torch.testing.assert_close(found.scores, reference(engine).gather(1, found.items), atol=2e-5, rtol=1e-5)
    assert (found.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_padding_does_not_matter(normalization: str) -> None:
    engine = make(normalization=normalization)
    together = beam_search(*prefill(engine, PROMPTS, 20), 6)
    for b, prompt in enumerate(PROMPTS):
        alone = beam_search(*prefill(engine, [prompt]), 6)
        assert together.items[b].tolist() == alone.items[0].tolist()
        torch.testing.assert_close(together.scores[b], alone.scores[0], atol=2e-5, rtol=1e-5)


def test_more_beams_than_items() -> None:
    engine = make()
    found = beam_search(*prefill(engine, PROMPTS), 50)
    assert found.items.shape == (3, len(TITLES))
    assert found.valid.all()


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_random_catalogues(normalization: str) -> None:
    policy = TinyPolicy(seed=3)
    policy.build(torch.device("cpu"))
    for seed in range(6):
        rng = random.Random(seed)
        sequences = [[rng.randint(1, 4) for _ in range(rng.randint(1, 6))] + [0] for _ in range(rng.randint(1, 40))]
        engine = TreeEngine(policy, Trie.from_sequences(sequences), normalization)
        found = beam_search(*prefill(engine, PROMPTS[:2]), len(sequences))
        with torch.no_grad():
            expected = torch.stack([all_logprobs(policy, p, sequences, normalization) for p in PROMPTS[:2]])
        torch.testing.assert_close(found.scores, expected.sort(1, descending=True).values, atol=2e-5, rtol=1e-5)
        assert [sorted(row) for row in found.items.tolist()] == [list(range(len(sequences)))] * 2


def test_a_single_item_is_certain() -> None:
    engine = TreeEngine(make().policy, Trie.from_sequences([[5, 6, 256]]), "trie")
    found = beam_search(*prefill(engine, PROMPTS), 4)
    assert found.items.tolist() == [[0]] * 3
    assert found.scores.tolist() == [[0.0]] * 3


def test_bfloat16_model_is_close() -> None:
    engine = make()
    expected = reference(engine)
    engine.policy.model = copy.deepcopy(engine.policy.model).bfloat16()
    scores = forward(engine, PROMPTS, torch.arange(len(TITLES)).expand(3, -1))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.15, rtol=0.05)


# ---- places inside a prompt ---------------------------------------------------------------------------------------

# Each prompt holds titles; a place is before a token of one, so that what follows it must not be seen.
PLACES = Places(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([2, 4, 5, 1, 9]))  # none in the second prompt


def at_places(engine: TreeEngine) -> torch.Tensor:
    """Scores ``[P, M]`` by a full row for each item behind the tokens that precede each place."""
    with torch.no_grad():
        cut = [PROMPTS[b][:start] for b, start in zip(PLACES.prompt.tolist(), PLACES.start.tolist(), strict=True)]
        return torch.stack([all_logprobs(engine.policy, tokens, SEQUENCES, engine.normalization) for tokens in cut])


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_places_inside_a_prompt_see_what_precedes_them_alone(kind: str, normalization: str) -> None:
    engine = make(kind, normalization)
    tokens, _ = batch(PROMPTS)
    expected = at_places(engine)
    items = torch.tensor([[0, 1, 2], [6, 6, 11], [4, 10, 5], [9, 8, 0], [3, 4, 7]])
    scores, hidden = engine.forward(tokens, PLACES, items)
    torch.testing.assert_close(scores, expected.gather(1, items), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, engine.hidden(tokens), atol=2e-5, rtol=1e-5)  # trees change no prompt
    prompt = engine.prefill(tokens)
    torch.testing.assert_close(engine.score(prompt, PLACES, items), expected.gather(1, items), atol=2e-5, rtol=1e-5)
    for found in (
        beam_search(engine, prompt, PLACES, len(TITLES)),
        best_first_search(engine, prompt, PLACES, len(TITLES)),
    ):
        torch.testing.assert_close(found.scores[:, : len(TITLES)], expected.sort(1, descending=True).values)


def test_without_a_place_a_pass_and_a_search_return_nothing() -> None:
    engine = make()
    tokens, _ = batch(PROMPTS)
    nowhere, nothing = PLACES[torch.zeros(5, dtype=torch.bool)], torch.zeros(0, 3, dtype=torch.int64)
    scores, hidden = engine.forward(tokens, nowhere, nothing)
    assert scores.shape == (0, 3)
    torch.testing.assert_close(hidden, engine.hidden(tokens))
    assert engine.score(engine.prefill(tokens), nowhere, nothing).shape == (0, 3)
    for search in (beam_search, best_first_search):
        assert search(engine, engine.prefill(tokens), nowhere, 4).items.shape[0] == 0


@functools.cache
def random_catalogue(seed: int, normalization: str) -> tuple[TreeEngine, torch.Tensor, Places, torch.Tensor]:
    """A policy with clear preferences, prompts, places in them, and the exact scores there."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    policy = Shape(rng.choice(["llama", "gpt2"]))
    policy.build(torch.device("cpu"))
    sequences = [[rng.randint(1, 6) for _ in range(rng.randint(1, 5))] + [0] for _ in range(rng.randint(20, 60))]
    engine = TreeEngine(policy, Trie.from_sequences(sequences), normalization)
    tokens, length = batch([[rng.randint(7, 256) for _ in range(rng.randint(2, 12))] for _ in range(4)])
    chosen = torch.tensor([[rng.random() < 0.3 for _ in range(12)] for _ in range(4)])
    start = torch.arange(1, 13).expand(4, -1)
    places = Places.at(chosen & (start <= length[:, None]), start)
    cut = [tokens[b, :n].tolist() for b, n in zip(places.prompt.tolist(), places.start.tolist(), strict=True)]
    with torch.no_grad():
        scores = torch.stack([all_logprobs(policy, prompt, sequences, normalization) for prompt in cut])
    return engine, tokens, places, scores


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [1, 8])
def test_best_first_search_is_exact(seed: int, normalization: str, width: int) -> None:
    engine, tokens, places, scores = random_catalogue(seed, normalization)
    for titles in (1, 5, 12):
        found = best_first_search(engine, engine.prefill(tokens), places, titles, width=width)
        assert found.valid[:, :titles].all()
        best = scores.topk(titles).values
        torch.testing.assert_close(found.scores[:, :titles], best, atol=2e-5, rtol=1e-5)
        listed = scores.gather(1, found.items)[found.valid]
        torch.testing.assert_close(found.scores[found.valid], listed, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("fewest", "most"), [(0, 3), (2, 6), (4, 9)])
def test_a_list_is_given_up_only_if_the_whole_catalogue_says_so(
    seed: int, normalization: str, fewest: int, most: int
) -> None:
    engine, tokens, places, scores = random_catalogue(seed, normalization)
    trie, given_up = engine.trie, 0
    for shift in range(5):
        item = (torch.arange(len(places)) * 7 + shift) % trie.num_items
        own = scores.gather(1, item[:, None])
        above = ((scores > own + 2e-4) & (trie.leaf != trie.leaf[item][:, None])).sum(1)
        found = best_first_search(
            engine, engine.prefill(tokens), places, most + 1, Wanted(own[:, 0], fewest, most), width=2
        )
        kept = found.valid.any(1)
        assert kept[(above >= fewest) & (above <= most)].all()
        torch.testing.assert_close(found.scores[kept][:, : most + 1], scores[kept].topk(most + 1).values)
        given_up += int((~kept).sum())
    assert given_up > len(places)  # of five times as many
