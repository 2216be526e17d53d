"""Memory of a policy on one device, from its shapes on the ``meta`` device.

Weights are counted in the precision that they will be loaded in; the compute type ``auto`` is bfloat16, as on a GPU.
For the rest, a batch's calls of the decoder and of the output head go through the shapes, forward and in training
backward, and the tensors that exist at once are counted: what autograd saves, temporary results, keys and values; with
gradient checkpointing, the layer that is computed again.

Attention is counted as a fused kernel, which PyTorch takes on CUDA and on CPUs: it saves its inputs, the mask in the
compute type, its output and one number per head and row. On ``meta`` PyTorch would take the kernel that keeps all
attention weights. Not counted: the allocator's rounding and fragments, buffers inside kernels, data parallelism's
gradient buckets, and the small tensors of the search and the loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from recsys.policy import Policy
from recsys.tree import TreeEngine

META = torch.device("meta")


@dataclass(frozen=True)
class DecoderCall:
    """Shape of one call of the decoder."""

    users: int
    width: int  # token rows of each user
    cached: int  # token rows before them in the cache
    masked: bool  # a 4-D mask was given


@dataclass(frozen=True)
class HeadCall:
    """Shape of one call of ``TreeEngine.child_logprobs``, after the decoder's."""

    node: Tensor  # [R] trie nodes, with values
    edges: int


Call = DecoderCall | HeadCall


def weight_bytes(policy: Policy) -> dict[str, int]:
    """Return bytes on each device throughout training: weights, gradients, and the optimiser's state.

    Args:
        policy: Its ``model`` on the ``meta`` device.
    """
    quantised = {id(layer.weight) for layer in _quantised(policy)}
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    trained = sum(p.nbytes for p in policy.trainable().values())
    return {
        "frozen weights": sum(nf4_bytes(p.numel()) if id(p) in quantised else p.nbytes for p in frozen),
        "trained weights": trained,
        "gradients": trained,
        "AdamW's two moments": 2 * trained,
    }


def nf4_bytes(weights: int) -> int:
    """Bytes of a linear layer in bitsandbytes' NF4 with double quantisation.

    Half a byte for each weight, a byte of scale for each 64 weights, 4 bytes for each 256 of those, and two code books.
    """
    scales = -(-weights // 64)
    return -(-weights // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def _quantised(policy: Policy) -> list[nn.Linear]:
    """Frozen linear layers that bitsandbytes keeps in 4 bits: all but the output head."""
    if policy.quantization == "none":
        return []
    layers = [m for m in policy.causal_lm.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    return [layer for layer in layers if layer is not policy.head]


def peak_bytes(policy: Policy, engine: TreeEngine, calls: Sequence[Call], train: bool) -> tuple[int, int]:
    """Return the bytes that exist at once while a batch is worked on, apart from those that were there before.

    Args:
        policy: Its ``model`` on the ``meta`` device.
        engine: Of a policy with the same vocabulary; gives the columns of the head.
        calls: The batch's, in order.
        train: Forward and backward, else with a cache and without gradients.

    Returns:
        The peak, a 4-bit layer's weights in the compute type included; and those of them that are keys and values.
    """
    policy.train(train)
    for parameter in policy.trainable().values():
        parameter.grad = torch.empty_like(parameter)  # counted among the weights
    cache = None if train else DynamicCache()
    logprobs = []
    attention = (torch.nn.functional, "scaled_dot_product_attention", _fused_attention)
    counter = _Counter(policy.parameters())
    with torch.set_grad_enabled(train), mock.patch.object(*attention), counter:
        hidden = torch.empty(0, device=META)
        for call in calls:
            if isinstance(call, DecoderCall):
                if cache is not None and cache.get_seq_length() > call.cached:
                    cache.crop(call.cached - cache.get_seq_length())
                hidden = _decode(policy, call, cache)
            else:
                logprobs.append(_head(policy, engine, call, hidden))
        if train:
            torch.stack([part.sum() for part in logprobs]).sum().backward()
    kept = 0 if cache is None else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    largest = max((layer.weight.nbytes for layer in _quantised(policy)), default=0)
    return counter.peak + largest, kept


def _decode(policy: Policy, call: DecoderCall, cache: DynamicCache | None) -> Tensor:
    shape = (call.users, call.width)
    mask = torch.empty(call.users, 1, call.width, call.cached + call.width, dtype=torch.bool, device=META)
    positions = torch.empty(shape, dtype=torch.int64, device=META)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    return policy.hidden(tokens, mask if call.masked else None, positions if call.masked else None, cache)


def _head(policy: Policy, engine: TreeEngine, call: HeadCall, hidden: Tensor) -> Tensor:
    rows, column, row = (
        torch.empty(size, dtype=torch.int64, device=META) for size in (len(call.node), call.edges, call.edges)
    )
    return engine.head_logprobs(policy.head, hidden.flatten(0, 1)[rows], call.node, column, row)


class _Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that exist at once, in ``peak``; not those of ``present`` ones."""

    def __init__(self, present: Any) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in present}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Stands in for ``scaled_dot_product_attention``, with the shapes of a fused kernel."""
    return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)  # in the memory layout of the query, as the kernels do
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, None if mask is None else mask.to(query.dtype), output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
