"""Prepared data sets: a tensorflow-datasets folder made here, the cache, and the damage to both."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from experiments import data
from experiments.data import records
from experiments.storage import files

SIZES = {"train": 30, "test": 12}


def pixels(split, i, shape=(32, 32, 3)):
    """Image i of a split: noise of its own."""
    return np.random.default_rng([len(split), i]).integers(0, 256, shape, np.uint8)


def encoded(image):
    """The bytes of a PNG file, which keeps every pixel."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()


def write_prepared(root, name, version, splits):
    """Writes a data set as tensorflow-datasets prepares it (array_record).

    A row is {feature: bytes, int, float or a list of one of them}, or the bytes of the whole record.
    """
    folder = root / name / version
    folder.mkdir(parents=True)
    about = []
    for split, rows in splits.items():
        path = folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(row if isinstance(row, bytes) else serialized(row))
        writer.close()
        about.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(path.stat().st_size),
                "shardLengths": [str(len(rows))],
            }
        )
    info = {"fileFormat": "array_record", "name": name.split("/")[0], "version": version, "splits": about}
    if "/" in name:
        info["configName"] = name.split("/")[1]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def serialized(row):
    """A tf.train.Example."""
    example = tf_example_pb2.Example()
    for key, value in row.items():
        feature, values = example.features.feature[key], value if isinstance(value, list) else [value]
        kinds = {int: feature.int64_list, float: feature.float_list, bytes: feature.bytes_list}
        kinds[type(values[0]) if values else int].value.extend(values)
    return example.SerializeToString()


