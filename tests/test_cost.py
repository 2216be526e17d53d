"""The cost of a run against the run, and the memory of shapes against the memory of tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from recsys.cost import POLICY, REFERENCE, SEARCH, VALIDATION, WINDOWS, Cost, _Engine, _StandIn, cost_text, run_cost
from recsys.data import BatchDataset, HistoryDataModule, PromptTemplate, Table
from recsys.memory import META, nf4_bytes, peak_bytes, weight_bytes
from recsys.objectives import GRPO, SupervisedFineTuning, TAWin
from recsys.policy import LLMPolicy, Lora, TinyPolicy
from recsys.search import beam_search
from recsys.tree import TreeEngine
from recsys.trie import Trie
from recsys.types import UserError
from tests.conftest import Run

CPU = torch.device("cpu")


class TokenRows(Callback):
    """Token rows of each kind of work in a real run, and those of its prompts."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys((WINDOWS, POLICY, VALIDATION), 0)
        self.prompts = dict.fromkeys((WINDOWS, POLICY, VALIDATION), 0)

    def on_train_batch_start(self, trainer, module, batch, *args) -> None:
        self.name = WINDOWS if module.trains_on_windows(trainer.current_epoch) else POLICY
        self.prompts[self.name] += batch.tokens.numel()
        self.before = module.engine.token_rows

    def on_before_backward(self, trainer, module, loss) -> None:  # a refresh may follow before the batch's end
        self.rows[self.name] += module.engine.token_rows - self.before

    def on_validation_batch_start(self, trainer, module, *args) -> None:
        self.before = module.engine.token_rows

    def on_validation_batch_end(self, trainer, module, outputs, batch, *args) -> None:
        self.rows[VALIDATION] += module.engine.token_rows - self.before
        self.prompts[VALIDATION] += batch.tokens.numel()


def cost_of(run: Run) -> Cost:
    run.data.tokenize(run.model.tokenizer)
    return run_cost(run.trainer, run.model, run.data)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
def test_token_rows_are_those_of_a_fit(normalization: str, tables, tmp_path: Path) -> None:
    settings = {
        "model": {
            "objective": TAWin(1e-3, kl_coef=0.1, inject_positive=True),
            "normalization": normalization,
            "warm_start": SupervisedFineTuning(1e-3),
        },
        "negatives": {"every_n_steps": 1},
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
    }
    cost, counted = cost_of(Run(tables, tmp_path / "cost", **settings)), TokenRows()
    run = Run(tables, tmp_path / "fit", **settings, callbacks=[counted]).fit()
    work = cost.work
    assert list(work) == [WINDOWS, SEARCH, REFERENCE, POLICY, VALIDATION]
    assert sum(part.steps for part in work.values()) == run.trainer.global_step
    assert work[WINDOWS].token_rows == counted.rows[WINDOWS]
    assert {name: work[name].prompts for name in counted.prompts} == counted.prompts
    assert [work[name].times for name in work] == [1, 4, 3, 2, 4]  # 2 refreshes an epoch; the first is the reference
    for name in (POLICY, VALIDATION):
        assert work[name].token_rows == pytest.approx(counted.rows[name], rel=0.25), name
    refreshes = run.model.engine.token_rows - sum(counted.rows.values())
    assert work[SEARCH].token_rows + work[REFERENCE].token_rows == pytest.approx(refreshes, rel=0.25)


def test_exact_validation_and_random_negatives_need_no_guess(tables, tmp_path: Path) -> None:
    """Under exact scoring the tree is the whole catalogue whatever the policy is, so even that is counted exactly."""
    settings = {
        "model": {"exact": True, "warm_start_epochs": 0, "objective": GRPO(1e-3)},
        "data": {"val_rows": 7, "eval_batch_size": 4},
        "negatives": {"mode": "random", "num_negatives": 18},
        "max_epochs": 1,
    }
    cost, counted = cost_of(Run(tables, tmp_path / "cost", **settings)), TokenRows()
    Run(tables, tmp_path / "fit", **settings, callbacks=[counted]).fit()
    assert cost.work[VALIDATION].token_rows == counted.rows[VALIDATION]
    assert cost.work[POLICY].token_rows == pytest.approx(counted.rows[POLICY], rel=0.05)
    assert WINDOWS not in cost.work


