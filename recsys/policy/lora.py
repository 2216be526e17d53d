"""Low-rank adapters in PEFT's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

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

    def check(self) -> None:
        """Raise a UserError if a number or the list of modules makes no sense."""
        for name in ("r", "alpha"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"model.policy: lora.{name} must be at least 1, but it is {value}")
        if not self.target_modules:
            raise UserError("model.policy: lora.target_modules is empty: name modules, or set it to all-linear")


def add_adapter(base: Any, lora: Lora) -> Any:
    """Return ``base`` as a PeftModel with a new adapter, its weights in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    names = [name for name, _ in base.named_modules()]
    for target in [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules:
        # PEFT ignores a name that no module has, if another is found.
        if target != "all-linear" and not any(f".{name}".endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if _adaptable(m)}))
            raise UserError(f"model.policy: lora.target_modules has {target!r}, but the model's layers are {known}")
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise UserError(f"model.policy: lora.target_modules: {str(error).splitlines()[0]}") from error


def _adaptable(module: nn.Module) -> bool:
    return "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__


def check_adapter_config(folder: str) -> None:
    """Raise UserError unless ``folder`` has the config of an adapter that acts inside a model's layers."""
    from peft import PeftConfig

    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"policy.adapter: no adapter_config.json in {folder}; give a folder saved by PEFT")
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"policy.adapter: {path} is not the config of an adapter ({first})") from error
    if config.peft_type is None:
        raise UserError(f"policy.adapter: {path} is not the config of an adapter (it has no peft_type)")
    if config.is_prompt_learning:
        raise UserError(
            f"policy.adapter: {folder} holds {config.peft_type.value}, which the engine would not run: use LoRA"
        )


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
