"""A small catalogue with the difficulties of real ones, histories that can be learnt, and a trainer for them."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from callbacks import AdapterCheckpoint, BeamNegatives, RankingReport
from recsys.cli import RecsysCLI
from recsys.data import HistoryDataModule, PromptTemplate, Table
from recsys.module import Recommender
from recsys.objectives import SupervisedFineTuning, TAWin
from recsys.policy import Policy, TinyPolicy, byte_tokenizer
from recsys.window import Window

TITLES = ["Toy Story", "Toy", "Heat", "Heat", 'Say "A"', "Ça, va", "Ran", "Ronin", "Alien", "Aliens"] + [
    f"Film {i}" for i in range(10)
]

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; pytest-xdist has one for each core


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's parser is made once and kept: most of the time of a command that is only parsed."""
    setup = RecsysCLI.setup_parser
    made: dict[bool, dict[str, Any]] = {}

    def setup_parser(cli: RecsysCLI, subcommands: bool, *args: Any) -> None:
        if subcommands not in made:
            before = set(vars(cli))
            setup(cli, subcommands, *args)
            made[subcommands] = {name: value for name, value in vars(cli).items() if name not in before}
        vars(cli).update(made[subcommands])

    monkeypatch.setattr(RecsysCLI, "setup_parser", setup_parser)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of an interactions and an items file: each user walks round the catalogue, so the next item is certain."""
    folder = tmp_path_factory.mktemp("tables")
    with open(folder / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([["item_id", "title"], *([f"i{i}", title] for i, title in enumerate(TITLES))])
    with open(folder / "interactions.csv", "w", newline="") as file:
        rows = [[f"u{u}", f"i{(3 * u + t) % len(TITLES)}", 100 * t + u] for u in range(30) for t in range(12)]
        csv.writer(file).writerows([["user_id", "item_id", "timestamp"], *rows])
    names = {"interactions": "interactions.csv", "items": "items.csv", "cache_dir": "cache"}
    return {name: str(folder / file) for name, file in names.items()}


class Run:
    """One training run in a folder of its own; keyword arguments replace parts of the default set-up."""

    def __init__(
        self,
        tables: dict[str, str],
        folder: Path,
        policy: Policy | None = None,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        negatives: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        seed_everything(0, verbose=False)
        self.folder = folder
        self.model = Recommender(
            **{
                "policy": policy or TinyPolicy(hidden_size=32),
                "objective": TAWin(learning_rate=1e-3),
                "window": Window(k=3, half_width=2),
                "warm_start": SupervisedFineTuning(learning_rate=1e-2),
                "warm_start_epochs": 1,
                "num_beams": 12,
                "cutoffs": (1, 5, 10),
                **(model or {}),
            }
        )
        self.data = HistoryDataModule(
            **{
                "source": Table(**tables),
                "prompt": PromptTemplate("Seen:\n{history}", max_history=4, max_tokens=128),
                "policy_stretches": 32,
                "batch_size": 8,
                **(data or {}),
            }
        )
        self.negatives = BeamNegatives(**{"count": 8, **(negatives or {})})
        self.report = RankingReport(resamples=50)
        self.checkpoint = AdapterCheckpoint(str(folder / "checkpoints"))
        self.trainer = Trainer(
            **{
                "max_epochs": 2,
                "reload_dataloaders_every_n_epochs": 1,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": -1,
                "logger": TensorBoardLogger(folder / "runs", "test", default_hp_metric=False),
                "default_root_dir": folder,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "accelerator": "cpu",
                "log_every_n_steps": 1,
                **trainer,
                "callbacks": [self.negatives, self.report, self.checkpoint, *trainer.get("callbacks", [])],
            }
        )

    def fit(self, **kwargs: Any) -> Run:
        self.trainer.fit(self.model, self.data, **kwargs)
        return self

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.policy.snapshot()

    @property
    def checkpoints(self) -> Path:
        return Path(self.checkpoint.dirpath)


@pytest.fixture(scope="session", params=["llama", "qwen2"])  # Qwen2's layers have biases
def local_model(request, tmp_path_factory) -> str:
    """Folder of a small random model whose weights 4-bit blocks can hold."""
    folder = tmp_path_factory.mktemp(request.param)
    size = {"vocab_size": 257, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**size)) if request.param == "qwen2" else LlamaForCausalLM(LlamaConfig(**size))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
