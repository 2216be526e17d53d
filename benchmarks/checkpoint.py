"""A config's model with its data and a checkpoint's weights, ready to search and to train, for measurements."""

from __future__ import annotations

import torch

from callbacks.beam_negatives import BeamNegatives
from recsys.cli import command_line
from recsys.module import Recommender


def load(path: str, arguments: list[str]) -> tuple[Recommender, BeamNegatives]:
    """Return the model, its trainer and data attached, and the callback that finds its groups.

    Args:
        path: Checkpoint of a run of this config.
        arguments: Of the ``recsys`` command, the config among them.
    """
    cli = command_line(arguments, run=False, save_config_callback=None)
    model, trainer = cli.model, cli.trainer
    model.prepare(trainer, cli.datamodule)
    model.load_state_dict(torch.load(path, weights_only=False)["state_dict"], strict=False)
    return model, next(c for c in trainer.callbacks if isinstance(c, BeamNegatives))