def test_the_trainers_limits_count(tables, tmp_path: Path) -> None:
    limits = {"limit_train_batches": 2, "limit_val_batches": 0.5, "num_sanity_val_steps": 1, "max_epochs": 5}
    settings = {"check_val_every_n_epoch": 2, "val_check_interval": 0.5, **limits}
    counted = TokenRows()
    work = cost_of(Run(tables, tmp_path / "cost", **settings)).work
    run = Run(tables, tmp_path / "fit", **settings, callbacks=[counted]).fit()
    assert {name: work[name].prompts for name in counted.prompts} == counted.prompts
    assert sum(part.steps for part in work.values()) == run.trainer.global_step


def test_processes_share_the_rows(tables, tmp_path: Path) -> None:
    run = Run(tables, tmp_path, devices=2, data={"val_rows": 9, "window_batch_size": 4})
    cost, data = cost_of(run), run.data
    assert cost.processes == 2
    loaders = [data.batches(data.window_rows(0), 4, [0, 0], rank, 2) for rank in range(2)]
    assert cost.work[WINDOWS].prompts == sum(b.tokens.numel() for loader in loaders for b in loader)
    assert cost.work[WINDOWS].steps == len(loaders[0])
    loaders = [data.batches(data.evaluation_rows("val"), data.eval_batch_size, None, rank, 2) for rank in range(2)]
    each = sum(b.tokens.numel() for loader in loaders for b in loader)
    assert cost.work[VALIDATION].prompts == 3 * each
    total = sum(part.token_rows for part in cost.work.values())
    [line] = [line for line in cost_text(cost).splitlines() if line.startswith("each of 2 processes")]
    assert line.split()[-1] == f"{round(total / 2):,}"


