"""Data sets: splits, a prepared tensorflow-datasets folder made here, the cache and its damage, augmentation."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from experiments import data

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
    """Writes a data set as tensorflow-datasets prepares it (array_record): rows of {feature: bytes or int} a split."""
    folder = root / name / version
    folder.mkdir(parents=True)
    about = []
    for split, rows in splits.items():
        path = folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            example = tf_example_pb2.Example()
            for key, value in row.items():
                feature = example.features.feature[key]
                (feature.int64_list if isinstance(value, int) else feature.bytes_list).value.append(value)
            writer.write(example.SerializeToString())
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


def cifar_row(split, i, **more):
    return {"id": f"{split}_{i}".encode(), "image": encoded(pixels(split, i)), "label": i % 10, **more}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
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
    def test_reads_what_tensorflow_datasets_prepared(self, prepared, cache, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
        dataset = data.load("cifar10")
        for split, size in SIZES.items():
            images, labels = getattr(dataset, split)
            assert images.shape == (size, 32, 32, 3)
            assert images.dtype == np.uint8
            np.testing.assert_array_equal(labels, np.arange(size) % 10)
            np.testing.assert_array_equal(images[5], pixels(split, 5))

    def test_decodes_once_and_reports_progress(self, prepared, cache):
        calls = []
        first = data.load("cifar10", prepared, lambda done, total: calls.append((done, total)))
        assert calls == [(30, 30), (12, 12)]
        second = data.load("cifar10", prepared, lambda done, total: calls.append("again"))
        assert "again" not in calls
        np.testing.assert_array_equal(first.train.images, second.train.images)

    @pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
    def test_damaged_cache_is_said_and_decoded_again(self, prepared, cache, damage):
        data.load("cifar10", prepared)
        file = next(cache.glob("*train*.npz"))
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        with pytest.warns(UserWarning, match=r"The cached images at .* are damaged"):
            dataset = data.load("cifar10", prepared)
        np.testing.assert_array_equal(dataset.train.images[7], pixels("train", 7))
        assert file.read_bytes() == whole

    def test_cache_that_cannot_be_written_is_said_and_nothing_is_left(self, prepared, tmp_path, monkeypatch):
        blocked = tmp_path / "file"
        blocked.write_text("in the way")
        monkeypatch.setenv("HERO_JAX_CACHE", str(blocked / "cache"))
        with pytest.warns(UserWarning, match="Could not cache the decoded images"):
            assert len(data.load("cifar10", prepared).test.labels) == 12

    def test_folder_that_is_missing_or_not_prepared(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(
                FileNotFoundError,
                match=r"`data_dir` must hold cifar10 .* `python -m experiments.prepare cifar10 --data",
            ):
                data.load("cifar10", folder)


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

    @pytest.mark.parametrize("name", data.PREPARED)
    def test_statistics_fit_their_channels(self, name):
        about = data.PREPARED[name].pixels
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


class TestDigits:
    def test_splits(self):
        dataset = data.load("digits")
        assert dataset.train.images.shape == (1433, 8, 8, 1)
        assert dataset.test.images.shape == (364, 8, 8, 1)
        assert set(dataset.test.labels) == set(range(10))
        assert dataset.train.images.max() == 16
        # No image is in both.
        train = {image.tobytes() for image in dataset.train.images}
        assert sum(image.tobytes() in train for image in dataset.test.images) == 0

    def test_normalized_pixels_have_zero_mean_and_unit_deviation(self):
        dataset = data.load("digits")
        x = data.normalize(jnp.asarray(dataset.train.images), dataset.pixels)
        assert abs(float(x.mean())) < 0.01
        assert abs(float(x.std()) - 1) < 0.01


class TestSubset:
    def test_held_out_images_are_not_trained_on(self):
        dataset = data.load("digits")
        part = data.subset(dataset, 500, 300)
        assert part.train.size == 500
        assert part.validation.size == 300
        assert part.test is dataset.test
        held_out = {image.tobytes() for image in part.validation.images}
        assert not any(image.tobytes() in held_out for image in part.train.images)
        again = data.subset(dataset, 500, 300)
        np.testing.assert_array_equal(part.train.images, again.train.images)

    def test_without_sizes_nothing_changes(self):
        dataset = data.load("digits")
        assert data.subset(dataset, None, 0) is dataset

    def test_without_validation_size_there_is_no_validation(self):
        part = data.subset(data.load("digits"), 100, 0)
        assert part.train.size == 100
        assert part.validation is None

    def test_keeps_true_labels_with_their_images(self):
        dataset = data.load("digits")
        noisy = data.subset(data.with_label_noise(dataset, 0.5, "symmetric", 0), 400, 100)
        clean = data.subset(dataset, 400, 100)
        np.testing.assert_array_equal(noisy.train.images, clean.train.images)
        np.testing.assert_array_equal(noisy.true_labels, clean.train.labels)

    def test_too_many(self):
        with pytest.raises(ValueError, match=r"`train_size` \+ `validation_size` must be at most 1433 .* got 1500"):
            data.subset(data.load("digits"), 1400, 100)

    def test_keeps_a_random_part_of_the_test_images(self):
        digits = data.load("digits")
        part = data.subset(digits, None, 0, 100)
        assert part.train is digits.train
        assert part.test.size == 100
        rows = {image.tobytes() for image in digits.test.images}
        assert {image.tobytes() for image in part.test.images} <= rows
        assert len(np.unique(part.test.labels)) == 10
        assert not np.array_equal(part.test.images, digits.test.images[:100])
        np.testing.assert_array_equal(part.test.images, data.subset(digits, 500, 10, 100).test.images)
        with pytest.raises(ValueError, match="`test_size` must be at most 364 for this data set; got 365"):
            data.subset(digits, None, 0, 365)


def labeled(num_classes, each, similar=None):
    """A data set with `each` images of every class, in a random order."""
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(num_classes, dtype=np.int32), each))
    split = data.Split(np.zeros((len(labels), 2, 2, 1), np.uint8), labels)
    return data.Dataset(split, split, num_classes, data.Pixels(255.0, (0.5,), (0.25,), False), similar)


def transitions(dataset):
    """How many images of each class (row) have each label (column)."""
    counts = np.zeros((dataset.num_classes,) * 2, int)
    np.add.at(counts, (dataset.true_labels, dataset.train.labels), 1)
    return counts


class TestLabelNoise:
    @pytest.mark.parametrize("rate", [0.0, 0.3, 0.777, 1.0])
    def test_symmetric_alters_exactly_the_share_and_never_to_the_true_label(self, rate):
        dataset = labeled(7, 43)
        noisy = data.with_label_noise(dataset, rate, "symmetric", 3)
        np.testing.assert_array_equal(noisy.true_labels, dataset.train.labels)
        assert (noisy.train.labels != noisy.true_labels).sum() == round(rate * 301)
        assert noisy.train.labels.dtype == np.int32
        np.testing.assert_array_equal(noisy.test.labels, dataset.test.labels)

    def test_symmetric_reaches_every_other_class_equally(self):
        counts = transitions(data.with_label_noise(labeled(5, 2000), 0.8, "symmetric", 0))
        off_diagonal = counts[~np.eye(5, dtype=bool)]
        # 20 cells, each binomial with 2,000 images and probability 0.8 / 4.
        assert abs(off_diagonal - 400).max() < 4 * np.sqrt(2000 * 0.2 * 0.8)

    def test_uniform_leaves_one_in_c_as_it_was(self):
        num_classes, size, rate = 4, 8000, 0.6
        noisy = data.with_label_noise(labeled(num_classes, size // num_classes), rate, "uniform", 0)
        drawn = round(rate * size)
        kept = drawn - (noisy.train.labels != noisy.true_labels).sum()
        assert abs(kept - drawn / num_classes) < 4 * np.sqrt(drawn / num_classes * (1 - 1 / num_classes))

    @pytest.mark.parametrize("similar", [(0, 0, 3, 2, 1), None])
    def test_asymmetric_moves_the_exact_share_of_each_class_to_one_class(self, similar):
        counts = transitions(data.with_label_noise(labeled(5, 30, similar), 0.43, "asymmetric", 1))
        expected = np.zeros((5, 5), int)
        for c in range(5):
            expected[c, c] += 30 - 13
            expected[c, similar[c] if similar else (c + 1) % 5] += 13
        np.testing.assert_array_equal(counts, expected)

    @pytest.mark.parametrize("kind", data.LABEL_NOISE)
    def test_depends_on_the_seed(self, kind):
        dataset = labeled(6, 50)
        first, again, other = (data.with_label_noise(dataset, 0.5, kind, seed).train.labels for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.1

    @pytest.mark.parametrize("kind", ["symmetric", "uniform"])
    def test_higher_rate_alters_the_same_images_and_more(self, kind):
        dataset = labeled(6, 50)
        low, high = (data.with_label_noise(dataset, rate, kind, 1) for rate in (0.3, 0.7))
        altered = low.train.labels != low.true_labels
        np.testing.assert_array_equal(low.train.labels[altered], high.train.labels[altered])

    def test_leaves_the_clean_data_set_alone(self):
        dataset = labeled(6, 50)
        before = dataset.train.labels.copy()
        data.with_label_noise(dataset, 0.9, "asymmetric", 1)
        np.testing.assert_array_equal(dataset.train.labels, before)

    @pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
    def test_rate_outside(self, rate):
        with pytest.raises(ValueError, match=r"`label_noise` must be between 0 and 1; got (-0.1|1.5|nan)\."):
            data.with_label_noise(labeled(3, 2), rate, "uniform", 0)

    def test_unknown_kind(self):
        with pytest.raises(
            ValueError, match=r"`label_noise_kind` must be one of 'symmetric', .*; got 'symetric'\. Did"
        ):
            data.with_label_noise(labeled(3, 2), 0.1, "symetric", 0)


def test_epoch_order_depends_on_seed_and_epoch_alone_and_visits_each_image_once():
    order = data.epoch_order(3, 4, 103, 10)
    assert order.shape == (10, 10)
    assert len(set(order.ravel().tolist())) == 100
    np.testing.assert_array_equal(order, data.epoch_order(3, 4, 103, 10))
    assert (order != data.epoch_order(3, 5, 103, 10)).any()
    assert (order != data.epoch_order(4, 4, 103, 10)).any()


def test_crop_and_flip_moves_each_image_by_its_own_offset():
    images = jax.random.uniform(jax.random.key(0), (40, 6, 5, 2)) + 1.0
    result = np.asarray(jax.jit(data.crop_and_flip, static_argnames="pad")(jax.random.key(1), images, pad=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = set()
    for i in range(40):
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (1, -1)
            if np.array_equal(padded[i, dy : dy + 6, dx : dx + 5][:, ::flip], result[i])
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == set(range(5))
    assert {flip for _, _, flip in found} == {1, -1}


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"`dataset` must be one of 'digits', 'cifar10', .*; got 'cifar1000'. Did you"):
        data.load("cifar1000")
