"""Whole runs on a small policy: they learn, resume, and can be looked at."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import recsys.evaluation
from recsys.data import PromptTemplate
from recsys.functional import Place
from recsys.metrics.ranking import RowMean
from recsys.module import Recommender
from recsys.objectives import GRPO, SoftmaxDPO, SupervisedFineTuning, TAWin
from recsys.policy import LLMPolicy, Lora, TinyPolicy
from recsys.tree import Places
from recsys.types import UserError
from recsys.window import Window
from tests.conftest import Run


class Losses(Callback):
    """Keeps what each training step logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        self.steps.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


@pytest.fixture(scope="module")
def finished(tables, tmp_path_factory) -> tuple[Run, Losses]:
    losses = Losses()
    run = Run(tables, tmp_path_factory.mktemp("fit"), model={"warm_start_epochs": 8}, max_epochs=10, callbacks=[losses])
    return run.fit(), losses


def test_the_warm_start_learns_and_the_objective_keeps_training(finished: tuple[Run, Losses]) -> None:
    run, losses = finished
    start, warm, end = (
        next(v for v in reversed(run.report.validations) if v.phase == p) for p in ("start", "warm start", "TAWin")
    )
    assert warm.mean("recall@5") > start.mean("recall@5") + 0.2
    assert end.mean("recall@5") > start.mean("recall@5") + 0.2
    assert any(step.get("train/gate_open", 0) > 0 for step in losses.steps)


def test_every_validation_is_in_tensorboard(finished: tuple[Run, Losses]) -> None:
    run, _ = finished
    events = EventAccumulator(run.trainer.log_dir).Reload()
    names = set(events.Tags()["scalars"])
    metrics = {f"val/{m}@{k}" for m in ("recall", "ndcg") for k in (1, 5, 10)} | {"val/wpauc"}
    assert metrics <= names
    assert len(events.Scalars("val/wpauc")) == 11  # the untrained policy, and ten epochs
    train = {"loss", "policy_loss", "nll", "gate_open", "groups", "signal", "clipped", "lr", "tokens_per_second"}
    assert {f"train/{name}" for name in train} <= names
    assert {f"negatives/{name}" for name in ("seconds", "rows", "groups", "overlap")} <= names
    assert {f"val_filtered/{m}@{k}" for m in ("recall", "ndcg") for k in (1, 5, 10)} <= names
    assert {name.replace("val/", "val_user_mean/") for name in metrics} <= names
    for name in ("val_filtered/recall@5", "val_user_mean/wpauc"):
        assert len(events.Scalars(name)) == 11
    card = next(tag for tag in events.Tags()["tensors"] if "data/card" in tag)
    assert b"| interactions | 360 |" in events.Tensors(card)[0].tensor_proto.string_val[0]
    assert "val/roc" in events.Tags()["images"]
    assert any("val/examples" in tag for tag in events.Tags()["tensors"])


def test_logged_metrics_are_the_means_of_the_rows(finished: tuple[Run, Losses]) -> None:
    run, _ = finished
    last = run.report.validations[-1]
    for name in ("recall@1", "recall@5", "recall@10", "ndcg@5", "wpauc"):
        assert run.trainer.callback_metrics[f"val/{name}"].item() == pytest.approx(last.mean(name))
    for name in ("recall@1", "ndcg@10"):
        expected = last.mean(f"filtered_{name}")
        assert run.trainer.callback_metrics[f"val_filtered/{name}"].item() == pytest.approx(expected)
    frame = pd.read_parquet(Path(run.trainer.log_dir) / "ranks" / f"step{last.step}.parquet")
    assert frame.attrs["list_length"] == run.model.dial.list_length == 12
    assert last.user_mean("ndcg@5") == pytest.approx(frame.groupby("user_id")["ndcg@5"].mean().mean())
    assert len(frame) == len(run.data.histories.val)
    no_ties = frame[frame["rank"] % 1 == 0]
    assert ((no_ties["rank"] <= 5) == (no_ties["recall@5"] == 1)).all()
    row = frame.iloc[0]
    assert row["item_id"] == run.data.catalog.item_ids[run.data.histories.items[row["row"]]]


