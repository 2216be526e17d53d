"""Policies: quantisation, adapters, and the traps of the libraries beneath."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from gguf import GGUFReader, dequantize
from huggingface_hub import constants
from transformers import AutoTokenizer

from recsys.assets import SMOLLM2
from recsys.policy import LLMPolicy, Lora, TinyPolicy, byte_tokenizer, compute_dtype
from recsys.types import UserError

CPU = torch.device("cpu")


def gradients(policy: LLMPolicy) -> torch.Tensor:
    policy.zero_grad()
    tokens = torch.arange(3, 43).view(2, 20)
    policy.hidden(tokens).float().pow(2).mean().backward()
    return torch.cat([p.grad.flatten().float() for p in policy.trainable().values()])


def assert_gradients_survive_an_evaluation(policy: LLMPolicy) -> None:
    policy.train()
    before = gradients(policy)
    policy.eval()
    with torch.no_grad():
        policy.hidden(torch.arange(3, 43).view(2, 20))
    policy.train()
    assert torch.cosine_similarity(before, gradients(policy), dim=0) > 0.9999
    assert before.norm() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gradients_survive_an_evaluation(local_model: str, dtype: str) -> None:
    """bitsandbytes repacks 4-bit weights at an eval forward on some CPUs, and gradients after that are wrong."""
    policy = LLMPolicy(local_model, dtype=dtype)
    policy.build(CPU)
    with torch.no_grad():  # B starts at zero, which would hide the gradient of A
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert_gradients_survive_an_evaluation(policy)


def test_the_base_is_4_bit_and_the_adapter_float32(local_model: str) -> None:
    policy = LLMPolicy(local_model, dtype="bfloat16")
    policy.build(CPU)
    layers = [m for m in policy.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert all("lora_" in name for name in policy.trainable())
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in policy.trainable()}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_kept_unpacked_compute_the_same(local_model: str, dtype: str) -> None:
    found = []
    for kept in (False, True):
        policy = LLMPolicy(local_model, dtype=dtype, keep_unpacked=kept)
        policy.build(CPU)
        with torch.no_grad():
            for parameter in policy.trainable().values():  # a new adapter adds nothing
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
        unpacks = []
        for layer in policy.causal_lm.modules():
            if isinstance(layer, Linear4bit):
                unpacks.append("forward" not in vars(layer))
        assert len(unpacks) == 14
        assert all(unpacks) != kept
        found.append((policy.hidden(torch.arange(3, 43).view(2, 20)), gradients(policy), set(policy.state_dict())))
    (hidden, gradient, names), (kept_hidden, kept_gradient, kept_names) = found
    assert torch.equal(hidden, kept_hidden)
    torch.testing.assert_close(gradient, kept_gradient)
    assert names == kept_names  # nothing more is saved


def test_quantised_weights_are_those_of_a_4_bit_round_trip(local_model: str) -> None:
    """The quantised policy computes what a full-precision one does whose weights went to NF4 and back."""
    import bitsandbytes.functional as F

    policy, plain = LLMPolicy(local_model, dtype="float32"), LLMPolicy(local_model, "none", "float32")
    policy.build(CPU)
    plain.build(CPU)
    with torch.no_grad():
        for name, module in plain.causal_lm.model.named_modules():
            if name.endswith("base_layer"):
                packed, state = F.quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                module.weight.copy_(F.dequantize_4bit(packed, state))
        tokens = torch.arange(3, 23)[None]
        torch.testing.assert_close(policy.hidden(tokens), plain.hidden(tokens), atol=1e-3, rtol=1e-3)


def test_parameter_counts(local_model: str) -> None:
    policy = LLMPolicy(local_model, dtype="float32", lora=Lora(r=2))
    policy.build(CPU)
    full = sum(p.numel() for p in policy.causal_lm.__class__(policy.causal_lm.config).parameters())
    trained, total = policy.num_parameters()
    assert trained == sum(p.numel() for p in policy.trainable().values())
    assert total == full + trained


def test_using_a_snapshot_puts_the_present_weights_back() -> None:
    policy = TinyPolicy(hidden_size=32, lora=Lora(r=2))
    policy.build(CPU)
    start, tokens = policy.snapshot(), torch.arange(5)[None]
    with torch.no_grad():
        first = policy.hidden(tokens)
        for parameter in policy.trainable().values():
            parameter.add_(0.3)
        moved = policy.hidden(tokens)
        with policy.using(start):
            torch.testing.assert_close(policy.hidden(tokens), first)
        torch.testing.assert_close(policy.hidden(tokens), moved)
    assert not torch.allclose(first, moved)


def test_tiny_policy_depends_on_its_own_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        policy = TinyPolicy(seed=seed)
        policy.build(CPU)
        return policy.head.weight

    torch.manual_seed(5)
    first, drawn = weights(0), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # and leaves the run's random numbers alone
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize("text", ["Toy Story", "Ça va — 七人の侍", 'tab\tquote "x"', "  two  spaces "])
def test_byte_tokenizer_is_one_token_per_byte_and_reversible(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_small_policy_takes_the_tokenizer_of_a_model(local_model: str) -> None:
    names = AutoTokenizer.from_pretrained(local_model)
    names.add_tokens(["Toy Story"])
    folder = Path(local_model) / "words"
    names.save_pretrained(folder)
    policy = TinyPolicy(hidden_size=32, tokenizer=str(folder))
    [token] = policy.tokenizer("Toy Story", add_special_tokens=False).input_ids
    assert token == names.convert_tokens_to_ids("Toy Story") >= 257  # beyond those of single bytes
    policy.build(CPU)
    assert policy.head.weight.shape == (len(names), 32)


def test_auto_dtype_needs_hardware_that_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert compute_dtype(CPU) == expected


def test_wrong_names_are_refused_before_any_weight_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read at import
    with pytest.raises(UserError, match="cannot load 'no/such-model'"):
        _ = LLMPolicy("no/such-model").tokenizer
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        _ = LLMPolicy("no/such-model", adapter=str(tmp_path)).tokenizer


@pytest.mark.parametrize("target", ["nothing", ["q_proj", "nothing"]])
def test_an_adapter_for_layers_that_the_model_lacks_is_refused(target: str | list[str]) -> None:
    with pytest.raises(UserError, match=r"has 'nothing', but the model's layers are .*q_proj"):
        TinyPolicy(hidden_size=32, lora=Lora(target_modules=target)).build(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(local_model: str) -> None:
    policy = LLMPolicy(local_model)
    policy.build(torch.device("cuda", 0))
    assert policy.hidden(torch.arange(3, 23, device="cuda")[None]).isfinite().all()


def test_the_default_model_loads_as_a_4_bit_policy_and_its_gradients_survive_an_evaluation() -> None:
    """The real thing: fetched from the package index, converted once, quantised."""
    policy = LLMPolicy()
    assert (
        policy.tokenizer("Toy Story\n", add_special_tokens=False).input_ids[-1] == policy.tokenizer("\n").input_ids[0]
    )
    policy.build(CPU)
    trained, total = policy.num_parameters()
    assert (trained, total - trained) == (4_884_480, 134_515_008)
    reader = GGUFReader(SMOLLM2.path(policy.cache_dir))  # the conversion against gguf's own reading of the file
    [packed] = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    expected = torch.from_numpy(dequantize(packed.data, packed.tensor_type)).bfloat16()
    assert torch.equal(policy.causal_lm.get_input_embeddings().weight.cpu().bfloat16(), expected)
    assert_gradients_survive_an_evaluation(policy)
