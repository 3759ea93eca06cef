"""What runs are made of, and what they take where that is left open."""

from experiments.config.groups import DTYPES, LABEL_NOISE_KINDS, PARALLEL, Budget, Grouped, Labels, Task
from experiments.config.methods import LABELS, METHODS
from experiments.config.run import TrainConfig, resolve

__all__ = ["DTYPES", "LABELS", "LABEL_NOISE_KINDS", "METHODS", "PARALLEL"]
__all__ += ["Budget", "Grouped", "Labels", "Task", "TrainConfig", "resolve"]
