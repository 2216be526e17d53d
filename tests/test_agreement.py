"""Models that the engine cannot run are refused at the start of a run, in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from recsys.agreement import check_agreement
from recsys.engine import TreeEngine
from recsys.policy import LLMPolicy, Lora, Policy, byte_tokenizer
from recsys.trie import Trie
from recsys.types import UserError
from tests.conftest import Run
from tests.test_engine import SEQUENCES

CPU = torch.device("cpu")
SIZE = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LARGE = {"initializer_range": 0.2}  # of the random weights: smaller ones hardly look back
PROMPT = [7 * i % 250 for i in range(40)]


def random_model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**options))


class Given(Policy):
    """A policy around a model."""

    lora = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.name, self.given = type(model).__name__, model

    def load(self, device: torch.device) -> Any:
        return self.given


def check(policy: Policy, prompt: list[int] = PROMPT, normalization: str = "trie") -> None:
    policy.build(CPU)
    check_agreement(TreeEngine(policy, Trie.from_sequences(SEQUENCES), normalization), prompt)


@pytest.mark.parametrize("normalization", ["trie", "vocab"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {**SIZE, **LARGE}),
        ("Mistral", {**SIZE, **LARGE, "num_key_value_heads": 2, "sliding_window": 64}),  # longer than prompt and title
        ("Gemma3Text", {**SIZE, **LARGE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}),
        ("Mixtral", {**SIZE, **LARGE, "num_key_value_heads": 2, "num_local_experts": 4}),
        ("GPT2", {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4}),  # drops by default
        ("Llama", {**SIZE, **LARGE, "attn_implementation": "eager"}),  # adds its mask, whatever type it has
        ("GptOss", {**SIZE, **LARGE, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}),
    ],
)
def test_a_model_that_the_engine_runs_passes(kind: str, options: dict[str, Any], normalization: str) -> None:
    policy = Given(random_model(kind, **options))
    check(policy, normalization=normalization)
    assert policy.training


BEHIND = "differ by .* nats in the score of a title behind a prompt of 40 tokens"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Mistral", {**SIZE, **LARGE, "num_key_value_heads": 2, "sliding_window": 32}, BEHIND),
        ("Gemma3Text", {**SIZE, **LARGE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32}, BEHIND),
        ("Rwkv", {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}, BEHIND),
        ("Mpt", {"vocab_size": 257, "d_model": 32, "n_layers": 2, "n_heads": 4, **LARGE}, BEHIND),  # counts positions
        ("Mamba", {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}, "cannot run titles as a tree"),
        ("Bert", SIZE, "logits are not its output head"),
        ("Gemma2", {**SIZE, "num_key_value_heads": 2, "head_dim": 8}, "logits are not its output head"),  # caps them
        ("Granite", {**SIZE, "logits_scaling": 3.0}, "logits are not its output head"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check(Given(random_model(kind, **options)))
    assert "\n" not in str(refused.value)


def test_a_short_prompt_fits_a_short_window() -> None:
    policy = Given(random_model("Mistral", **SIZE, **LARGE, num_key_value_heads=2, sliding_window=32))
    check(policy, PROMPT[:8])


def test_a_model_that_drops_something_regardless_is_refused() -> None:
    model = random_model("Llama", **SIZE)
    plain = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.last_hidden_state = torch.nn.functional.dropout(output.last_hidden_state, 0.5, model.training)
        return output

    model.model.forward = forward
    with pytest.raises(UserError, match="an update and a full row"):
        check(Given(model))


def test_a_model_that_caps_its_logits_is_refused() -> None:
    model = random_model("Llama", **SIZE)
    plain = model.forward
    model.forward = lambda **kwargs: SimpleNamespace(logits=torch.tanh(plain(**kwargs).logits) * 0.1)
    with pytest.raises(UserError, match="logits are not its output head"):
        check(Given(model))


def adapted(tied: bool = False, **options: Any) -> Policy:
    """A policy with a foreign adapter."""
    base = random_model("Llama", **SIZE, tie_word_embeddings=tied)
    base.model.audio = torch.nn.Linear(32, 32)  # as models have that also hear
    policy = Given(get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **options)))
    policy.lora = Lora()
    return policy


HEAD = "output head is a .*, not a plain linear layer; leave it out of the adapter's target_modules and modules_to_save"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, HEAD),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, HEAD),
        ({"tied": True, "target_modules": ["q_proj"], "trainable_token_indices": [65, 66]}, HEAD),
        ({"tied": True, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}, HEAD),
        (
            {"target_modules": ["q_proj", "audio"]},
            "2 trained weights have no part in any score, first .*audio",
        ),
    ],
)
def test_an_adapter_that_the_engine_would_not_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(adapted(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [65, 66]},
    ],
)
def test_an_adapter_inside_the_decoder_passes(options: dict[str, Any]) -> None:
    check(adapted(**options))


def test_a_run_is_checked_on_its_longest_prompt(tables, tmp_path: Path) -> None:
    data = Run(tables, tmp_path).data
    data.tokenize(byte_tokenizer())
    h, size = data.histories, data.prompt.max_history
    lengths = [len(data.encoder.encode(h.items[h.past(row, size)]).tokens) for row in range(len(h.items))]
    folder, longest = tmp_path / "model", max(lengths)
    assert longest > sorted(lengths)[-40]
    options = SIZE | LARGE | {"num_key_value_heads": 2, "sliding_window": longest - 1}
    random_model("Mistral", **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    run = Run(tables, tmp_path, policy=LLMPolicy(str(folder), "none", "float32"))
    with pytest.raises(UserError, match=f"behind a prompt of {longest} tokens"):
        run.fit()


# ---- folders that do not hold what they should -----------------------------------------------------------------------


def saved(folder: Path, kind: str = "Llama", model: str = "AutoModelForCausalLM", **options: Any) -> LLMPolicy:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **options})
    getattr(transformers, model).from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return LLMPolicy(str(folder), "none", "float32")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def more_tokens(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 257', '"vocab_size": 300'))


def without_a_layer(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))


@pytest.mark.parametrize(
    ("options", "spoil", "message"),
    [
        ({}, lambda folder: cut(folder / "model.safetensors"), "cannot load .* as a causal language model"),
        ({}, lambda folder: (folder / "model.safetensors").unlink(), "cannot load .* as a causal language model"),
        ({}, more_tokens, "cannot load|do not fit its config"),
        ({}, without_a_layer, "do not fit its config: 9 are missing"),
        ({"vocab_size": 200}, None, "its tokenizer has a token 256, but the model knows 200"),
        ({"kind": "T5", "model": "AutoModelForSeq2SeqLM", "d_model": 32}, None, "as a causal language model: Unrec"),
    ],
)
def test_a_model_folder_that_does_not_fit_is_refused(tmp_path: Path, options, spoil, message: str) -> None:
    policy = saved(tmp_path, **options)
    if spoil is not None:
        spoil(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        check(policy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: cut(folder / "adapter_model.safetensors"), "policy.adapter: cannot put"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "policy.adapter: cannot put"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not the config of an adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is not the config of an adapter"),
    ],
)
def test_a_spoilt_adapter_is_refused(tmp_path: Path, spoil, message: str) -> None:
    policy = saved(tmp_path / "base")
    policy.build(CPU)
    policy.save_adapter(tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    again = LLMPolicy(policy.source, "none", "float32", adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=message) as refused:
        (again.tokenizer, again.build(CPU))
    assert "\n" not in str(refused.value)


def test_an_adapter_of_another_model_or_of_prompts_is_refused(tmp_path: Path) -> None:
    other, base = saved(tmp_path / "other", hidden_size=64), saved(tmp_path / "base")
    other.build(CPU)
    other.save_adapter(tmp_path / "adapter")
    foreign = LLMPolicy(base.source, "none", "float32", adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"policy\.adapter: cannot put"):
        foreign.build(CPU)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(random_model("Llama", **SIZE), prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(UserError, match="holds PROMPT_TUNING, which the engine would not run"):
        _ = LLMPolicy(base.source, adapter=str(tmp_path / "prompts")).tokenizer
