"""The images of a split, all in memory or decoded when they are asked for, their pixels, and reading ahead.

A stream is read by explicit indices, so that the order of the data, and where a run continues in it, is the caller's;
this is why no data loader is used, whose iterators bring an order and a state of their own.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from experiments.storage import files

T = TypeVar("T")
R = TypeVar("R")
# The share of the shorter side that the central crop keeps: of 256 pixels, 224 (He et al. 2016, section 3.4).
CENTRAL = 224 / 256
# Batches that are decoded while one is in use.
AHEAD = 2


class Pixels(NamedTuple):
    """How pixels become inputs: (x / scale - mean) / std a channel, after `data.crop_and_flip` in training or not.

    A stream has cropped and flipped its images already.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool


class Split(NamedTuple):
    """images (N, H, W, C) uint8 and labels (N,) int32, in memory."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (H, W, C) of an image."""
        return self.images.shape[1:]

    def first(self, n: int | None) -> Split:
        """The first n images, or all where there are fewer and for None, in memory."""
        return Split(self.images[:n], self.labels[:n])

    def take(self, indices: np.ndarray) -> Split:
        """The images of these indices, in their order."""
        return Split(self.images[indices], self.labels[indices])

    def relabeled(self, shift: np.ndarray, num_classes: int) -> Split:
        """These images with the labels (label + shift) mod num_classes."""
        return self._replace(labels=(self.labels + shift) % num_classes)

    def parts(self, batch_size: int) -> Iterator[Split]:
        """All images in order, in parts that fit in memory: here one, of a stream of `batch_size`, read ahead."""
        yield self


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A split that stays on disk: a read gives the images of some indices, cropped and resized to one shape.

    Evaluation takes the central square of 224/256 of the shorter side. Training takes a random crop: with u uniform in
    0.08..1 and r in log 3/4..log 4/3, of area u of the image and ratio exp(r) of width to height, anywhere in it; after
    10 draws that do not fit, the central square; and flips one in two left to right. Both are resized by bilinear
    interpolation over all pixels of the crop. A crop depends on seed, epoch and the index in the prepared split alone,
    so that it is the same in a continued run, in a subset and in any number of processes.

    `size`, `shape`, `first`, `take`, `relabeled` and `parts` are those of `Split`, with images as in evaluation.

    source: gives the row of an index, {"image": an encoded image, "label": int}, to several threads at a time.
    name: of the split, for messages.
    side: height and width of the images read.
    indices: of the images in the source.
    shift: what is added to each label, mod `num_classes`.

    Source of the random crop: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
    """

    source: Any
    name: str
    side: int
    indices: np.ndarray
    shift: np.ndarray
    num_classes: int

    @property
    def size(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.side, self.side, 3

    def first(self, n: int | None) -> Split:
        return self.rows(np.arange(self.size)[:n])

    def take(self, indices: np.ndarray) -> Stream:
        return dataclasses.replace(self, indices=self.indices[indices], shift=self.shift[indices])

    def relabeled(self, shift: np.ndarray, num_classes: int) -> Stream:
        return dataclasses.replace(self, shift=self.shift + shift, num_classes=num_classes)

    def parts(self, batch_size: int) -> Iterator[Split]:
        return prefetch(self.rows, (np.arange(self.size)[i : i + batch_size] for i in range(0, self.size, batch_size)))

    def rows(self, indices: np.ndarray, augment: tuple[int, int] | None = None) -> Split:
        """The images of these indices, decoded by several threads (decoding holds no lock).

        `augment` is (seed, epoch) of the random crops, or None for those of evaluation. Raises files.Failed at an image
        that cannot be read, and says which.
        """
        split = Split(np.empty((len(indices), *self.shape), np.uint8), np.empty(len(indices), np.int32))
        with ThreadPoolExecutor() as threads:
            for row, made in enumerate(threads.map(lambda i: self._row(i, augment), indices)):
                split.images[row], split.labels[row] = made
        return split

    def _row(self, i: int, augment: tuple[int, int] | None) -> tuple[np.ndarray, int]:
        index = int(self.indices[i])
        try:
            example = self.source[index]
            image = Image.open(io.BytesIO(example["image"]))
            box, flip = central_crop(*image.size), False
            if augment is not None:
                rng = np.random.default_rng([*augment, index])
                box, flip = random_crop(rng, *image.size), rng.random() < 0.5
            pixels = np.asarray(image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR, box))
        except Exception as error:  # whatever a damaged file raises
            raise files.Failed(f"Image {index} of {self.name} cannot be read ({error}).") from error
        return pixels[:, ::-1] if flip else pixels, (example["label"] + self.shift[i]) % self.num_classes


def central_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the central square of 224/256 of the shorter side."""
    side = CENTRAL * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_crop(rng: np.random.Generator, width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a crop for training (`Stream`)."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    return central_crop(width, height)


def prefetch(load: Callable[[T], R], items: Iterable[T], ahead: int = AHEAD) -> Generator[R]:
    """`load(item)` of each item, or what it raises, in order, with the next `ahead` under way in a thread of their own.

    Closing the iterator ends the thread, after the item it is at.
    """
    thread = ThreadPoolExecutor(1)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(thread.submit(load, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