def by_parts(tables, folder: Path, mode: str, objective: GRPO) -> tuple[Run, Run]:
    """A warm start and two policy epochs in one run, and the same policy epochs from the warm start's adapter."""
    base = TinyPolicy(hidden_size=32)
    base.build(torch.device("cpu"))
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    options = {"model": str(folder / "base"), "quantization": "none", "dtype": "float32"}
    negatives = {"mode": mode, "every_n_steps": 2}

    def run(name: str, policy: LLMPolicy, warm: int, epochs: int) -> Run:
        model = {"objective": objective, "warm_start_epochs": warm}
        return Run(tables, folder / name, policy, model, negatives=negatives, max_epochs=epochs).fit()

    whole = run("whole", LLMPolicy(**options, lora=Lora(r=4)), 2, 4)
    warm = run("warm", LLMPolicy(**options, lora=Lora(r=4)), 2, 2)
    return whole, run("rest", LLMPolicy(**options, adapter=str(warm.checkpoints / "last.adapter")), 0, 2)


@pytest.mark.parametrize(
    ("mode", "objective"),
    [
        ("beam", TAWin(learning_rate=1e-3, kl_coef=0.1)),
        ("beam", TAWin(learning_rate=1e-3, anchor_coef=0.1)),
        ("random", GRPO(learning_rate=1e-3)),
    ],
)
def test_a_phase_after_a_warm_start_is_the_run_from_its_adapter(tables, tmp_path: Path, mode, objective) -> None:
    """Weight for weight: optimiser, learning rate, rows, negatives and reference begin anew with the phase."""
    whole, rest = by_parts(tables, tmp_path, mode, objective)
    start = torch.load(tmp_path / "warm" / "checkpoints" / "test" / "version_0" / "last.ckpt")["state_dict"]
    assert whole.weights.keys() == rest.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(weight, rest.weights[name]), name
    assert any(not torch.equal(weight, start[f"policy.{name}"]) for name, weight in whole.weights.items())
    assert torch.equal(whole.negatives.groups.items, rest.negatives.groups.items)


def test_learning_rate_follows_each_phase(finished: tuple[Run, Losses]) -> None:
    _, losses = finished
    rates = [step["train/lr"] for step in losses.steps]
    policy_steps = 2 * 4
    warm, policy = rates[:-policy_steps], rates[-policy_steps:]
    assert max(warm) == pytest.approx(1e-2, rel=0.1)
    assert warm[-1] < 0.1 * max(warm)
    assert max(policy) <= 1e-3
    assert policy[-1] < policy[1]


