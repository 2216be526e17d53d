"""The ``recsys`` command: ``fit``, ``validate``, ``test``, ``predict``, ``data`` and ``cost`` on LightningCLI."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning import pytorch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from recsys.cost import cost_text, run_cost
from recsys.data import HistoryDataModule, card_text, data_card
from recsys.module import Recommender
from recsys.types import UserError


class Trainer(pytorch.Trainer):
    """Lightning's trainer, whose methods are the subcommands, with two more."""

    def describe(self, model: Recommender, datamodule: HistoryDataModule) -> None:
        """Print what the data holds and what the settings make of it, without loading the model."""
        datamodule.tokenize(model.tokenizer)
        print(card_text(data_card(datamodule)))

    def cost(self, model: Recommender, datamodule: HistoryDataModule) -> None:
        """Print the token rows, steps and memory of the run that ``fit`` would do, without loading the model."""
        datamodule.tokenize(model.tokenizer)
        print(cost_text(run_cost(self, model, datamodule)))

    data = describe  # the subcommand's name; a method whose own name is `data` would clash with the group of that name


class SaveConfig(SaveConfigCallback):
    """Saves the run's whole config as ``config.yaml`` in its log folder, and logs it as hyperparameters."""

    def save_config(self, trainer: pytorch.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the model's and the data's settings, flattened, to every logger."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        flat = _flatten({k: settings[k] for k in ("model", "data", "seed_everything") if k in settings})
        for logger in trainer.loggers:
            logger.log_hyperparams(flat)
            if isinstance(logger, TensorBoardLogger):  # names the metrics of the HParams tab without logging values
                for summary in hparams(flat, {"val/wpauc": 0, "val/recall@10": 0}):
                    logger.experiment.file_writer.add_summary(summary)


class RecsysCLI(LightningCLI):
    """LightningCLI with the trainer settings that the data module needs, and checks before anything starts."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, ``data`` and ``cost``, with the arguments that are not set on the command line."""
        return {**LightningCLI.subcommands(), "data": {"model", "datamodule"}, "cost": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set defaults that every run needs, and give the data module the run's seed."""
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.set_defaults(
            {
                "trainer.reload_dataloaders_every_n_epochs": 1,  # each epoch draws its rows
                "trainer.use_distributed_sampler": False,  # the data module divides rows among processes
                "trainer.num_sanity_val_steps": -1,  # validate the untrained policy on all rows
                "trainer.enable_model_summary": False,  # counts a byte of two 4-bit weights as one weight
            }
        )

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint path that does not exist."""
        path = self.config[self.subcommand].get("ckpt_path") if self.subcommand else None
        if path and path not in ("last", "best", "hpc", "registry") and not Path(path).is_file():
            raise UserError(f"ckpt_path: no such file: {path}")


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process by default.

    Raises:
        SystemExit: with code 1 and one line on stderr for a mistake in the input, code 2 for one in the arguments.
    """
    _hide_noise()
    try:
        RecsysCLI(
            Recommender,
            HistoryDataModule,
            args=args,
            save_config_callback=SaveConfig,
            trainer_class=Trainer,
            subclass_mode_model=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"description": "Train and evaluate LLM recommenders on windowed partial AUC."},
        )
    except UserError as error:
        print(f"recsys: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _hide_noise() -> None:
    """Hide messages of the libraries beneath about each other, on which a user cannot act."""
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script_method.*", category=DeprecationWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel that it lacks


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flatten(value, f"{name}/")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


if __name__ == "__main__":
    main()