def test_a_run_without_an_end_has_no_cost(tables, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_epochs"):
        cost_of(Run(tables, tmp_path, max_epochs=-1))


def test_mistakes_are_those_of_the_fit(tables, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.cutoffs: 30"):
        cost_of(Run(tables, tmp_path, model={"cutoffs": (30,)}))
    with pytest.raises(UserError, match="has too few that can be a negative"):
        cost_of(Run(tables, tmp_path, negatives={"num_negatives": 50}))


def test_the_text_adds_up(tables, tmp_path: Path) -> None:
    cost = cost_of(Run(tables, tmp_path))
    text = cost_text(cost)
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["the run"].split()[-1] == f"{sum(w.token_rows for w in cost.work.values()):,}"
    worst = max(cost.peaks, key=lambda name: cost.peaks[name].bytes)
    found = re.search(r"float32: ([\d.]+) GiB of weights, ([\d.]+) GiB at the peak of ([a-z ]+);", text)
    assert found is not None
    assert found[3] == worst
    assert float(found[2]) == pytest.approx(cost.peaks[worst].bytes / 2**30, abs=0.01)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_as_large_as_the_real_ones(local_model: str, dtype: str) -> None:
    real, shapes = LLMPolicy(local_model, dtype=dtype), LLMPolicy(local_model, dtype=dtype)
    real.build(CPU)
    shapes.model = shapes.load(META)
    bytes_ = sum(p.nbytes for p in real.parameters() if not p.requires_grad)
    for layer in (m for m in real.modules() if isinstance(m, Linear4bit)):
        state = layer.weight.quant_state
        parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        bytes_ += sum(part.nbytes for part in parts)
    found = weight_bytes(shapes)
    assert found["frozen weights"] == bytes_
    assert found["trained weights"] == sum(p.nbytes for p in real.trainable().values())
    optimizer = torch.optim.AdamW(real.trainable().values())
    for parameter in real.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["AdamW's two moments"] == sum(moments)
    assert found["gradients"] == sum(p.grad.nbytes for p in real.trainable().values())
    assert {n: p.shape for n, p in shapes.trainable().items()} == {n: p.shape for n, p in real.trainable().items()}
    assert nf4_bytes(64 * 256) == 8192 + 256 + 4 + 4 * 273


def test_shapes_of_an_adapter_in_a_folder(local_model: str, tmp_path: Path) -> None:
    real = LLMPolicy(local_model, lora=Lora(r=3))
    real.build(CPU)
    real.save_adapter(tmp_path)
    shapes = LLMPolicy(local_model, adapter=str(tmp_path))
    shapes.model = shapes.load(META)
    assert {n: p.shape for n, p in shapes.trainable().items()} == {n: p.shape for n, p in real.trainable().items()}


def allocated_at_once(step) -> int:
    """Peak of PyTorch's allocations within ``step``, from the allocator itself."""
    step()  # the first time, libraries allocate what they keep
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.fixture(scope="module")
def data(tables) -> HistoryDataModule:
    data = HistoryDataModule(Table(**tables), PromptTemplate("Seen:\n{history}", max_history=8, max_tokens=128))
    data.tokenize(TinyPolicy().tokenizer)
    return data


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_training_step(local_model: str, data: HistoryDataModule, normalization, checkpointing: bool) -> None:
    """On a CPU some layers multiply 4-bit weights in another order than on CUDA, hence the tolerance."""
    batch = BatchDataset(data.histories, data.encoder, [data.histories.train[-16:]])[0]
    trie = Trie.from_sequences(data.item_tokens)
    items = torch.arange(16).repeat(16, 1)
    options = {"dtype": "float32", "gradient_checkpointing": checkpointing}
    real, shapes, standin = (*(LLMPolicy(local_model, **options) for _ in range(2)), _StandIn(TinyPolicy().tokenizer))
    real.build(CPU)
    real.train()
    standin.build(CPU)
    shapes.model = shapes.load(META)

    def step(engine: TreeEngine) -> torch.Tensor:
        scores, hidden = engine.forward(batch.tokens, batch.length, items)
        return scores.sum() + engine.history_logprobs(hidden, batch.history, batch.history_start).sum()

    for parameter in real.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    engine = TreeEngine(real, trie, normalization)
    measured = allocated_at_once(lambda: step(engine).backward())
    engine = _Engine(standin, trie, normalization, torch.ones(20))
    standin.calls.clear()
    with torch.no_grad():
        step(engine)
    expected, _ = peak_bytes(shapes, engine, standin.calls, train=True)
    assert expected == pytest.approx(measured, rel=0.15)


def test_peak_and_cache_of_a_search(local_model: str, data: HistoryDataModule) -> None:
    batch = BatchDataset(data.histories, data.encoder, [data.histories.train[-16:]])[0]
    trie = Trie.from_sequences(data.item_tokens)
    real, shapes = (LLMPolicy(local_model, dtype="float32") for _ in range(2))
    real.build(CPU)
    real.eval()
    shapes.model = shapes.load(META)
    standin = _StandIn(TinyPolicy().tokenizer)
    standin.build(CPU)

    @torch.no_grad()
    def step(engine: TreeEngine) -> None:
        prompt = engine.prefill(batch.tokens, batch.length)
        beam_search(engine, prompt, 20)
        engine.score(prompt, torch.arange(16).repeat(16, 1))

    measured = allocated_at_once(lambda: step(TreeEngine(real, trie, "trie")))
    engine = _Engine(standin, trie, "trie", torch.ones(20))
    standin.calls.clear()
    step(engine)
    kept = max(c.cached + c.width for c in standin.calls if hasattr(c, "cached"))
    expected, cache = peak_bytes(shapes, engine, standin.calls, train=False)
    assert expected == pytest.approx(measured, rel=0.25)
    assert cache <= 2 * 2 * 16 * kept * 2 * 32 * 4  # layers, keys and values, users, tokens, heads, width, float32
