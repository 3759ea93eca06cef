"""Data sets by name, parts of them, augmentation inside the step, and the order of an epoch.

`digits` ships with scikit-learn (1,797 images of 8x8, Alpaydin and Kaynak 1998). The others are those of
`experiments/data/records.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from experiments.data import records
from experiments.data.streams import Pixels, Split, Stream
from hero_jax import errors

DATASETS = ("digits", *records.DATASETS)


class Dataset(NamedTuple):
    """A classification data set.

    similar: for each class the one it is taken for in asymmetric label noise, itself where it is not; None: the next.
    validation: images that `subset` holds out of train.
    true_labels: the labels of train before `label_noise.alter`; None where none were altered, and for a stream.
    """

    train: Split | Stream
    test: Split | Stream
    num_classes: int
    pixels: Pixels
    similar: tuple[int, ...] | None = None
    validation: Split | Stream | None = None
    true_labels: np.ndarray | None = None


def load(name: str, data_dir: Path | None = None, report: records.Report | None = None) -> Dataset:
    """Loads one of `DATASETS`, from a folder of prepared tensorflow-datasets (`records.folder`) or "digits" from none.

    `report` is called with (images decoded, images in all) while a data set is decoded for the first time.

    Raises FileNotFoundError where the data set is not prepared there, with the command that prepares it; ValueError for
    an unknown name, and where what is there is in another format, damaged or only a part.
    """
    errors.one_of("dataset", name, DATASETS)
    if name == "digits":
        return _digits()
    about = records.DATASETS[name]
    train, test = records.load(name, data_dir, report)
    return Dataset(train, test, about.num_classes, about.pixels, about.similar)


def subset(dataset: Dataset, train_size: int | None, validation_size: int, test_size: int | None = None) -> Dataset:
    """Holds `validation_size` training images out as `validation`, then keeps `train_size` of the rest.

    The order is random and the same for every run, so that runs with the same sizes see the same images. Of the test
    images `test_size` are kept, chosen in the same way, or all.
    """
    if test_size is not None:
        if test_size > dataset.test.size:
            raise ValueError(f"`test_size` must be at most {dataset.test.size} for this data set; got {test_size}.")
        chosen = np.random.default_rng(1).permutation(dataset.test.size)[:test_size]
        dataset = dataset._replace(test=dataset.test.take(chosen))
    available, wanted = dataset.train.size, validation_size + (train_size or 1)
    if wanted > available:
        raise ValueError(
            f"`train_size` + `validation_size` must be at most {available} for this data set; got {wanted}."
        )
    if validation_size == 0 and train_size is None:
        return dataset
    order = np.random.default_rng(0).permutation(available)
    held_out, rest = order[:validation_size], order[validation_size:][:train_size]
    return dataset._replace(
        train=dataset.train.take(rest),
        validation=dataset.train.take(held_out) if validation_size else None,
        true_labels=None if dataset.true_labels is None else dataset.true_labels[rest],
    )


def normalize(images: jax.Array, pixels: Pixels) -> jax.Array:
    """uint8 images to float32 of about zero mean and unit deviation a channel."""
    scaled = images.astype(jnp.float32) / pixels.scale
    return (scaled - jnp.asarray(pixels.mean, jnp.float32)) / jnp.asarray(pixels.std, jnp.float32)


def crop_and_flip(
    key: jax.Array, images: jax.Array, pad: int = 4, *, batch_size: int | None = None, first_row: ArrayLike = 0
) -> jax.Array:
    """Pads with `pad` zeros, crops each image back at a random place, and flips half of them left to right.

    With `batch_size`, images (N, H, W, C) are neighbors in a batch of that size, the first of them its `first_row`, and
    are altered as they would be with the rest; `key` is that of the whole batch.
    """
    rows, height, width, channels = images.shape
    n = batch_size or rows
    key_crop, key_flip = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key_crop, (n, 2), 0, 2 * pad + 1)
    flip = jax.random.bernoulli(key_flip, shape=(n, 1, 1, 1))
    if n != rows:
        offsets, flip = (jax.lax.dynamic_slice_in_dim(x, first_row, rows) for x in (offsets, flip))

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, offsets)
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


def epoch_order(seed: int, epoch: int, size: int, batch_size: int) -> np.ndarray:
    """Indices (steps, batch_size) of one epoch: depends on seed and epoch alone; drops the last, smaller batch."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    steps = size // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _digits() -> Dataset:
    """scikit-learn's digits; every fifth image of each class is a test image: 1,433 for training, 364 for testing."""
    from sklearn.datasets import load_digits

    flat, target = load_digits(return_X_y=True)
    digits = Split(np.asarray(flat, np.uint8).reshape(-1, 8, 8, 1), np.asarray(target, np.int32))
    is_test = np.zeros(digits.size, bool)
    is_test[np.concatenate([np.flatnonzero(digits.labels == c)[::5] for c in range(10)])] = True
    pixels = Pixels(scale=16.0, mean=(0.305,), std=(0.376,), augment=False)
    return Dataset(digits.take(~is_test), digits.take(is_test), 10, pixels)
