"""Low-rank adapters in PEFT's format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recsys.types import UserError


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (PEFT's ``LoraConfig``).

    Args:
        r: Rank.
        alpha: The update is scaled by ``alpha / r``.
        target_modules: ``all-linear`` (every linear layer but the output head) or a list of module names.
    """

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"


def add_adapter(base: Any, lora: Lora) -> Any:
    """Return ``base`` as a PeftModel with a new adapter, its weights in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


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
