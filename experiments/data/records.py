"""Data sets that tensorflow-datasets has prepared as array_record (`experiments/prepare.py`), read without TensorFlow.

Small ones are decoded once and cached as plain arrays, large ones are streams.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data.catalog import DATASETS
from experiments.data.streams import Split, Stream
from experiments.storage import files
from hero_jax import errors

# Height and width of the images of a stream.
STREAM_SIDE = 224
# Images that are read at once when a split is decoded.
CHUNK = 500

# Called with (done, total) while something long goes on.
Report = Callable[[int, int], None]


def folder(data_dir: Path | None) -> Path:
    """Where prepared data sets are: `data_dir`, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(name: str, data_dir: Path | None) -> Any:
    """The tensorflow-datasets builder of a data set of `DATASETS` that is there and whole; raises as `data.load`."""
    import tensorflow_datasets as tfds

    root, about = folder(data_dir), DATASETS[name]
    builder_name, _, config = about.name.partition("/")
    with _damage(name, f"dataset_info.json in {root / about.name} cannot be read"):
        builder = tfds.builder_cls(builder_name)(data_dir=root, config=config or None)
        path = Path(builder.data_path)
        is_there = path.exists()
    must = f"`data_dir` must hold {name} prepared as array_record;"
    command = f"With a network and TensorFlow, `python -m experiments.prepare {name} --data-dir"
    if not is_there:
        raise FileNotFoundError(f"{must} nothing is at {path}. {command} {root}` prepares it.")
    info: Any = builder.info
    for split in sorted(about.splits):
        if split not in info.splits:
            raise ValueError(f"`data_dir` holds only a part of {name}, in {path}: no split {split!r} is known there.")
    # A builder of known code has those beside the first in its proto alone.
    formats = {info.file_format.value, *info.as_proto.alternative_file_formats}
    if "array_record" not in formats:
        found = f"by its dataset_info.json, what is in {path} is {' and '.join(sorted(formats))}"
        raise ValueError(f"{must} {found}. {command} ANOTHER_FOLDER` prepares it.")
    _take_array_record(info)
    _check_features(name, path / "features.json")
    for split in about.splits:
        _check_files(name, builder, split)
    return builder


def _take_array_record(info: Any) -> None:
    """Of a data set in several formats, this one; a builder that was pickled has the first again."""
    if info.file_format.value != "array_record":
        info.set_file_format("array_record", override=True, override_if_initialized=True)


def one_line(error: Exception) -> str:
    """What an error says, in one line that is not endless; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(f"`data_dir` holds a damaged {name}: {what}.")


@contextlib.contextmanager
def _damage(name: str, what: str) -> Iterator[None]:
    """Makes of whatever damaged files raise the error that says `what`."""
    try:
        yield
    except Exception as error:
        raise _damaged(name, f"{what} ({one_line(error)})") from error


def _check_features(name: str, path: Path) -> None:
    """Raises where features.json is damaged or tells of other classes; tensorflow-datasets goes by its own code."""
    if not path.exists():
        return
    with _damage(name, f"{path} cannot be read"):
        content = json.loads(path.read_bytes())
    known = told = DATASETS[name].num_classes
    with contextlib.suppress(KeyError, TypeError, ValueError):  # older versions wrote it in another form
        told = int(content["featuresDict"]["features"]["label"]["classLabel"]["numClasses"])
    if told != known:
        raise _damaged(name, f"{path} tells of {told} classes, not of {known}")


def _check_files(name: str, builder: Any, split: str) -> None:
    """Raises unless every file of a split has as many images as the description says."""
    from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingImports]

    info = builder.info.splits[split]
    description = f"dataset_info.json in {builder.data_path}"
    with _damage(name, f"{description} names no files of split {split!r}"):
        sizes = list(zip(info.filepaths, info.shard_lengths, strict=True))
    if min(info.shard_lengths, default=0) < 1:
        lengths = f"its shardLengths are {info.shard_lengths}"
        raise _damaged(name, f"{description} must give split {split!r} files with images; {lengths}")
    for file, size in sizes:
        # The reader finds no images in a file that is cut off, and in none.
        found = ArrayRecordReader(str(file)).num_records() if file.exists() else 0
        if found != size:
            raise _damaged(name, f"{file} has {found} of its {size} images")


def load(name: str, data_dir: Path | None, report: Report | None) -> tuple[Split | Stream, Split | Stream]:
    """The images for training and for testing of a data set of `DATASETS`; arguments and errors are `data.load`'s."""
    about, builder = DATASETS[name], find(name, data_dir)

    def read(split: str) -> Split | Stream:
        rows = _Rows(builder, split, about.num_classes)
        if not about.is_large:
            return _decoded(name, builder, split, rows, report)
        indices, shift = np.arange(len(rows)), np.zeros(len(rows), np.int32)
        return Stream(rows, f"{builder.info.full_name} {split}", STREAM_SIDE, indices, shift, about.num_classes)

    train, test = map(read, about.splits)
    return train, test


