"""The ``recsys`` command: ``fit``, ``validate``, ``test``, ``predict``, ``data`` and ``cost``, and more."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import shutil
import signal
import sys
import threading
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning import pytorch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.utils.tensorboard.summary import hparams
from transformers.utils.logging import disable_progress_bar

from callbacks import AdapterCheckpoint, BeamNegatives, PredictionWriter, RankingReport
from callbacks.progress import LineProgress
from recsys import __version__
from recsys.checks import check_trainer_settings
from recsys.cost import RunCost
from recsys.data import HistoryDataModule, card_text, data_card
from recsys.module import Recommender
from recsys.parts import ReplaceParts, as_configs
from recsys.runs import NO_LOGGER, RunLogger, check_writable, find_checkpoint, read_checkpoint, results_folder
from recsys.trained import TrainedRecommender, saved_config
from recsys.types import UserError

DESCRIPTION = (
    "Train and evaluate LLM recommenders on windowed partial AUC. A checkpoint holds its settings, which --ckpt_path "
    "without --config takes. `recsys recommend` shows what a checkpoint recommends after one history; "
    "`recsys configs` copies the shipped configs into a new folder."
)
BARS = (TQDMProgressBar, RichProgressBar)  # Lightning's defaults, the second where rich is installed
_load = get_loader("yaml")
# jsonargparse hands null on as the text None where the option is one of a class inside a class.
set_loader("yaml", lambda text: None if text == "None" else _load(text), (yaml.YAMLError,))


class Trainer(pytorch.Trainer):
    """Lightning's trainer, whose methods are the subcommands, with two more."""

    def predict(  # type: ignore[override]
        self, model: Recommender, datamodule: HistoryDataModule, ckpt_path: str | None = None
    ) -> None:
        """Write the items to recommend to each user, or what else the group ``predictions`` asks for.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint of the trained model.
        """
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter):
                callback.checkpoint = ckpt_path
        super().predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path)  # they are written

    def describe(self, model: Recommender, datamodule: HistoryDataModule) -> None:
        """Print what the data holds and what the settings make of it, without loading the model."""
        datamodule.tokenize(model.tokenizer)
        print(card_text(data_card(datamodule)))

    def cost(self, model: Recommender, datamodule: HistoryDataModule) -> None:
        """Print the token rows, steps, time and memory of the run that ``fit`` would do, from its largest batches."""
        print(RunCost(self, model, datamodule))

    data = describe  # the subcommand's name; a method whose own name is `data` would clash with the group of that name


class SaveConfig(SaveConfigCallback):
    """Saves the run's whole config as ``config.yaml`` beside its results, and logs it as hyperparameters."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        for key in ("ckpt_path", "weights_only", "verbose"):  # of one subcommand, not of the run
            config.pop(key, None)
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: pytorch.Trainer, pl_module: Any, stage: str) -> None:
        """Save the config in the log folder.

        Raises:
            UserError: if the folder has one.
        """
        if trainer.loggers:
            try:
                super().setup(trainer, pl_module, stage)
            except RuntimeError as error:
                raise UserError(f"logger.version: {trainer.log_dir} holds another run; leave it at null") from error

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put it into the checkpoint too, which then is all that a user of the model needs."""
        checkpoint["config"] = self.parser.dump(self.config, skip_none=False)

    def on_fit_start(self, trainer: pytorch.Trainer, pl_module: Recommender) -> None:  # type: ignore[override]
        """Log the model's and the data's settings to every logger, and those to compare runs by: K and what was set."""
        folder = results_folder(trainer)
        if not trainer.loggers and folder is not None and trainer.is_global_zero:
            self.parser.save(self.config, str(folder / self.config_filename), skip_none=False, multifile=False)
        flat, defaults = self._settings(self.config), self._settings(self.parser.get_defaults())
        chosen = {name: value for name, value in flat.items() if value not in (defaults.get(name), "None")}
        chosen["K"] = pl_module.dial.window.k
        for logger in trainer.loggers:
            logger.log_hyperparams(flat)
            # Names the metrics of the HParams tab without logging values; one process alone writes events.
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for summary in hparams(chosen, {"val/wpauc": 0, f"val/recall@{pl_module.dial.window.k}": 0}):
                    logger.experiment.file_writer.add_summary(summary)

    def _settings(self, config: Any) -> dict[str, Any]:
        """Return what a run may be compared by, under short names: ``objective/learning_rate``."""
        settings = yaml.safe_load(self.parser.dump(config, skip_none=False, skip_validation=True))
        parts = ("model", "data", "negatives", "seed_everything")
        flat = _flatten({part: settings[part] for part in parts if part in settings})
        names = ("model/", "init_args/", "/class_path")
        return {functools.reduce(lambda name, part: name.replace(part, ""), names, name): v for name, v in flat.items()}