@pytest.mark.parametrize("left", [12, 8, 7, 2], ids=["warm start", "its last step", "first of TAWin", "TAWin"])
def test_checkpoints_are_small_and_resume_is_exact(left: int, tables, tmp_path: Path) -> None:
    """A run that stops in the middle of either phase and resumes ends as one that never stopped, bit for bit."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == stop_at:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                raise KeyError("stopped")

    model = {"objective": TAWin(learning_rate=1e-2, kl_coef=0.1)}
    whole = Run(tables, tmp_path / "whole", max_epochs=3, model=model).fit()
    stop_at = whole.trainer.global_step - left  # of which TAWin has 8
    with pytest.raises(KeyError):
        Run(tables, tmp_path / "cut", max_epochs=3, model=model, callbacks=[Stop()]).fit()
    resumed = Run(tables, tmp_path / "resumed", max_epochs=3, model=model).fit(ckpt_path=str(tmp_path / "mid.ckpt"))
    assert resumed.trainer.global_step == whole.trainer.global_step
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    assert [v.phase for v in resumed.report.validations] == [v.phase for v in whole.report.validations]
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=False)["state_dict"]
    assert saved.keys() == {f"policy.{name}" for name in whole.weights}


def test_a_run_that_continues_after_its_end_still_compares_with_its_start(tables, tmp_path: Path) -> None:
    first = Run(tables, tmp_path / "first", max_epochs=2).fit()
    more = Run(tables, tmp_path / "more", max_epochs=3).fit(ckpt_path=str(first.checkpoints / "last.ckpt"))
    assert [v.phase for v in more.report.validations] == ["start", "warm start", "TAWin", "TAWin"]
    assert more.report.validations[0].mean("ndcg@10") == first.report.validations[0].mean("ndcg@10")


def test_best_and_last_checkpoints_and_the_adapter_in_pefts_format(tables, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = {"hidden_size": 32, "lora": Lora(r=4)}
    run = Run(tables, tmp_path, policy=TinyPolicy(**policy)).fit()
    files = {path.name for path in run.checkpoints.iterdir()}
    assert {"last.ckpt", "last.adapter"} <= files
    best = [name for name in files if name.startswith("best-") and name.endswith(".ckpt")]
    assert len(best) == 1
    assert best[0].replace(".ckpt", ".adapter") in files

    base = TinyPolicy(hidden_size=32)
    base.build(torch.device("cpu"))
    loaded = PeftModel.from_pretrained(base.model, run.checkpoints / "last.adapter")
    tokens = torch.arange(1, 9)[None]
    run.model.policy.eval()
    torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, run.model.policy.model(input_ids=tokens).logits)

    again = Run(tables, tmp_path, policy=TinyPolicy(**policy)).fit()  # a second run leaves the first one's files alone
    assert again.checkpoints != run.checkpoints
    assert {path.name for path in run.checkpoints.iterdir()} == files


def test_kl_is_zero_at_the_first_step_and_grows(tables, tmp_path: Path) -> None:
    losses = Losses()
    objective = GRPO(learning_rate=1e-2, kl_coef=0.1)
    Run(tables, tmp_path, model={"objective": objective}, max_epochs=3, callbacks=[losses]).fit()
    kl = [step["train/kl"] for step in losses.steps if "train/kl" in step]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl[1:]) > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_ratio_is_clipped_at_the_first_step_of_a_model_with_dropout(tables, tmp_path: Path, kind: str) -> None:
    """GPT-2 has a dropout of 0.1 in its config."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = GPT2Config(vocab_size=257, n_embd=64, n_layer=2, n_head=2) if kind == "gpt2" else None
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(vocab_size=257, attention_dropout=0.2, **sizes))
    model.save_pretrained(tmp_path / "base")
    TinyPolicy().tokenizer.save_pretrained(tmp_path / "base")
    policy = LLMPolicy(str(tmp_path / "base"), quantization="none", dtype="float32", lora=Lora(r=4))
    losses, settings = Losses(), {"objective": GRPO(learning_rate=1e-2, kl_coef=0.1), "warm_start_epochs": 1}
    Run(tables, tmp_path, policy, settings, max_epochs=2, callbacks=[losses]).fit()
    first = next(step for step in losses.steps if "train/kl" in step)
    assert first["train/kl"] == pytest.approx(0, abs=1e-6)
    assert first["train/clipped"] == 0


def test_reference_is_the_policy_after_the_warm_start(tables, tmp_path: Path) -> None:
    """In the second policy epoch the reference scores are those of the snapshot, not of the base model."""
    after_warm_start: dict[str, torch.Tensor] = {}

    class Snapshot(Callback):
        def on_train_epoch_start(self, trainer, module: Recommender) -> None:
            if trainer.current_epoch == 1:
                after_warm_start.update(module.policy.snapshot())

    objective = GRPO(learning_rate=1e-2, kl_coef=0.1)
    run = Run(tables, tmp_path, model={"objective": objective}, max_epochs=3, callbacks=[Snapshot()]).fit()
    assert all(torch.equal(weight, run.negatives.start[name]) for name, weight in after_warm_start.items())
    groups, policy = run.negatives.groups, run.model.policy.eval()
    [batch] = run.data.batches(run.data.stretches(1, warm_start=False)[:4], 4, warm_start=False)
    index, grouped = groups.find(batch.event)
    index = index[grouped]
    assert len(index) > 10
    with torch.no_grad(), policy.using(run.negatives.start):
        places = Places.at(grouped, batch.start)
        expected, _ = run.model.engine.forward(batch.tokens, places, groups.items[index])
    found = groups.ref_logprobs[index]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (groups.old_logprobs[index] - found).abs().max() > 1e-3


