"""Images and labels in memory, and augmentation inside the step.

`digits` ships with scikit-learn (1,797 images of 8x8, Alpaydin and Kaynak 1998). `cifar10` is read from a data set that
tensorflow-datasets has prepared as array_record, without TensorFlow, decoded once and cached as plain arrays.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from hero_jax import _check

# Called with (done, total) while something long goes on.
Report = Callable[[int, int], None]


class Split(NamedTuple):
    """images (N, H, W, C) uint8 and labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray


class Pixels(NamedTuple):
    """How pixels become inputs: (x / scale - mean) / std for each channel, cropped and flipped in training or not."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool


class Dataset(NamedTuple):
    """A classification data set."""

    train: Split
    test: Split
    num_classes: int
    pixels: Pixels


def load(name: str, data_dir: Path | None = None, report: Report | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
      name: "digits" or "cifar10".
      data_dir: folder that holds the prepared tensorflow-datasets; default the environment variable TFDS_DATA_DIR, then
        ~/tensorflow_datasets. Not used by "digits".
      report: called with (images decoded, images in all) while a data set is decoded for the first time.

    Raises:
      ValueError: unknown name (suggests the nearest).
      FileNotFoundError: the data set is not prepared there; says which command prepares it.
    """
    _check.one_of("dataset", name, DATASETS)
    return DATASETS[name](data_dir, report)


def subset(dataset: Dataset, train_size: int | None, validation_size: int) -> Dataset:
    """Holds `validation_size` training images out as the test split, then keeps `train_size` of the rest.

    The order is random and the same for every run, so that runs with the same sizes see the same images.
    """
    available = len(dataset.train.labels)
    wanted = validation_size + (train_size or 1)
    if wanted > available:
        raise ValueError(
            f"`train_size` + `validation_size` must be at most {available} for this data set; got {wanted}."
        )
    if validation_size == 0 and train_size is None:
        return dataset
    order = np.random.default_rng(0).permutation(available)
    held_out, rest = order[:validation_size], order[validation_size:][:train_size]
    train = Split(*(x[rest] for x in dataset.train))
    test = Split(*(x[held_out] for x in dataset.train)) if validation_size else dataset.test
    return dataset._replace(train=train, test=test)


def normalize(images: jax.Array, pixels: Pixels) -> jax.Array:
    """uint8 images to float32 of about zero mean and unit deviation a channel."""
    scaled = images.astype(jnp.float32) / pixels.scale
    return (scaled - jnp.asarray(pixels.mean, jnp.float32)) / jnp.asarray(pixels.std, jnp.float32)


def crop_and_flip(
    key: jax.Array,
    images: jax.Array,
    pad: int = 4,
    *,
    batch_size: int | None = None,
    first_row: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Pads with `pad` zeros, crops each image back at a random place, and flips half of them left to right.

    Images that are part of a batch are altered as they would be with the rest of it.

    Args:
      key: the key of the whole batch.
      images: (N, H, W, C), all of a batch or neighbors in it.
      pad: zeros on each side; static.
      batch_size: images in the whole batch, default N; static.
      first_row: number in the whole batch of the first image.
    """
    rows, height, width, channels = images.shape
    n = rows if batch_size is None else batch_size
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


def _digits(data_dir: Path | None, report: Report | None) -> Dataset:
    """scikit-learn's digits; every fifth image of each class is a test image: 1,433 for training, 364 for testing."""
    del data_dir, report
    from sklearn.datasets import load_digits

    flat, target = load_digits(return_X_y=True)
    images = np.asarray(flat, np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(target, np.int32)
    by_class = np.concatenate([np.flatnonzero(labels == c)[::5] for c in range(10)])
    is_test = np.zeros(len(labels), bool)
    is_test[by_class] = True
    return Dataset(
        train=Split(images[~is_test], labels[~is_test]),
        test=Split(images[is_test], labels[is_test]),
        num_classes=10,
        pixels=Pixels(scale=16.0, mean=(0.305,), std=(0.376,), augment=False),
    )


def _cifar10(data_dir: Path | None, report: Report | None) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009) with the usual channel statistics, crop and flip."""
    return Dataset(
        train=_decoded("cifar10", "train", data_dir, report),
        test=_decoded("cifar10", "test", data_dir, report),
        num_classes=10,
        pixels=Pixels(scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment=True),
    )


DATASETS = {"digits": _digits, "cifar10": _cifar10}


def _decoded(name: str, split: str, data_dir: Path | None, report: Report | None) -> Split:
    """A split of a prepared data set, from the cache or decoded into it."""
    import tensorflow_datasets as tfds

    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    if not (Path(builder.data_path) / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"`data_dir` must hold {name} prepared as array_record; nothing is at {builder.data_path}. With a network"
            f" and TensorFlow, `tfds build {name} --file_format=array_record --data_dir={folder}` prepares it."
        )
    source: Any = tfds.data_source(name, split=split, data_dir=folder, download=False)
    # The size in bytes of the source tells another preparation of the same version apart.
    num_bytes = int(builder.info.splits[split].num_bytes)
    cache = cli.cache_folder() / f"{builder.info.full_name.replace('/', '-')}-{split}-{len(source)}-{num_bytes}.npz"
    cached = _read_cache(cache, len(source))
    if cached is not None:
        return cached
    images, labels = [], []
    chunk = 500
    # tensorflow-datasets logs that OpenCV would decode faster; this happens once.
    absl_level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    for start in range(0, len(source), chunk):
        for example in source.__getitems__(list(range(start, min(start + chunk, len(source))))):
            images.append(example["image"])
            labels.append(example["label"])
        if report is not None:
            report(len(images), len(source))
    logging.getLogger("absl").setLevel(absl_level)
    decoded = Split(np.stack(images), np.asarray(labels, np.int32))
    _write_cache(cache, decoded)
    return decoded


def _read_cache(path: Path, size: int) -> Split | None:
    """The cached arrays, or None where there are none or they are damaged (which is said)."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            split = Split(arrays["images"], arrays["labels"])
        if len(split.images) != size or len(split.labels) != size:
            raise ValueError(f"it holds {len(split.images)} images and {len(split.labels)} labels, not {size}")
    except Exception as error:  # whatever a damaged zip file raises
        warnings.warn(f"The cached images at {path} are damaged ({error}); decoding them again.", stacklevel=2)
        return None
    return split


def _write_cache(path: Path, split: Split) -> None:
    """Writes whole or not at all; a cache that cannot be written is no reason to stop."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, images=split.images, labels=split.labels)
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"Could not cache the decoded images at {path} ({error}).", stacklevel=2)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
