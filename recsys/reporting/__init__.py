"""What a run shows of its rankings: pure functions of validations, which the callbacks write."""

from recsys.reporting.figure import roc_figure
from recsys.reporting.tables import bootstrap_interval, closing_table, examples_table
from recsys.reporting.validation import Validation

__all__ = ["Validation", "bootstrap_interval", "closing_table", "examples_table", "roc_figure"]