def test_start_from_an_existing_adapter(tables, tmp_path: Path) -> None:
    """A run without a warm start begins where the adapter's run ended."""
    base = TinyPolicy(hidden_size=32)
    base.build(torch.device("cpu"))
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "quantization": "none", "dtype": "float32"}
    sft = Run(
        tables,
        tmp_path / "sft",
        policy=LLMPolicy(**options, lora=Lora(r=4)),
        max_epochs=2,
        model={"warm_start_epochs": 2},
    ).fit()
    adapter = str(sft.checkpoints / "last.adapter")
    run = Run(
        tables,
        tmp_path / "rl",
        policy=LLMPolicy(**options, adapter=adapter),
        model={"warm_start_epochs": 0},
        max_epochs=1,
    )
    run.fit()
    assert run.report.validations[0].phase == "start"
    assert run.report.validations[0].mean("ndcg@10") == pytest.approx(sft.report.validations[-1].mean("ndcg@10"))
    before = torch.load(sft.checkpoints / "last.ckpt")["state_dict"]
    assert all(not torch.equal(weight, before[f"policy.{name}"]) for name, weight in run.weights.items())

    from safetensors.torch import load_file, save_file

    file = sft.checkpoints / "last.adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)
    with pytest.raises(UserError, match="1 weights are missing"):
        Run(tables, tmp_path / "bad", policy=LLMPolicy(**options, adapter=adapter)).fit()


def test_a_checkpoint_of_another_model_or_without_all_keys_is_refused(tables, tmp_path: Path) -> None:
    run = Run(tables, tmp_path, max_epochs=1).fit()
    last = run.checkpoints / "last.ckpt"
    with pytest.raises(UserError, match="is of the model"):
        Run(tables, tmp_path, policy=TinyPolicy(hidden_size=64)).fit(ckpt_path=str(last))
    checkpoint = torch.load(last, weights_only=False)
    missing = sorted(checkpoint["state_dict"])[0]
    checkpoint["state_dict"].pop(missing)
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(UserError, match=f"missing from the checkpoint.*{missing}"):
        Run(tables, tmp_path).fit(ckpt_path=str(tmp_path / "broken.ckpt"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tables, tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                with torch.no_grad():
                    next(iter(module.policy.trainable().values())).fill_(float("nan"))

    run = Run(tables, tmp_path, callbacks=[Poison()], default_root_dir=tmp_path / "new")
    with pytest.raises(UserError, match=r"the loss is nan on rows \[\d+.*the weights are not finite"):
        run.fit()
    [saved] = (tmp_path / "new").glob("bad_batch*.pt")
    assert len(torch.load(saved, weights_only=False)) > 0


@pytest.mark.parametrize(
    ("hook", "num_beams", "message"),
    [
        ("on_train_batch_start", 12, r"the loss is nan on rows \[\d+"),
        ("on_train_epoch_start", 12, "the policy's scores are not numbers"),  # before the refresh
        ("on_validation_start", 12, "the policy's scores are not numbers"),
        ("on_validation_start", None, "the policy's scores are not numbers"),
    ],
)
def test_weights_so_large_that_scores_overflow_stop_the_run(
    tables, tmp_path: Path, hook: str, num_beams: int | None, message: str
) -> None:
    class Poison(Callback):
        pass

    def poison(self, trainer, module, *args) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            with torch.no_grad():
                for weight in (module.policy.head.weight, module.policy.causal_lm.base_model.norm.weight):
                    assert weight.mul_(1e30).isfinite().all()  # their products are not

    setattr(Poison, hook, poison)
    run = Run(tables, tmp_path, callbacks=[Poison()], model={"num_beams": num_beams}, default_root_dir=tmp_path / "new")
    with pytest.raises(UserError, match=message):
        run.fit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"window": Window(k=10, half_width=5)}}, "window ends at negative 15"),
        ({"model": {"cutoffs": (1, 13)}}, "cutoffs has 13, but model.num_beams is 12: set model.num_beams to 13"),
        ({"negatives": {"count": 4}}, "window ends at negative 5, but negatives.count is 4.*set negatives.count to 6"),
        ({"negatives": {"mode": "random"}}, "negatives.mode is random, but model.objective"),
        (
            {"negatives": {"count": 19}},
            "count is 19.*only 18 items of this catalogue can be a negative.*set negatives.count to 18",
        ),
        ({"data": {"prompt": PromptTemplate("Seen:\n{history}", max_tokens=5000)}}, "positions"),
        ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders_every_n_epochs"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(
    tables, tmp_path: Path, change: dict, message: str
) -> None:
    run = Run(tables, tmp_path, **change)
    with pytest.raises(UserError, match=message):
        run.fit()
    assert run.trainer.global_step == 0
    assert run.report.validations == []


