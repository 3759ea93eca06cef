"""What a run is, and what it takes where that is left open."""

from experiments.config.run import BEFORE, DTYPES, LABELS, METHODS, PARALLEL, TAKES, TrainConfig

__all__ = ["BEFORE", "DTYPES", "LABELS", "METHODS", "PARALLEL", "TAKES", "TrainConfig"]
