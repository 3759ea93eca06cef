"""The data sets that tensorflow-datasets prepares and this package trains on: splits, statistics, similar classes."""

from __future__ import annotations

from typing import NamedTuple

from experiments.data.streams import Pixels


class Prepared(NamedTuple):
    """A data set of tensorflow-datasets.

    name: there, with its configuration.
    splits: those used for training and for testing.
    similar, superclasses: what asymmetric label noise takes for what (`data.Dataset`), or the superclass of each class.
    is_large: streamed, not held in memory.
    manual: the files that a user must fetch by hand.
    """

    name: str
    splits: tuple[str, str]
    num_classes: int
    pixels: Pixels
    similar: tuple[int, ...] | None = None
    superclasses: tuple[int, ...] | None = None
    is_large: bool = False
    manual: tuple[str, ...] = ()


# Of the classes of CIFAR-100, both in the order of their names.
# fmt: off
_SUPERCLASSES = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)
# fmt: on
# The usual statistics: those that torchvision publishes with its networks.
_IMAGENET = Pixels(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment=False)

DATASETS = {
    # Krizhevsky 2009, with the channel statistics that most papers copy from each other (the deviations are the mean
    # over images of each image's own), and the crop and flip of He et al. 2016, section 4.2.
    "cifar10": Prepared(
        name="cifar10",
        splits=("train", "test"),
        num_classes=10,
        pixels=Pixels(scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment=True),
        # Patrini et al.: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog.
        similar=(0, 1, 0, 5, 7, 3, 6, 7, 8, 1),
    ),
    # Krizhevsky 2009; statistics of all training pixels; crop and flip as for CIFAR-10. Patrini et al.: the next class
    # within the superclass.
    "cifar100": Prepared(
        name="cifar100",
        splits=("train", "test"),
        num_classes=100,
        pixels=Pixels(scale=255.0, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), augment=True),
        superclasses=_SUPERCLASSES,
    ),
    # Xiao et al. 2017; statistics of all training pixels; crop with pad 4 and flip as Zhong et al., Random Erasing Data
    # Augmentation, 2017, use for it.
    "fashion_mnist": Prepared(
        name="fashion_mnist",
        splits=("train", "test"),
        num_classes=10,
        pixels=Pixels(scale=255.0, mean=(0.2860,), std=(0.3530,), augment=True),
    ),
    # Ten classes of ImageNet, by J. Howard; the shorter side is 320 pixels.
    "imagenette": Prepared(
        name="imagenette/320px-v2",
        splits=("train", "validation"),
        num_classes=10,
        pixels=_IMAGENET,
        is_large=True,
    ),
    # Russakovsky et al. 2015.
    "imagenet2012": Prepared(
        name="imagenet2012",
        splits=("train", "validation"),
        num_classes=1000,
        pixels=_IMAGENET,
        is_large=True,
        manual=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    ),
}