def test_a_policy_objective_without_negatives_is_refused(tables, tmp_path: Path) -> None:
    run = Run(tables, tmp_path)
    run.trainer.callbacks.remove(run.negatives)
    with pytest.raises(UserError, match="BeamNegatives"):
        run.fit()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_precision_that_rounds_scores_is_refused(tables, tmp_path: Path, precision) -> None:
    with pytest.raises(UserError, match="precision is bf16"):
        Run(tables, tmp_path, precision=precision).fit()


@pytest.mark.parametrize("objective", [SupervisedFineTuning(), GRPO(anchor_coef=0.1), TAWin(gate="none"), SoftmaxDPO()])
def test_every_objective_moves_all_trained_weights(tables, tmp_path: Path, objective) -> None:
    run = Run(tables, tmp_path, model={"objective": objective, "warm_start_epochs": 0}, max_epochs=1)
    before: dict[str, torch.Tensor] = {}

    class Snapshot(Callback):
        def on_train_start(self, trainer, module: Recommender) -> None:
            before.update(module.policy.snapshot())

    run.trainer.callbacks.append(Snapshot())
    run.fit()
    assert all(not torch.equal(weight, before[name]) for name, weight in run.weights.items())


def test_exact_validation_ranks_as_a_beam_as_wide_as_the_catalogue(tables, tmp_path: Path) -> None:
    beam = Run(tables, tmp_path / "beam", model={"num_beams": 20})
    exact = Run(tables, tmp_path / "exact", model={"exact": True, "window": Window(alpha=0.0, d=1.0)})
    wide = beam.trainer.validate(beam.model, beam.data, verbose=False)[0]
    full = exact.trainer.validate(exact.model, exact.data, verbose=False)[0]
    for name in ("val/recall@1", "val/recall@10", "val/ndcg@5"):
        assert full[name] == pytest.approx(wide[name], abs=1e-6)
    ranks = exact.report.validations[-1].values["rank"]
    assert full["val/wpauc"] == pytest.approx((1 - (ranks - 1) / 19).mean())  # the window [0, 1] is the AUC


def test_filtered_metrics_leave_out_what_the_user_has_seen(tables, tmp_path: Path) -> None:
    """Against a list filtered item by item. Users see seven items over and over: targets were seen before, and stay."""
    interactions = pd.read_csv(tables["interactions"])
    interactions["item_id"] = [f"i{(3 * u + t) % 9 if t < 9 else t % 4 + u % 9}" for u in range(30) for t in range(12)]
    interactions.to_csv(tmp_path / "interactions.csv", index=False)
    outputs = []

    class Keep(Callback):
        def on_validation_batch_end(self, trainer, module, out, batch, *args) -> None:
            found = module.rank(batch)
            assert (found.items == out["items"]).all()
            outputs.append((batch, found, out))

    source = {**tables, "interactions": str(tmp_path / "interactions.csv")}
    run = Run(source, tmp_path, callbacks=[Keep()])
    logged = run.trainer.validate(run.model, run.data, verbose=False)[0]
    histories, moved = run.data.histories, 0
    recalls, ndcgs = [], []
    for batch, found, out in outputs:
        for i, row in enumerate(batch.row.tolist()):
            target = batch.target[i].item()
            past = {histories.items[e] for e in range(row) if histories.users[e] == histories.users[row]}
            scores = dict(zip(found.items[i].tolist(), found.scores[i].tolist(), strict=True))
            left = {item: score for item, score in scores.items() if item not in past or item == target}
            for prefix, ranked in (("", scores), ("filtered_", left)):
                recall = ndcg = 0.0
                if target in ranked:
                    above = sum(score > ranked[target] for score in ranked.values())
                    tied = sum(score == ranked[target] for score in ranked.values())
                    positions = [p for p in range(above + 1, above + tied + 1) if p <= 5]
                    recall, ndcg = len(positions) / tied, sum(1 / math.log2(p + 1) for p in positions) / tied
                assert out[f"{prefix}recall@5"][i].item() == pytest.approx(recall)
                assert out[f"{prefix}ndcg@5"][i].item() == pytest.approx(ndcg)
            recalls.append(recall)
            ndcgs.append(ndcg)
            moved += recall > out["recall@5"][i].item()
    assert moved > 0
    assert any(histories.seen(batch.row.numpy(), batch.target[:, None].numpy()).any() for batch, _, _ in outputs)
    assert logged["val_filtered/recall@5"] == pytest.approx(sum(recalls) / len(recalls))
    assert logged["val_filtered/ndcg@5"] == pytest.approx(sum(ndcgs) / len(ndcgs))


