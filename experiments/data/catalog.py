"""The data sets that tensorflow-datasets prepares and this package trains on: splits, statistics, similar classes."""

from __future__ import annotations

from typing import NamedTuple

from experiments.data.streams import Pixels


class Prepared(NamedTuple):
    """A data set of tensorflow-datasets.

    name: there, with its configuration.
    similar: that of `data.Dataset`.
    splits: those used for training and for testing.
    is_large: streamed, not held in memory.
    manual: the files that a user must fetch by hand.
    """

    name: str
    num_classes: int
    pixels: Pixels
    similar: tuple[int, ...] | None = None
    splits: tuple[str, str] = ("train", "test")
    is_large: bool = False
    manual: tuple[str, ...] = ()


# For each class of CIFAR-100 the next one of its superclass in the order of their names, the first after the last.
# fmt: off
_NEXT_OF_SUPERCLASS = (
    51, 32, 11, 42, 30, 20, 7, 14, 13, 10, 16, 35, 17, 48, 18, 19, 28, 37, 24, 21, 25, 31, 39, 33, 6,
    84, 45, 29, 61, 44, 55, 38, 67, 49, 63, 46, 50, 68, 15, 40, 86, 69, 43, 88, 78, 77, 98, 52, 58, 60,
    65, 53, 56, 57, 62, 72, 59, 83, 90, 96, 71, 9, 70, 64, 66, 74, 75, 73, 76, 81, 82, 23, 95, 91, 80,
    34, 12, 79, 93, 99, 36, 85, 92, 0, 94, 89, 87, 22, 97, 41, 8, 1, 54, 27, 5, 4, 47, 3, 2, 26,
)
# fmt: on
# The usual statistics: those that torchvision publishes with its networks.
_IMAGENET = Pixels(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), augment=False)

DATASETS = {
    # Krizhevsky 2009, with the channel statistics that most papers copy from each other (the deviations are the mean
    # over images of each image's own), and the crop and flip of He et al. 2016, section 4.2. Patrini et al.: truck ->
    # automobile, bird -> airplane, deer -> horse, cat <-> dog.
    "cifar10": Prepared(
        "cifar10",
        10,
        Pixels(255.0, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), augment=True),
        similar=(0, 1, 0, 5, 7, 3, 6, 7, 8, 1),
    ),
    # Krizhevsky 2009; statistics of all training pixels; crop and flip as for CIFAR-10. Patrini et al.: the next class
    # within the superclass.
    "cifar100": Prepared(
        "cifar100",
        100,
        Pixels(255.0, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), augment=True),
        similar=_NEXT_OF_SUPERCLASS,
    ),
    # Xiao et al. 2017; statistics of all training pixels; crop with pad 4 and flip as Zhong et al., Random Erasing Data
    # Augmentation, 2017, use for it.
    "fashion_mnist": Prepared("fashion_mnist", 10, Pixels(255.0, (0.2860,), (0.3530,), augment=True)),
    # Ten classes of ImageNet, by J. Howard; the shorter side is 320 pixels.
    "imagenette": Prepared("imagenette/320px-v2", 10, _IMAGENET, splits=("train", "validation"), is_large=True),
    # Russakovsky et al. 2015.
    "imagenet2012": Prepared(
        "imagenet2012",
        1000,
        _IMAGENET,
        splits=("train", "validation"),
        is_large=True,
        manual=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    ),
}
