"""Wrong labels in place of some of those trained on."""

from __future__ import annotations

import numpy as np

from experiments import data
from experiments.config import LABEL_NOISE_KINDS
from experiments.data.streams import Stream
from hero_jax import errors


def alter(dataset: data.Dataset, rate: float, kind: str, seed: int) -> data.Dataset:
    """Gives some of the training images a wrong label, and keeps the true ones in `true_labels`.

    With N training images, C classes, and images drawn without replacement,

        symmetric     round(rate * N) images get a label drawn uniformly from the C - 1 other classes
        uniform       round(rate * N) images get a label drawn uniformly from all C classes: about 1 in C keeps its own
        asymmetric    round(rate * N_c) of the N_c images of each class c get the label `similar[c]`

    Which images and labels depends on the seed, the rate, the kind and the number of images (asymmetric: their labels)
    alone; for the first two, a higher rate alters those of a lower rate and more. Called after `data.subset`, it leaves
    the validation labels true. Test labels stay.

    Raises ValueError for a rate outside [0, 1] (called `label_noise`), an unknown kind, and "asymmetric" of a stream.

    >>> noisy = alter(data.load("digits"), 0.8, "symmetric", seed=0)
    >>> int((noisy.train.labels != noisy.true_labels).sum()), noisy.train.size
    (1146, 1433)

    Source of "asymmetric": Patrini, Rozza, Menon, Nock, Qu, Making Deep Neural Networks Robust to Label Noise: A Loss
    Correction Approach, CVPR 2017, section 5. Papers that say "symmetric" mean either of the first two: name the kind
    beside the rate.
    """
    errors.fraction("label_noise", rate)
    errors.one_of("label_noise_kind", kind, LABEL_NOISE_KINDS)
    # Not the generator of `data.subset` or `data.epoch_order`, or the first images of their orders would be altered.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    train, num_classes = dataset.train, dataset.num_classes
    shift = np.zeros(train.size, np.int32)
    if kind != "asymmetric":
        altered = rng.permutation(train.size)[: round(rate * train.size)]
        shift[altered] = rng.integers(kind == "symmetric", num_classes, len(altered))
    elif isinstance(train, Stream):
        raise ValueError(
            "`label_noise_kind` must be 'symmetric' or 'uniform' for a data set that is streamed, whose labels are not"
            " known ahead; got 'asymmetric'."
        )
    else:
        for c, other in enumerate(dataset.similar or np.roll(np.arange(num_classes), -1)):
            of_class = rng.permutation(np.flatnonzero(train.labels == c))
            shift[of_class[: round(rate * len(of_class))]] = other - c
    true = None if isinstance(train, Stream) else train.labels
    return dataset._replace(train=train.relabeled(shift, num_classes), true_labels=true)
