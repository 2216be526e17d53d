"""Training with the frozen base divided among the processes: "FSDP with QLoRA".

Each process keeps its part of every decoder layer's frozen weights, 4-bit ones included, and a layer is put together
when a forward or backward pass comes to it (PyTorch's ``fully_shard``, FSDP2). Whole on each process stay:

- the adapter. DDP averages its gradients as it does without sharding, so the optimiser, clipping, checkpoints and the
  KL reference know nothing of the division;
- the embeddings and the output head, which the engine reads at every step;
- the scales of the 4-bit weights, a thirtieth of their size.

Each pass needs all processes, so all must make equally many: see :meth:`recsys.tree.TreeEngine.wait`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from recsys.policy import Policy
from recsys.types import UserError


class ShardedStrategy(DDPStrategy):
    """DDP for the adapter, with the frozen base divided among all processes. Takes DDPStrategy's arguments."""

    def setup(self, trainer: Trainer) -> None:
        """Divide the base, which the module has loaded by now, before DDP looks at the parameters."""
        module: Any = self.lightning_module
        if not module.policy.sharded:
            shard(module.policy, init_device_mesh(self.root_device.type, (self.world_size,)))
        parts = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        # Otherwise DDP makes all processes begin with what the first one holds.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, parts)
        super().setup(trainer)


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Divide the frozen weights of a built policy's decoder layers among the processes of ``mesh``.

    Raises:
        UserError: if the policy has no frozen decoder weights, or this PyTorch cannot divide them.
        RuntimeError: if the divided decoder does not compute what the whole one did.
    """
    decoder = policy.causal_lm.base_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"trainer.strategy: {policy.name} has no list of decoder layers to divide; use ddp")
    frozen = {p for p in layers.parameters() if not p.requires_grad}
    if not frozen:
        raise UserError(f"trainer.strategy: {policy.name} trains every weight, none is left to divide; use ddp")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"trainer.strategy: PyTorch {torch.__version__} cannot divide a base with adapters; update it")
    expected = _sample(policy)
    for module in layers.modules():
        if hasattr(module, "quant_state"):  # Linear4bit takes it from here when its weight comes back without
            weight: Any = module.weight
            module.quant_state = weight.quant_state
    whole = set(policy.parameters()) - frozen
    try:
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(decoder, mesh=mesh, ignored_params=whole)  # no weights of its own: it fetches the next layer early
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        # Storing them as bfloat16, the usual way round, is no remedy: copies may change patterns that are NaNs.
        raise UserError(
            f"trainer.strategy: PyTorch {torch.__version__} cannot divide 4-bit weights, which are bytes; update it, "
            "set policy.quantization to none, or use ddp"
        ) from error
    policy.sharded = True
    policy.register_state_dict_post_hook(_leave_out_parts)
    # This pass also allocates what all later ones fill. Lightning validates first, in inference mode, and what is
    # allocated there cannot serve in training.
    found = _sample(policy)
    if not torch.allclose(found, expected, rtol=0, atol=1e-2 * expected.abs().max().item()):
        raise RuntimeError(f"{policy.name}: the divided decoder does not compute what the whole one did")


def _leave_out_parts(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Drop the parts from a state dict: checkpoints hold trained weights alone."""
    for name in [name for name, value in state.items() if isinstance(value, DTensor)]:
        del state[name]


@torch.no_grad()
def _sample(policy: Policy) -> Tensor:
    """Return the decoder's output ``[1, 4, H]`` on four tokens, without dropout."""
    training = policy.training
    policy.eval()
    hidden = policy.hidden(torch.arange(1, 5, device=policy.head.weight.device)[None]).float()
    policy.train(training)
    return hidden
