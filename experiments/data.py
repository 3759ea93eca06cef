"""Data sets by name, label noise, augmentation inside the step, and the order of an epoch.

`digits` ships with scikit-learn (1,797 images of 8x8, Alpaydin and Kaynak 1998). The others are read from what
tensorflow-datasets has prepared as array_record (`experiments/prepare.py`), without TensorFlow: small ones are decoded
once and cached as plain arrays, large ones are streams.
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
from experiments.streams import Split, Stream
from hero_jax import _check

LABEL_NOISE = ("symmetric", "uniform", "asymmetric")
# Height and width of the images of a stream.
STREAM_SIDE = 224

# Called with (done, total) while something long goes on.
Report = Callable[[int, int], None]


class Pixels(NamedTuple):
    """How pixels become inputs: (x / scale - mean) / std for each channel, after `crop_and_flip` in training or not.

    A stream has cropped and flipped its images already.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool


class Dataset(NamedTuple):
    """A classification data set.

    similar: for each class the one it is taken for in asymmetric label noise, itself where it is not; None: the next.
    validation: images that `subset` holds out of train.
    true_labels: the labels of train before `with_label_noise`; None where none were altered, and for a stream.
    """

    train: Split | Stream
    test: Split | Stream
    num_classes: int
    pixels: Pixels
    similar: tuple[int, ...] | None = None
    validation: Split | Stream | None = None
    true_labels: np.ndarray | None = None


def load(name: str, data_dir: Path | None = None, report: Report | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
      name: one of `DATASETS`.
      data_dir: folder that holds the prepared tensorflow-datasets; default the environment variable TFDS_DATA_DIR, then
        ~/tensorflow_datasets. Not used by "digits".
      report: called with (images decoded, images in all) while a data set is decoded for the first time.

    Raises:
      ValueError: unknown name (suggests the nearest).
      FileNotFoundError: the data set is not prepared there; says which command prepares it.
      ValueError: what is there is damaged or only a part; says what.
    """
    _check.one_of("dataset", name, DATASETS)
    if name == "digits":
        return _digits()
    about = PREPARED[name]
    builder = prepared(name, data_dir)
    if about.is_large:
        train, test = (_stream(builder, about, split) for split in about.splits)
    else:
        train, test = (_decoded(builder, split, report) for split in about.splits)
    similar = about.similar if about.superclasses is None else _next_within(about.superclasses)
    return Dataset(train, test, about.num_classes, about.pixels, similar)


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
    available = dataset.train.size
    wanted = validation_size + (train_size or 1)
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


def with_label_noise(dataset: Dataset, rate: float, kind: str, seed: int) -> Dataset:
    """Gives some of the training images a wrong label, and keeps the true ones in `true_labels`.

    With N training images, C classes, and images drawn without replacement,

        symmetric     round(rate * N) images get a label drawn uniformly from the C - 1 other classes
        uniform       round(rate * N) images get a label drawn uniformly from all C classes: about 1 in C keeps its own
        asymmetric    round(rate * N_c) of the N_c images of each class c get the label `similar[c]`

    Which images and labels depends on the seed, the rate, the kind and the number of images (asymmetric: their labels)
    alone; for the first two, a higher rate alters those of a lower rate and more. Called after `subset`, it leaves the
    validation labels true. Test labels stay.

    Args:
      dataset: the data.
      rate: share of the images, in [0, 1].
      kind: "symmetric", "uniform" or "asymmetric".
      seed: of the draw; a non-negative integer.

    Raises:
      ValueError: a rate outside [0, 1] (called `label_noise`) or an unknown kind (called `label_noise_kind`).

    >>> noisy = with_label_noise(load("digits"), 0.8, "symmetric", seed=0)
    >>> int((noisy.train.labels != noisy.true_labels).sum()), noisy.train.size
    (1146, 1433)

    Source of "asymmetric": Patrini, Rozza, Menon, Nock, Qu, Making Deep Neural Networks Robust to Label Noise: A Loss
    Correction Approach, CVPR 2017, section 5. Papers that say "symmetric" mean either of the first two: name the kind
    beside the rate.
    """
    _check.fraction("label_noise", rate)
    _check.one_of("label_noise_kind", kind, LABEL_NOISE)
    # Not the generator of `subset` or `epoch_order`, or the images altered would be the first ones of their orders.
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


class Prepared(NamedTuple):
    """A data set of tensorflow-datasets.

    name: there, with its configuration.
    splits: those used for training and for testing.
    similar, superclasses: what asymmetric label noise takes for what (`Dataset`), or the superclass of each class.
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

PREPARED = {
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
DATASETS = ("digits", *PREPARED)


def folder(data_dir: Path | None) -> Path:
    """Where prepared data sets are: `data_dir`, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared(name: str, data_dir: Path | None) -> Any:
    """The tensorflow-datasets builder of a data set of `PREPARED` that is there and whole.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is damaged or only a part; says what.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingImports]
    from google.protobuf import json_format

    root = folder(data_dir)
    try:
        builder = tfds.builder(PREPARED[name].name, data_dir=root, file_format="array_record")
    except json_format.ParseError as error:
        raise ValueError(
            f"`data_dir` holds a damaged {name}: dataset_info.json in {root / PREPARED[name].name} cannot be read."
        ) from error
    path = Path(builder.data_path)
    if not path.exists():
        raise FileNotFoundError(
            f"`data_dir` must hold {name} prepared as array_record; nothing is at {path}. With a network and"
            f" TensorFlow, `python -m experiments.prepare {name} --data-dir {root}` prepares it."
        )
    missing = {*PREPARED[name].splits} - {*builder.info.splits}
    if missing:
        raise ValueError(
            f"`data_dir` holds only a part of {name}, in {path}: no split {min(missing)!r} is known there."
        )
    for split in PREPARED[name].splits:
        info = builder.info.splits[split]
        for file, size in zip(info.filepaths, info.shard_lengths, strict=True):
            # The reader finds no images in a file that is cut off, and in none.
            found = ArrayRecordReader(str(file)).num_records() if file.exists() else 0
            if found != size:
                raise ValueError(f"`data_dir` holds a damaged {name}: {file} has {found} of its {size} images.")
    return builder


def _digits() -> Dataset:
    """scikit-learn's digits; every fifth image of each class is a test image: 1,433 for training, 364 for testing."""
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


def _next_within(superclasses: tuple[int, ...]) -> tuple[int, ...]:
    """For each class the next one of its superclass, the first after the last."""
    of = {s: [c for c, other in enumerate(superclasses) if other == s] for s in set(superclasses)}
    return tuple(of[s][(of[s].index(c) + 1) % len(of[s])] for c, s in enumerate(superclasses))


def _stream(builder: Any, about: Prepared, split: str) -> Stream:
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    indices, shift = np.arange(len(source)), np.zeros(len(source), np.int32)
    return Stream(source, f"{builder.info.full_name} {split}", STREAM_SIDE, indices, shift, about.num_classes)


def _decoded(builder: Any, split: str, report: Report | None) -> Split:
    """A split of a prepared data set, from the cache or decoded into it."""
    source = builder.as_data_source(split)
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
