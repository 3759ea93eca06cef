"""Images and labels: data sets by name, those of tensorflow-datasets, streams from disk, wrong labels."""

from experiments.data.datasets import DATASETS, Dataset, crop_and_flip, epoch_order, load, normalize, subset
from experiments.data.streams import Pixels, Split, Stream

__all__ = [
    "DATASETS",
    "Dataset",
    "Pixels",
    "Split",
    "Stream",
    "crop_and_flip",
    "epoch_order",
    "load",
    "normalize",
    "subset",
]
