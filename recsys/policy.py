"""Policies: a causal language model from ``transformers``, quantised by bitsandbytes and adapted by PEFT.

A policy is built in two steps, so that a wrong name fails before anything long starts: the tokenizer when the data
is prepared, the weights when the trainer knows its device. After :meth:`Policy.build` it offers the two halves of
the language model that the tree engine needs apart: the decoder (tokens to hidden states) and the output head.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from recsys.assets import SMOLLM2, fetch
from recsys.types import UserError

log = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (PEFT's ``LoraConfig``).

    Args:
        r: Rank.
        alpha: The update is scaled by ``alpha / r``.
        dropout: Dropout on the adapter's input. Above 0, the ratio to the behaviour policy is noisy.
        target_modules: ``all-linear`` (every linear layer but the output head) or a list of module names.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


class Policy(nn.Module):
    """What the engine, the Lightning module and the callbacks need of a language model."""

    name: str
    lora: Lora | None
    quantization: Literal["nf4", "none"] = "none"  # of the frozen linear layers
    model: Any  # PeftModel, or the causal LM itself where every weight is trained
    sharded = False  # whether each process holds a part of the base, see recsys/shard.py

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; loading it needs no weights."""
        raise NotImplementedError

    def load(self, device: torch.device) -> Any:
        """Return the causal language model that is trained, adapters included.

        On the ``meta`` device it has the shapes of its weights alone, unquantised; that needs no weights.
        """
        raise NotImplementedError

    def build(self, device: torch.device) -> None:
        """Load the weights; does nothing the second time.

        Raises:
            UserError: if the model's logits are not its head applied to its decoder's output (models that scale or
                cap their logits), since the engine computes them so.
        """
        if hasattr(self, "model"):
            return
        self.model = self.load(device)
        tokens = torch.arange(1, 5, device=self.head.weight.device)[None]
        with torch.no_grad():
            expected = self.model(input_ids=tokens).logits.float()
            found = self.head(self.hidden(tokens)).float()
        if (expected - found).abs().max() > 1e-2 * expected.abs().max():
            raise UserError(f"{self.name}: its logits are not its output head applied to its decoder; not supported")

    @property
    def causal_lm(self) -> Any:
        """The ``transformers`` model; PEFT puts its layers into it in place."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def head(self) -> nn.Linear:
        """The output head, ``weight [V, H]``."""
        return self.causal_lm.get_output_embeddings()

    def hidden(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the decoder: ``tokens [B, L]`` to the last hidden states ``[B, L, H]``.

        Args:
            tokens: ``[B, L]`` token ids.
            attention_mask: ``[B, 1, L, cached + L]`` bool, or None for causal attention.
            position_ids: ``[B, L]``, or None to count on from the cache.
            cache: Keys and values of what precedes; the new ones are appended to it.
        """
        decoder = self.causal_lm.base_model
        # The argument was renamed in the course of transformers 5; the old name warns at every call.
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
        return decoder(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            **{name: cache},
        ).last_hidden_state

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters (the adapter's, or all) by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters, for :meth:`using`."""
        return {name: p.detach().clone() for name, p in self.trainable().items()}

    @contextmanager
    def using(self, snapshot: dict[str, Tensor]) -> Iterator[None]:
        """Run the block with the parameters of ``snapshot``, then put the present ones back.

        Switching the adapter off would give the base model, which is not the policy that a run from a trained
        adapter or a warm start began with.
        """
        present = self.snapshot()
        self._copy(snapshot)
        try:
            yield
        finally:
            self._copy(present)

    @torch.no_grad()
    def _copy(self, snapshot: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable().items():
            parameter.copy_(snapshot[name])

    def num_parameters(self) -> tuple[int, int]:
        """Return the trained and the total number of weights; two 4-bit weights are packed in a byte."""
        trained = sum(p.numel() for p in self.trainable().values())
        total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in self.parameters())
        return trained, total

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter in PEFT's own format (the whole model where every weight is trained)."""
        options = {"save_embedding_layers": False} if self.lora else {}  # "auto" would ask the hub
        self.model.save_pretrained(str(directory), **options)


class LLMPolicy(Policy):
    """A pretrained causal language model with a 4-bit base and LoRA adapters (QLoRA).

    Args:
        model: ``SmolLM2-135M-Instruct`` (fetched from the package index), a hub id, or a local folder.
        quantization: ``nf4`` (4-bit NormalFloat with double quantisation, bitsandbytes) or ``none``.
        dtype: Compute type: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the device computes in it.
            Adapter weights are float32 in each case.
        lora: Shape of a new adapter; not used if ``adapter`` is given.
        adapter: Folder of a PEFT adapter to start from, in place of a new one.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        cache_dir: Where the default model is kept.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        quantization: Literal["nf4", "none"] = "nf4",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        lora: Lora = Lora(),
        adapter: str | None = None,
        gradient_checkpointing: bool = False,
        cache_dir: str = "~/.cache/recsys",
    ) -> None:
        super().__init__()
        self.name = model
        self.quantization = quantization
        self.dtype = dtype
        self.lora = lora
        self.adapter = adapter
        self.gradient_checkpointing = gradient_checkpointing
        self.cache_dir = cache_dir

    @cached_property
    def source(self) -> str:
        """Folder or hub id that ``from_pretrained`` takes."""
        if self.name == DEFAULT_MODEL:
            return str(_default_model(self.cache_dir))
        return self.name

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise UserError(f"policy.adapter: no adapter_config.json in {self.adapter}; give a folder saved by PEFT")
        try:
            return AutoTokenizer.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"policy.model: cannot load {self.name!r}: it is neither {DEFAULT_MODEL}, nor a local folder of a "
                f"transformers model, nor a model that the hub serves here ({str(error).splitlines()[0]})"
            ) from error

    def load(self, device: torch.device) -> Any:
        """Load the base in its precision, then put the adapter on it."""
        from peft import PeftConfig, PeftModel, get_peft_model

        dtype = compute_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)
        base = self._shapes(dtype) if device.type == "meta" else self._base(device, dtype)
        base.requires_grad_(False)
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if self.adapter is None:
            assert self.lora is not None
            return add_adapter(base, self.lora)
        if device.type == "meta":
            config = PeftConfig.from_pretrained(self.adapter)
            config.inference_mode = False
            return get_peft_model(base, config)
        model = PeftModel.from_pretrained(base, self.adapter, is_trainable=True)
        check_adapter(model, self.adapter)
        return model

    def _shapes(self, dtype: torch.dtype) -> Any:
        """Return the base on the ``meta`` device, made from its config.

        Raises:
            UserError: if there is no config.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        _ = self.tokenizer  # its errors name what is wrong with `model` or `adapter`
        try:
            config = AutoConfig.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise UserError(f"policy.model: {self.name!r} has no config ({str(error).splitlines()[0]})") from error
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")

    def _base(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the base with its weights, in 4 bits unless ``quantization`` says otherwise."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        base = AutoModelForCausalLM.from_pretrained(
            self.source,
            dtype=dtype,
            quantization_config=config if self.quantization == "nf4" else None,
            device_map={"": device},
            attn_implementation="sdpa",  # takes the tree's 4-D mask
        )
        keep_weights_in_place(base)
        return base


class TinyPolicy(Policy):
    """A small Llama with random weights, every weight trained: for tests and for experiments on a CPU.

    Args:
        hidden_size: H; a multiple of 16 times ``heads``.
        layers: Number of decoder layers.
        heads: Number of attention heads.
        seed: Of the random weights, apart from the run's own seed.
        lora: Train adapters of this shape in place of all weights.
        tokenizer: Model whose tokenizer it takes, as :class:`LLMPolicy` names models; null has one token per byte.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 2,
        seed: int = 0,
        lora: Lora | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.name = f"tiny-llama-{hidden_size}x{layers}-seed{seed}"
        self.tokenizer_of = tokenizer
        self.hidden_size = hidden_size
        self.layers = layers
        self.heads = heads
        self.seed = seed
        self.lora = lora

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of ``tokenizer``, or one token per byte and an end token."""
        return byte_tokenizer() if self.tokenizer_of is None else LLMPolicy(self.tokenizer_of).tokenizer

    def load(self, device: torch.device) -> Any:
        """Make the model from its seed; the run's random state is left as it was."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4096,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(config).to(device)
            return add_adapter(model, self.lora) if self.lora else model


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device has arithmetic for it, else float32; bfloat16 for the ``meta`` device.

    A CPU without it emulates bfloat16 and is slower than in float32.
    """
    if device.type == "meta":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def add_adapter(base: Any, lora: Lora) -> Any:
    """Return ``base`` as a PeftModel with a new adapter, its weights in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def keep_weights_in_place(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval-mode forward.

    On CPUs with AVX512-BF16 it repacks them for a faster inference kernel; training after that computes wrong
    gradients, or raises on layers with a bias (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute of Linear4bit alone


def check_adapter(model: Any, folder: str) -> None:
    """Raise UserError if the adapter file in ``folder`` lacks weights that the model trains, or has others.

    PEFT only warns, and the missing ones stay at their random start.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    found = {name: tensor.shape for name, tensor in load_peft_weights(folder, device="cpu").items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"policy.adapter: {folder} does not fit the model: {len(wrong)} weights are missing, unknown or of "
            f"another shape, first {wrong[0]}"
        )


def byte_tokenizer() -> Any:
    """Return a ``transformers`` tokenizer with the 256 bytes and ``<|end|>`` as its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _default_model(cache_dir: str) -> Path:
    """Return the folder of the default model in the ``transformers`` format, converted from GGUF once."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(cache_dir).expanduser() / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    file = fetch(SMOLLM2, cache_dir)
    log.info("converting %s for transformers, once", file.name)
    # Some releases of transformers leave GGUF weights packed where they have a kernel for them.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    # The weights are plain now, but the model still says that they are GGUF, and save_pretrained refuses that.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch)
        shutil.copytree(scratch, f"{folder}.{os.getpid()}")
    try:
        os.rename(f"{folder}.{os.getpid()}", folder)  # atomic: another process may have been first
    except OSError:
        shutil.rmtree(f"{folder}.{os.getpid()}")
    return folder