def cifar_row(split, i, **more):
    return {"id": f"{split}_{i}".encode(), "image": encoded(pixels(split, i)), "label": i % 10, **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with cifar10 of 30 and 12 made-up images."""
    root = tmp_path_factory.mktemp("tfds")
    splits = {split: [cifar_row(split, i) for i in range(size)] for split, size in SIZES.items()}
    write_prepared(root, "cifar10", "3.0.2", splits)
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HERO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestCifar10:
    def test_reads_what_tensorflow_datasets_prepared(self, root, cache, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(root))
        dataset = data.load("cifar10")
        for split, size in SIZES.items():
            images, labels = getattr(dataset, split)
            assert images.shape == (size, 32, 32, 3)
            assert images.dtype == np.uint8
            np.testing.assert_array_equal(labels, np.arange(size) % 10)
            np.testing.assert_array_equal(images[5], pixels(split, 5))

    def test_decodes_once_and_reports_progress(self, root, cache):
        calls = []
        first = data.load("cifar10", root, lambda done, total: calls.append((done, total)))
        assert calls == [(30, 30), (12, 12)]
        second = data.load("cifar10", root, lambda done, total: calls.append("again"))
        assert "again" not in calls
        np.testing.assert_array_equal(first.train.images, second.train.images)

    @pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
    def test_damaged_cache_is_said_and_decoded_again(self, root, cache, damage):
        data.load("cifar10", root)
        file = next(cache.glob("*train*.npz"))
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        with pytest.warns(UserWarning, match=r"The cached images at .* are damaged"):
            dataset = data.load("cifar10", root)
        np.testing.assert_array_equal(dataset.train.images[7], pixels("train", 7))
        assert file.read_bytes() == whole

    def test_cache_that_cannot_be_written_is_said_and_nothing_is_left(self, root, tmp_path, monkeypatch):
        blocked = tmp_path / "file"
        blocked.write_text("in the way")
        monkeypatch.setenv("HERO_JAX_CACHE", str(blocked / "cache"))
        with pytest.warns(UserWarning, match="Could not cache the decoded images"):
            assert len(data.load("cifar10", root).test.labels) == 12

    def test_folder_that_is_missing_or_not_prepared(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(
                FileNotFoundError,
                match=r"`data_dir` must hold cifar10 .* `python -m experiments.prepare cifar10 --data",
            ):
                data.load("cifar10", folder)


class TestCacheIsOfItsFolder:
    """The cache belongs to what is in the files, not to the name and sizes of a data set."""

    @staticmethod
    def write(root, shift):
        """cifar10 with the label (i + shift) mod 10: every file has the same name and size."""
        rows = [cifar_row("train", i, label=(i + shift) % 10) for i in range(12)]
        return write_prepared(root, "cifar10", "3.0.2", {"train": rows, "test": rows})

    def test_two_folders_that_differ_in_their_labels(self, tmp_path, cache):
        sizes = [
            [file.stat().st_size for file in sorted(self.write(tmp_path / f"{shift}", shift).iterdir())]
            for shift in (0, 3)
        ]
        assert sizes[0] == sizes[1]
        for shift in (0, 3, 0):
            dataset = data.load("cifar10", tmp_path / f"{shift}")
            for split in (dataset.train, dataset.test):
                np.testing.assert_array_equal(split.labels, (np.arange(12) + shift) % 10)

    def test_file_changed_in_place_with_its_size_and_times_kept(self, tmp_path, cache):
        file = next(self.write(tmp_path / "here", 0).glob("*train*"))
        before = file.stat()
        data.load("cifar10", tmp_path / "here")
        other = next(self.write(tmp_path / "other", 3).glob("*train*"))
        with file.open("r+b") as target:
            target.write(other.read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        dataset = data.load("cifar10", tmp_path / "here")
        np.testing.assert_array_equal(dataset.train.labels, (np.arange(12) + 3) % 10)
        np.testing.assert_array_equal(dataset.test.labels, np.arange(12) % 10)

    def test_a_copy_elsewhere_is_not_decoded_again(self, tmp_path, cache):
        shutil.copytree(self.write(tmp_path / "here", 0), tmp_path / "copy" / "cifar10" / "3.0.2")
        data.load("cifar10", tmp_path / "here")
        calls = []
        dataset = data.load("cifar10", tmp_path / "copy", lambda done, total: calls.append(done))
        assert not calls
        np.testing.assert_array_equal(dataset.train.labels, np.arange(12) % 10)

    def test_cache_of_an_earlier_version_is_left_alone(self, tmp_path, cache):
        folder = self.write(tmp_path, 0)
        cache.mkdir()
        for split in ("train", "test"):
            size = next(folder.glob(f"*{split}*")).stat().st_size
            images, labels = np.zeros((12, 32, 32, 3), np.uint8), np.full(12, 7, np.int32)
            np.savez(cache / f"cifar10-3.0.2-{split}-12-{size}.npz", images=images, labels=labels)
        np.testing.assert_array_equal(data.load("cifar10", tmp_path).train.labels, np.arange(12) % 10)
        assert len(list(cache.iterdir())) == 4

    @pytest.mark.parametrize(
        ("images", "labels", "reason"),
        [
            (np.zeros((12, 32, 32, 1), np.uint8), np.zeros(12, np.int32), r"it holds images \(12, 32, 32, 1\)"),
            (np.zeros((11, 32, 32, 3), np.uint8), np.zeros(11, np.int32), r"it holds images \(11, 32, 32, 3\)"),
            (np.zeros((12, 32, 32, 3), np.uint8), np.zeros((12, 1), np.int32), r"and labels \(12, 1\)"),
            (np.zeros((12, 32, 32, 3), np.float32), np.zeros(12, np.int32), "it holds float32 images"),
            (np.zeros((12, 32, 32, 3), np.uint8), np.zeros(12, np.float32), "and float32 labels"),
        ],
    )
    def test_cache_of_another_shape_or_type(self, tmp_path, cache, images, labels, reason):
        self.write(tmp_path, 0)
        data.load("cifar10", tmp_path)
        np.savez(next(cache.glob("*train*")), images=images, labels=labels)
        with pytest.warns(UserWarning, match=rf"The cached images at .*train.* are damaged \(.*{reason}"):
            dataset = data.load("cifar10", tmp_path)
        np.testing.assert_array_equal(dataset.train.labels, np.arange(12) % 10)

    def test_file_that_changes_while_it_is_read_is_not_cached(self, tmp_path, cache):
        file = next(self.write(tmp_path, 0).glob("*train*"))

        def change(done, total):
            file.write_bytes(file.read_bytes() + b"more")

        with pytest.raises(ValueError, match=r"^`data_dir` holds a damaged cifar10: split 'train' in .* changed while"):
            data.load("cifar10", tmp_path, change)
        assert not cache.exists()


class TestOtherSets:
    def test_cifar100(self, tmp_path, cache):
        rows = [cifar_row("train", i, coarse_label=0) for i in range(12)]
        write_prepared(tmp_path, "cifar100", "3.0.2", {"train": rows, "test": rows[:5]})
        dataset = data.load("cifar100", tmp_path)
        assert (dataset.train.size, dataset.test.size, dataset.num_classes) == (12, 5, 100)
        assert dataset.train.shape == (32, 32, 3)
        np.testing.assert_array_equal(dataset.test.images[3], pixels("train", 3))
        # aquarium_fish -> flatfish -> ray -> shark -> trout -> aquarium_fish are the fish, maple_tree -> oak_tree.
        fish = [1, 32, 67, 73, 91]
        assert [dataset.similar[c] for c in fish] == [*fish[1:], fish[0]]
        assert dataset.similar[47] == 52
        # Twenty cycles of five.
        followed = np.arange(100)
        for length in range(1, 6):
            followed = np.asarray(dataset.similar)[followed]
            assert (followed == np.arange(100)).all() == (length == 5)

    def test_fashion_mnist(self, tmp_path, cache):
        rows = [{"image": encoded(pixels("train", i, (28, 28, 1))), "label": i} for i in range(10)]
        write_prepared(tmp_path, "fashion_mnist", "3.0.1", {"train": rows, "test": rows[:4]})
        dataset = data.load("fashion_mnist", tmp_path)
        assert dataset.train.shape == (28, 28, 1)
        np.testing.assert_array_equal(dataset.test.images[3], pixels("train", 3, (28, 28, 1)))
        assert dataset.pixels.augment

    @pytest.mark.parametrize("name", records.DATASETS)
    def test_statistics_fit_their_channels(self, name):
        about = records.DATASETS[name].pixels
        assert len(about.mean) == len(about.std) == (1 if name == "fashion_mnist" else 3)
        assert all(0.2 < mean < 0.6 and 0.1 < std < 0.4 for mean, std in zip(about.mean, about.std, strict=True))


class TestDamagedFolder:
    """A folder that is there but not whole is told apart from one that is not there."""

    @pytest.fixture
    def folder(self, tmp_path, cache):
        rows = [cifar_row("train", i) for i in range(6)]
        return write_prepared(tmp_path, "cifar10", "3.0.2", {"train": rows, "test": rows})

    @pytest.mark.parametrize("keep", [0, 1 / 2, None])
    def test_file_cut_off_or_missing(self, folder, tmp_path, keep):
        file = next(folder.glob("*test*"))
        whole = file.read_bytes()
        file.unlink() if keep is None else file.write_bytes(whole[: int(keep * len(whole))])
        with pytest.raises(ValueError, match=r"`data_dir` holds a damaged cifar10: .*test.* has 0 of its 6 images\."):
            data.load("cifar10", tmp_path)

    def test_description_missing(self, folder, tmp_path):
        (folder / "dataset_info.json").unlink()
        with pytest.raises(ValueError, match=r"`data_dir` holds only a part of cifar10, .* no split 'test' is known"):
            data.load("cifar10", tmp_path)

    def test_description_cut_off(self, folder, tmp_path):
        (folder / "dataset_info.json").write_text('{"name": ')
        with pytest.raises(ValueError, match=r"`data_dir` holds a damaged cifar10: dataset_info.json in .* cannot be"):
            data.load("cifar10", tmp_path)

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (b"\xff\xfe{}", "'utf-8' codec can't decode byte 0xff"),
            (b"[" * 100_000, "recursion"),
            (b"{}", "do not match"),
            ({"version": "3.0.1"}, r"do not match\. Builder version: 3\.0\.2\. Proto version: 3\.0\.1"),
            ({"fileFormat": "array"}, "'array' is not a valid FileFormat"),
            ({"more": 1}, 'no field named "more"'),
            ({"splits": [{"name": "test", "shardLengths": "6"}]}, "Failed to parse shardLengths"),
        ],
    )
    def test_description_that_cannot_be_used(self, folder, tmp_path, damage, reason):
        file = folder / "dataset_info.json"
        file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(described(folder) | damage).encode())
        error = refused("cifar10", tmp_path)
        assert re.match(r"`data_dir` holds a damaged cifar10: dataset_info\.json in .* cannot be read \(", error)
        assert re.search(reason, error)
        assert len(error) < 500

    def test_folder_that_cannot_be_looked_into(self, tmp_path):
        assert re.search(
            r"dataset_info\.json in .* cannot be read \(.*too long", refused("cifar10", tmp_path / ("x" * 300))
        )

    @pytest.mark.parametrize("split", ["train", "test"])
    @pytest.mark.parametrize("lengths", [None, [], ["0"], ["-6"], ["6", "0"]])
    def test_split_without_lengths(self, folder, tmp_path, split, lengths):
        info = described(folder)
        entry = next(entry for entry in info["splits"] if entry["name"] == split)
        del entry["shardLengths"]
        if lengths is not None:
            entry["shardLengths"] = lengths
        (folder / "dataset_info.json").write_text(json.dumps(info))
        assert re.fullmatch(
            rf"`data_dir` holds a damaged cifar10: dataset_info\.json in .*/3\.0\.2 must give split '{split}'"
            rf" files with images; its shardLengths are \[{', '.join(lengths or [])}\]\.",
            refused("cifar10", tmp_path),
        )

    def test_more_files_than_there_are(self, folder, tmp_path):
        info = described(folder)
        info["splits"][1]["shardLengths"] = ["4", "2"]
        (folder / "dataset_info.json").write_text(json.dumps(info))
        assert refused("cifar10", tmp_path).endswith("cifar10-test.array_record-00000-of-00002 has 0 of its 4 images.")

    def test_names_of_files_that_cannot_be_made(self, folder, tmp_path):
        info = described(folder)
        info["splits"][0]["filepathTemplate"] = "{WHAT}"
        (folder / "dataset_info.json").write_text(json.dumps(info))
        assert re.match(r"`data_dir` .*/3\.0\.2 names no files of split 'train' \(", refused("cifar10", tmp_path))

    @pytest.mark.parametrize("damage", [b"{", b"\xff\xfe{}", b"[" * 100_000])
    def test_features_that_cannot_be_read(self, folder, tmp_path, damage):
        (folder / "features.json").write_bytes(damage)
        pattern = r"`data_dir` holds a damaged cifar10: .*/3\.0\.2/features\.json cannot be read \(.*\)\."
        assert re.fullmatch(pattern, refused("cifar10", tmp_path))

    def test_features_of_other_classes(self, folder, tmp_path):
        label = {"classLabel": {"numClasses": "100"}}
        (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"label": label}}}))
        assert refused("cifar10", tmp_path).endswith("features.json tells of 100 classes, not of 10.")

    @pytest.mark.parametrize("content", [[], {"type": "FeaturesDict"}, {"featuresDict": {"features": {"label": 1}}}])
    def test_features_in_another_form_are_left_to_tensorflow_datasets(self, folder, tmp_path, content):
        (folder / "features.json").write_text(json.dumps(content))
        assert records.find("cifar10", tmp_path).info.splits["train"].num_examples == 6


class TestOtherFormats:
    @pytest.fixture
    def folder(self, tmp_path, cache):
        rows = [cifar_row("train", i) for i in range(6)]
        return write_prepared(tmp_path, "cifar10", "3.0.2", {"train": rows, "test": rows})

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"fileFormat": "tfrecord"}, "tfrecord"),
            ({"fileFormat": None}, "tfrecord"),
            ({"fileFormat": "tfrecord", "alternativeFileFormats": ["riegeli"]}, "riegeli and tfrecord"),
        ],
    )
    def test_is_named_with_what_to_run(self, folder, tmp_path, change, found):
        (folder / "dataset_info.json").write_text(json.dumps(described(folder) | change))
        error = refused("cifar10", tmp_path)
        assert error == (
            "`data_dir` must hold cifar10 prepared as array_record; by its dataset_info.json, what is in"
            f" {folder} is {found}. With a network and TensorFlow, `python -m experiments.prepare cifar10 --data-dir"
            " ANOTHER_FOLDER` prepares it."
        )

    def test_array_record_beside_another_is_read(self, folder, tmp_path):
        change = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
        (folder / "dataset_info.json").write_text(json.dumps(described(folder) | change))
        dataset = data.load("cifar10", tmp_path)
        np.testing.assert_array_equal(dataset.train.images[4], pixels("train", 4))
        np.testing.assert_array_equal(dataset.test.labels, np.arange(6))


def described(folder):
    """What dataset_info.json says."""
    return json.loads((folder / "dataset_info.json").read_text())


def refused(name, root):
    """The error of a data set that cannot be loaded: one line that begins as the command line wants it."""
    with pytest.raises(ValueError, match=r"^`data_dir` ") as caught:
        data.load(name, root)
    error = str(caught.value)
    assert "\n" not in error
    return error


def png(values, depth):
    """A PNG file (H, W, channels) of `depth` bits a channel, 8 or 16; Pillow writes no more than 8 for colors."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 3: 2}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(f">u{depth // 8}").tobytes() for line in values)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def saved(image, mode):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "PNG")
    return file.getvalue()


WHOLE = encoded(pixels("train", 4))
RECORDS = {
    "truncated image": ({"image": WHOLE[: len(WHOLE) // 2]}, r".*truncated.*"),
    "image of no format": ({"image": b"not an image"}, r"its image is of no known format"),
    "empty image": ({"image": b""}, r"its image is of no known format"),
    "no image": ({"image": None}, r"it has no image"),
    "image of numbers": ({"image": 3}, r"its image 3 is not encoded"),
    "two images": ({"image": [WHOLE, WHOLE]}, r"it has 2 images"),
    "smaller": (
        {"image": encoded(pixels("train", 4, (28, 30, 3)))},
        r"its image is 28 x 30 of mode RGB, not 32 x 32 .*",
    ),
    "gray": ({"image": saved(pixels("train", 4), "L")}, r"its image is 32 x 32 of mode L, not 32 x 32 of mode RGB"),
    "alpha": ({"image": saved(pixels("train", 4), "RGBA")}, r"its image is 32 x 32 of mode RGBA, not .*"),
    "palette": ({"image": saved(pixels("train", 4), "P")}, r"its image is 32 x 32 of mode P, not .*"),
    "16 bits": ({"image": png(pixels("train", 4).astype(int), 16)}, r"its image has 16 bits a channel, not 8"),
    "no label": ({"label": None}, r"it has no label"),
    "empty label": ({"label": []}, r"it has no label"),
    "two labels": ({"label": [3, 4]}, r"it has 2 labels"),
    "text": ({"label": b"cat"}, r"its label b'cat' is not an integer"),
    "text of a number": ({"label": b"3"}, r"its label b'3' is not an integer"),
    "float": ({"label": 3.75}, r"its label 3.75 is not an integer"),
    "too large": ({"label": 10}, r"its label 10 is not in 0..9"),
    "negative": ({"label": -1}, r"its label -1 is not in 0..9"),
    "no example": (b"\xff\xff", r".*[Ee]rror.*"),
    "empty": (b"", r"it has no image"),
}


@pytest.mark.parametrize("change", [{}, {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}])
def test_a_stream_reads_the_same_in_another_process(change, tmp_path):
    rows = [{"image": encoded(pixels("train", i, (300, 320, 3))), "label": i} for i in range(3)]
    folder = write_prepared(tmp_path, "imagenette/320px-v2", "1.0.0", {"train": rows, "validation": rows})
    (folder / "dataset_info.json").write_text(json.dumps(described(folder) | change))
    split = data.load("imagenette", tmp_path).train
    again = pickle.loads(pickle.dumps(split))
    for ours, theirs in zip(split.first(3), again.first(3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


class TestDamagedRecord:
    @staticmethod
    def write(root, damage, i=4, name="cifar10", version="3.0.2", splits=("train", "test")):
        """A data set with damage to row i of the second split."""
        rows = [cifar_row("train", i) for i in range(7)]
        damaged = (
            {key: value for key, value in (rows[i] | damage).items() if value is not None}
            if isinstance(damage, dict)
            else damage
        )
        return write_prepared(root, name, version, {splits[0]: rows, splits[1]: [*rows[:i], damaged, *rows[i + 1 :]]})

    @pytest.mark.parametrize("chunk", [500, 3])
    @pytest.mark.parametrize("kind", RECORDS)
    def test_is_named(self, tmp_path, cache, monkeypatch, kind, chunk):
        monkeypatch.setattr(records, "CHUNK", chunk)
        damage, reason = RECORDS[kind]
        folder = self.write(tmp_path, damage)
        assert re.fullmatch(
            rf"`data_dir` holds a damaged cifar10: record 4 of split 'test' in {folder} cannot be read \({reason}\)\.",
            refused("cifar10", tmp_path),
        )
        # Not the second time either.
        assert not list(cache.glob("*test*"))

    @pytest.mark.parametrize("chunk", [500, 3])
    def test_flipped_bit(self, tmp_path, cache, monkeypatch, chunk):
        monkeypatch.setattr(records, "CHUNK", chunk)
        file = next(self.write(tmp_path, {}).glob("*test*"))
        content = bytearray(file.read_bytes())
        content[content.index(WHOLE[1000:1100])] ^= 1
        file.write_bytes(content)
        assert re.search(
            r"record 4 of split 'test' in .* cannot be read \(.*hash mismatch", refused("cifar10", tmp_path)
        )

    def test_8_bits_and_labels_at_the_ends_are_taken(self, tmp_path, cache, monkeypatch):
        monkeypatch.setattr(records, "CHUNK", 3)
        self.write(tmp_path, {"image": png(pixels("train", 9), 8), "label": 9})
        dataset = data.load("cifar10", tmp_path)
        np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2, 3, 9, 5, 6])
        expected = [pixels("train", 9 if i == 4 else i) for i in range(7)]
        np.testing.assert_array_equal(dataset.test.images, expected)

    def test_gray_image_of_16_bits(self, tmp_path, cache):
        rows = [{"image": encoded(pixels("train", i, (28, 28, 1))), "label": i} for i in range(3)]
        rows[1]["image"] = png(pixels("train", 1, (28, 28, 1)).astype(int), 16)
        write_prepared(tmp_path, "fashion_mnist", "3.0.1", {"train": rows, "test": rows[:1]})
        assert re.search(
            r"record 1 of split 'train' in .* \(its image is 28 x 28 of mode I", refused("fashion_mnist", tmp_path)
        )

    @pytest.mark.parametrize("kind", ["image of no format", "no image", "no label", "text", "too large", "negative"])
    def test_of_a_stream_is_named_when_it_is_read(self, tmp_path, kind):
        damage, reason = RECORDS[kind]
        self.write(tmp_path, damage, 4, "imagenette/320px-v2", "1.0.0", ("train", "validation"))
        test = data.load("imagenette", tmp_path).test
        assert test.rows(np.array([3, 5])).labels.tolist() == [3, 5]
        reason = "cannot identify image file" if kind == "image of no format" else reason
        with pytest.raises(
            files.Failed, match=rf"^Image 4 of imagenette/320px-v2/1.0.0 validation cannot .*\({reason}"
        ):
            test.rows(np.array([3, 4]))
