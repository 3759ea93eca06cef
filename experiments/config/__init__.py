"""What a run is, and what it takes where that is left open."""

from experiments.config.methods import LABELS, METHODS
from experiments.config.run import (
    DTYPES,
    LABEL_NOISE_KINDS,
    PARALLEL,
    SETTINGS,
    Budget,
    Layout,
    Optimizer,
    Pace,
    Task,
    TrainConfig,
    Watch,
    resolve,
)

__all__ = [
    "DTYPES",
    "LABELS",
    "LABEL_NOISE_KINDS",
    "METHODS",
    "PARALLEL",
    "SETTINGS",
    "Budget",
    "Layout",
    "Optimizer",
    "Pace",
    "Task",
    "TrainConfig",
    "Watch",
    "resolve",
]