def test_a_metric_is_added_in_one_place(tables, tmp_path: Path, monkeypatch, capsys) -> None:
    class MRR(RowMean):
        def place_values(self, place: Place, num_negatives: int | torch.Tensor | None) -> torch.Tensor:
            return 1 / place.rank

    shipped = recsys.evaluation.metrics_of
    monkeypatch.setattr(recsys.evaluation, "metrics_of", lambda *a: {**shipped(*a), "mrr": MRR("MRR")})
    run = Run(tables, tmp_path, max_epochs=1)
    run.checkpoint.monitor = "val/mrr"
    run.fit()
    events = EventAccumulator(run.trainer.log_dir).Reload()
    assert {"val/mrr", "val_filtered/mrr", "val_user_mean/mrr"} <= set(events.Tags()["scalars"])
    last = run.report.validations[-1]
    rows = pd.read_parquet(Path(run.trainer.log_dir) / "ranks" / f"step{last.step}.parquet")
    assert rows["mrr"].to_numpy() == pytest.approx(1 / rows["rank"].to_numpy())
    assert events.Scalars("val/mrr")[-1].value == pytest.approx(rows["mrr"].mean(), rel=1e-5)
    assert " MRR " in capsys.readouterr().out


def test_two_processes_validate_as_one(tables, tmp_path: Path) -> None:
    alone = Run(tables, tmp_path / "one").trainer
    one = Run(tables, tmp_path / "one")
    alone = one.trainer.validate(one.model, one.data, verbose=False)[0]
    two = Run(tables, tmp_path / "two", strategy="ddp_spawn", devices=2)
    both = two.trainer.validate(two.model, two.data, verbose=False)[0]
    assert both.keys() == alone.keys()
    for name, value in alone.items():
        assert both[name] == pytest.approx(value, abs=1e-6), name


def test_two_processes_train(tables, tmp_path: Path) -> None:
    """Both processes share the refresh, though they find unequally many groups; the checkpoint has those of one run."""
    model = {"objective": TAWin(learning_rate=0.0, kl_coef=0.1)}
    settings = {"max_epochs": 3, "model": model, "data": {"policy_stretches": 23}}
    saved = []
    for folder, processes in (("two", {"strategy": "ddp_spawn", "devices": 2}), ("one", {})):
        settings["model"]["warm_start"] = SupervisedFineTuning(learning_rate=0.0)
        Run(tables, tmp_path / folder, **settings, **processes).fit()
        [last] = (tmp_path / folder).glob("checkpoints/test/*/last.ckpt")
        saved.append(torch.load(last, weights_only=False)["callbacks"]["BeamNegatives"]["groups"])
    two, one = saved
    assert len(one["row"]) % 2 == 1
    assert torch.equal(two["row"], one["row"])
    assert torch.equal(two["items"], one["items"])
    for name in ("old_logprobs", "ref_logprobs"):
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4)
