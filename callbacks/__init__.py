"""Lightning callbacks: negatives, checkpoints, reports, predictions."""

from callbacks.adapter_checkpoint import AdapterCheckpoint
from callbacks.beam_negatives import BeamNegatives
from callbacks.prediction_writer import PredictionWriter
from callbacks.ranking_report import RankingReport

__all__ = ["AdapterCheckpoint", "BeamNegatives", "PredictionWriter", "RankingReport"]
