"""What a run is, and what it takes where that is left open."""

from experiments.config.run import BEFORE, DTYPES, LABEL_NOISE_KINDS, LABELS, METHODS, PARALLEL, TAKES, TrainConfig

__all__ = ["BEFORE", "DTYPES", "LABELS", "LABEL_NOISE_KINDS", "METHODS", "PARALLEL", "TAKES", "TrainConfig"]