class _Rows:
    """The rows of a split, {"image": an encoded image, "label": int}, each checked as it is read, by any thread.

    tensorflow-datasets itself casts labels: 3.7 and b"3" would become 3.
    """

    def __init__(self, builder: Any, split: str, num_classes: int) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        _take_array_record(builder.info)
        self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        self._parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
        self._num_classes = num_classes
        self._made_of = builder, split, num_classes

    def __reduce__(self) -> Any:
        # The parser cannot be pickled: another process opens the files itself.
        return _Rows, self._made_of

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i; raises ValueError where it is not what it must be, and says what."""
        return self._row(self._records[i])

    def __getitems__(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """These rows, whose bytes are read at once, which is faster, or one by one where some cannot be read."""
        try:
            records = self._records.__getitems__(list(indices))
        except Exception:  # whatever the reader raises, without telling which
            records = map(self._records.__getitem__, indices)
        return map(self._row, records)

    def _row(self, record: bytes) -> dict[str, Any]:
        features = self._parse(record).features.feature
        image, label = _only(features, "image", "bytes_list"), _only(features, "label", "int64_list")
        if not 0 <= label < self._num_classes:
            raise ValueError(f"its label {label} is not in 0..{self._num_classes - 1}")
        return {"image": image, "label": label}


def _only(features: Any, key: str, kind: str) -> Any:
    """The one value of a feature of a tf.train.Example; kind is the type of list that it must be."""
    # A key that is not there gives a feature of no kind.
    found = features[key].WhichOneof("kind")
    values = () if found is None else getattr(features[key], found).value
    if len(values) != 1:
        raise ValueError(f"it has {len(values) or 'no'} {key}{'s' * bool(values)}")
    if found != kind:
        wanted = {"bytes_list": "encoded", "int64_list": "an integer"}[kind]
        raise ValueError(f"its {key} {errors.brief(values[0])} is not {wanted}")
    return values[0]


def _pixels(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an image that must have this shape and 8 bits a channel."""
    mode = {1: "L", 3: "RGB"}[shape[-1]]
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        raise ValueError("its image is of no known format") from None
    found, wanted = f"{image.height} x {image.width} of mode {image.mode}", f"{shape[0]} x {shape[1]} of mode {mode}"
    if found != wanted:
        raise ValueError(f"its image is {found}, not {wanted}")
    # Pillow makes 8 bits of any number of them; a PNG file tells it in byte 24.
    if image.format == "PNG" and encoded[24] != 8:
        raise ValueError(f"its image has {encoded[24]} bits a channel, not 8")
    return np.asarray(image).reshape(shape)


def _decoded(name: str, builder: Any, split: str, rows: _Rows, report: Report | None) -> Split:
    """A split of a prepared data set, from the cache or decoded into it."""
    shape, paths = builder.info.features["image"].shape, builder.info.splits[split].filepaths
    content = _content(paths)
    cache = files.cache_folder() / f"{builder.info.full_name.replace('/', '-')}-{split}-{content}.npz"
    cached = _read_cache(cache, (len(rows), *shape))
    if cached is not None:
        return cached
    decoded = Split(np.empty((len(rows), *shape), np.uint8), np.empty(len(rows), np.int32))
    for start in range(0, len(rows), CHUNK):
        indices = range(start, min(start + CHUNK, len(rows)))
        chunk = rows.__getitems__(indices)
        for i in indices:
            with _damage(name, f"record {i} of split {split!r} in {builder.data_path} cannot be read"):
                row = next(chunk)
                decoded.images[i], decoded.labels[i] = _pixels(row["image"], shape), row["label"]
        if report is not None:
            report(indices.stop, len(rows))
    if _content(paths) != content:
        raise _damaged(name, f"split {split!r} in {builder.data_path} changed while it was read")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(cache) as file:
            np.savez(file, images=decoded.images, labels=decoded.labels)
    except (OSError, files.Failed) as error:
        warnings.warn(f"Could not cache the decoded images at {cache} ({error}).", stacklevel=2)
    return decoded


def _content(paths: Iterable[Any]) -> str:
    """Tells files apart by what is in them, in a hundredth of the time of decoding; a copy may keep size and times."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _read_cache(path: Path, shape: tuple[int, ...]) -> Split | None:
    """The cached images, of this shape (N, H, W, C), and labels; None where there are none or damaged ones (said)."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            split = Split(arrays["images"], arrays["labels"])
        if split.images.shape != shape or split.labels.shape != shape[:1]:
            raise ValueError(f"it holds images {split.images.shape} and labels {split.labels.shape}, not {shape}")
        if (split.images.dtype, split.labels.dtype) != (np.uint8, np.int32):
            raise ValueError(f"it holds {split.images.dtype} images and {split.labels.dtype} labels")
    except Exception as error:  # whatever a damaged zip file raises
        warnings.warn(f"The cached images at {path} are damaged ({error}); decoding them again.", stacklevel=2)
        return None
    return split