class RecsysCLI(LightningCLI):
    """LightningCLI with the parts of a run as named groups of arguments, and checks before anything starts."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, ``data`` and ``cost``, with the arguments that are not set on the command line."""
        own: dict[str, set[str]] = {name: {"model", "datamodule"} for name in ("predict", "data", "cost")}
        return LightningCLI.subcommands() | own

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose ``--config`` replaces parts."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ReplaceParts, help="Path to a configuration file in YAML.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks and the logger, set defaults that every run needs, give the data module the run's seed."""
        parser.add_lightning_class_args(BeamNegatives, "negatives")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RankingReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_class_arguments(RunLogger, "logger")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.set_defaults(
            {
                "trainer.reload_dataloaders_every_n_epochs": 1,  # each epoch draws its rows
                "trainer.use_distributed_sampler": False,  # the data module divides rows among processes
                "trainer.num_sanity_val_steps": -1,  # validate the untrained policy on all rows
                "trainer.enable_model_summary": False,  # counts a byte of two 4-bit weights as one weight
                "trainer.gradient_clip_val": 1.0,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with arguments that replace a part in the form of ``--config``, after a checkpoint's own settings.

        Raises:
            UserError: if there is no such checkpoint, or it is none.
        """
        arguments = sys.argv[1:] if args is None else list(args)
        self.config = parser.parse_args(as_configs([*arguments[:1], *_settings(arguments), *arguments[1:]]))
        given = self.config.get(self.config.get("subcommand") or "", {})
        path = given.get("ckpt_path")
        if path in ("last", "best"):
            path = find_checkpoint(Path(given.checkpoint.dirpath, _run_name(given)), path)
            print(f"ckpt_path: {path}")
            given.ckpt_path = str(path)
        if path:
            read_checkpoint(Path(path))

    def instantiate_trainer(self, **kwargs: Any) -> pytorch.Trainer:
        """Make the trainer with the group ``logger`` as its logger, unless ``trainer.logger`` says otherwise.

        Raises:
            UserError: if a setting of the trainer makes no sense.
        """
        settings = self._get(self.config, "trainer")
        if settings.get("logger") is None:
            kwargs["logger"] = self._get(self.config_init, "logger")
        check_trainer_settings(settings)
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"trainer: {error}") from error
        if not sys.stderr.isatty():  # a bar would fill a file with what it writes over on a terminal
            trainer.callbacks = [LineProgress() if type(c) in BARS else c for c in trainer.callbacks]
        return trainer

    def before_fit(self) -> None:
        """Refuse folders that cannot be written to, before data or model are touched."""
        trainer = self._get(self.config, "trainer")
        if not trainer.fast_dev_run:
            check_writable(Path(self._get(self.config, "checkpoint").dirpath), "checkpoint.dirpath")
            if trainer.get("logger") is None:
                check_writable(Path(self._get(self.config, "logger").save_dir), "logger.save_dir")


def command_line(args: list[str] | None, **kwargs: Any) -> RecsysCLI:
    """Return the command line with the model, the data module and the trainer of this project; runs unless told not to.

    Args:
        args: Arguments; those of the process by default.
        kwargs: Further arguments of LightningCLI.
    """
    return RecsysCLI(
        Recommender,
        HistoryDataModule,
        args=args,
        trainer_class=Trainer,
        subclass_mode_model=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        **kwargs,
    )


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process by default.

    Raises:
        SystemExit: with code 1 and one line on stderr for a mistake in the input, code 2 for one in the arguments, 143
            when stopped by SIGTERM and 130 by SIGINT, after a checkpoint is saved where there is something to save.
    """
    _hide_noise()
    threading.excepthook = _thread_failed
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own classes; last, so that no file there hides a library
    try:
        given = sys.argv[1:] if args is None else args
        if given[:1] == ["configs"]:
            return copy_configs(configs_parser().parse_args(given[1:]).folder)
        if given[:1] == ["recommend"]:
            return recommend(given[1:])
        about = {"description": DESCRIPTION, "version": __version__}
        command_line(args, save_config_callback=SaveConfig, parser_kwargs=about)
    except SIGTERMException:  # has no code of its own, which would mean success
        raise SystemExit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(f"recsys: error: {mistake}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's, with code 1
            raise SystemExit(128 + signal.SIGINT) from None
        raise


def _mistake(error: BaseException) -> str | None:
    """Return what is wrong that a user can mend, None if it is none of that."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValueError) and isinstance(error.__cause__, UserError):
        return str(error.__cause__)  # jsonargparse wraps it where a part may also be null
    cause: BaseException | None = error
    while cause is not None:  # loggers report theirs as mistakes in what is logged
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return f"{cause}: nothing more can be written there; what was saved before is kept, see --ckpt_path last"
        cause = cause.__cause__ or cause.__context__
    return None


def _run_name(settings: Any) -> str:
    """Return the name of the folder of a run's checkpoints."""
    logger = settings.trainer.logger
    if isinstance(logger, list):
        logger = logger[0]
    if logger is False:
        return NO_LOGGER
    name = settings.logger.name if logger in (None, True) else logger.get("init_args", {}).get("name")
    return str(name or NO_LOGGER)


def configs_parser() -> argparse.ArgumentParser:
    """Return the arguments of ``recsys configs``."""
    parser = argparse.ArgumentParser("recsys configs", description="Copy the shipped configs into a new folder.")
    parser.add_argument("folder", nargs="?", type=Path, default="configs", help="the new folder (default: configs)")
    return parser


def copy_configs(folder: Path) -> None:
    """Copy the shipped configs into a new folder.

    Raises:
        UserError: if it is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: move it away, or use what it holds")
    with resources.as_file(resources.files("recsys_configs")) as shipped:
        shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    print(f"wrote {folder}")


def recommend_parser() -> argparse.ArgumentParser:
    """Return the arguments of ``recsys recommend``."""
    parser = argparse.ArgumentParser(
        "recsys recommend",
        description="Print the best items after one history, without those in it. Further options change settings of "
        "the run that made the checkpoint, such as --data=FILE.",
    )
    parser.add_argument("ckpt_path", help="checkpoint of a trained model: checkpoints/<name>/version_N/last.ckpt")
    parser.add_argument("history", nargs="+", help="titles or ids of items, oldest first")
    parser.add_argument("--k", type=int, default=10, help="how many items (default: 10)")
    return parser


def recommend(arguments: list[str]) -> None:
    """Print what a trained model recommends after one history.

    Raises:
        UserError: Those of :class:`recsys.TrainedRecommender`.
    """
    given, options = recommend_parser().parse_known_args(arguments)
    library = logging.getLogger("lightning.pytorch")
    level = library.level
    library.setLevel(logging.WARNING)
    try:
        recommender = TrainedRecommender.from_checkpoint(given.ckpt_path, *options)
        frame = recommender.recommend({"history": given.history}, given.k)
    finally:
        library.setLevel(level)
    print(frame[["rank", "logprob", "item_id", "title"]].to_string(index=False, float_format="{:.2f}".format))


def _settings(given: list[str]) -> list[str]:
    """Return the settings in the checkpoint that arguments name, if they name no config, as a ``--config``."""
    names = [argument.partition("=")[0] for argument in given]
    if "--ckpt_path" not in names[1:] or {"--config", "-c"} & set(names):
        return []
    place = names.index("--ckpt_path")
    path = given[place].partition("=")[2] or "".join(given[place + 1 : place + 2])
    return [] if path in ("last", "best") else [f"--config={saved_config(path, read_checkpoint(Path(path)))}"]


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Show what a thread failed of, unless it is told in one line: TensorBoard's tells the main thread as well."""
    if failed.exc_value is None or _mistake(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _hide_noise() -> None:
    """Hide messages of the libraries beneath about each other, on which a user cannot act."""
    disable_progress_bar()  # of transformers, for what takes a second: downloads have one of their own
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script_method.*", category=DeprecationWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel that it lacks


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡 Tip", "TPU available: False"))


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
