"""A base divided among processes computes and learns what a whole one does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from recsys.objectives import TAWin
from recsys.policy import LLMPolicy, Lora, TinyPolicy
from recsys.search import beam_search
from recsys.shard import ShardedStrategy, shard
from recsys.tree import Places
from recsys.types import UserError
from tests.conftest import Run

CPU = torch.device("cpu")
LIMIT = timedelta(seconds=120)  # a process that waits for a pass that the other does not make fails then


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_divided_policy_has_the_outputs_and_gradients_of_a_whole_one(
    quantization, gradient_checkpointing: bool, local_model: str, mesh: DeviceMesh
) -> None:
    policy = LLMPolicy(local_model, quantization, "float32", Lora(r=2), gradient_checkpointing=gradient_checkpointing)
    policy.build(CPU)
    policy.train()
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(3, 43).view(2, 20)

    def learn() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for parameter in policy.trainable().values():
            parameter.grad = None
        hidden = policy.hidden(tokens)
        hidden.square().sum().backward()
        return hidden.detach(), {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}

    hidden, gradients = learn()
    counts = policy.num_parameters()
    shard(policy, mesh)
    assert policy.num_parameters() == counts
    frozen = [p for p in policy.causal_lm.base_model.layers.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in frozen)
    assert not any(isinstance(p, DTensor) for p in policy.trainable().values())
    with torch.inference_mode():  # as Lightning validates
        torch.testing.assert_close(policy.hidden(tokens), hidden)
    for _ in range(2):
        again, found = learn()
        torch.testing.assert_close(again, hidden)
        torch.testing.assert_close(found, gradients)
    assert gradients.keys() == policy.trainable().keys()
    assert policy.state_dict().keys() & policy.trainable().keys() == policy.trainable().keys()
    assert not any(isinstance(value, DTensor) for value in policy.state_dict().values())


class Watch(Callback):
    """Looks at the base in each process, and lets one search while the other has nothing to search."""

    def on_train_end(self, trainer, module) -> None:
        layers = module.policy.causal_lm.base_model.layers
        parts = [p for p in layers.parameters() if not p.requires_grad]
        assert all(p.to_local().numel() * 2 == p.numel() for p in parts)
        assert sum(p.dtype == torch.uint8 for p in parts) == 14
        module.eval()
        batch = next(iter(module.data.batches(module.data.stretches(1, warm_start=False), 4)))
        with torch.no_grad():
            prompt, places = module.engine.prefill(batch.tokens), Places.ends(batch.length)
            both = beam_search(module.engine, prompt, places, 12)
            before = module.engine.token_rows
            if trainer.global_rank == 1:
                alone = beam_search(module.engine, prompt, places, 12)
                assert module.engine.token_rows > before
                assert torch.equal(alone.items, both.items)
                torch.testing.assert_close(alone.scores, both.scores)
                module.engine.score(prompt, places, batch.target[:, None])
            else:
                module.engine.wait()
                module.engine.wait()


@pytest.mark.parametrize("local_model", ["qwen2"], indirect=True)
def test_a_divided_4_bit_base_trains_the_adapter_that_ddp_trains(local_model: str, tables, tmp_path: Path) -> None:
    """Warm start, refreshes, KL reference, clipping, validation and checkpoints, on two processes each."""

    def run(folder: str, strategy: DDPStrategy, **kwargs) -> Run:
        return Run(
            tables,
            tmp_path / folder,
            policy=LLMPolicy(local_model, "nf4", "float32", Lora(r=4)),
            model={"objective": TAWin(learning_rate=1e-3, kl_coef=0.01)},
            negatives={"every_n_steps": 1},
            strategy=strategy,
            devices=2,
            gradient_clip_val=1.0,
            **kwargs,
        ).fit()

    run("whole", DDPStrategy(start_method="spawn"))
    divided = run("divided", ShardedStrategy(start_method="spawn", timeout=LIMIT), callbacks=[Watch()])
    paths = {folder: next(tmp_path.glob(f"{folder}/checkpoints/test/*/last.ckpt")) for folder in ("whole", "divided")}
    whole, found = (torch.load(path, weights_only=False) for path in paths.values())
    assert max(v.abs().max() for k, v in whole["state_dict"].items() if "lora_B" in k) > 1e-3  # it did learn
    torch.testing.assert_close(found["state_dict"], whole["state_dict"], atol=1e-5, rtol=1e-3)
    for name in ("row", "items", "old_logprobs", "ref_logprobs"):
        expected = whole["callbacks"]["BeamNegatives"]["groups"][name]
        torch.testing.assert_close(found["callbacks"]["BeamNegatives"]["groups"][name], expected, atol=1e-3, rtol=0)

    alone = Run(tables, tmp_path / "alone", policy=LLMPolicy(local_model, "nf4", "float32", Lora(r=4)))
    logged = alone.trainer.validate(alone.model, alone.data, ckpt_path=paths["divided"], verbose=False)[0]
    for name, value in logged.items():
        assert divided.trainer.callback_metrics[name].item() == pytest.approx(value, abs=1e-5), name


def test_what_cannot_be_divided_is_refused(tables, tmp_path: Path, mesh: DeviceMesh) -> None:
    policy = TinyPolicy(hidden_size=32)
    policy.build(CPU)
    with pytest.raises(UserError, match="none is left to divide"):
        shard(policy, mesh)
    run = Run(tables, tmp_path, strategy=ModelParallelStrategy(), devices=2)
    run.model.trainer = run.trainer
    with pytest.raises(UserError, match="ModelParallelStrategy is not supported"):
        run.model.prepare_data()
