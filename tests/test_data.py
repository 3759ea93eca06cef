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


def pixels(split, i):
    """Image i of a split: noise of its own."""
    return np.random.default_rng([len(split), i]).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with cifar10 as tensorflow-datasets prepares it (array_record), of 30 and 12 made-up images."""
    root = tmp_path_factory.mktemp("tfds")
    folder = root / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    splits = []
    for split, size in SIZES.items():
        path = folder / f"cifar10-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for i in range(size):
            encoded = io.BytesIO()
            Image.fromarray(pixels(split, i)).save(encoded, "PNG")
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["id"].bytes_list.value.append(f"{split}_{i}".encode())
            feature["image"].bytes_list.value.append(encoded.getvalue())
            feature["label"].int64_list.value.append(i % 10)
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(path.stat().st_size),
                "shardLengths": [str(size)],
            }
        )
    info = {
        "fileFormat": "array_record",
        "moduleName": "tensorflow_datasets.image_classification.cifar",
        "name": "cifar10",
        "version": "3.0.2",
        "splits": splits,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = "tensorflow_datasets.core.features."
    shape = {"dimensions": ["32", "32", "3"]}
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": features + "features_dict.FeaturesDict",
                "featuresDict": {
                    "features": {
                        "id": {"pythonClassName": features + "text_feature.Text", "text": {}},
                        "image": {
                            "pythonClassName": features + "image_feature.Image",
                            "image": {"dtype": "uint8", "shape": shape},
                        },
                        "label": {
                            "pythonClassName": features + "class_label_feature.ClassLabel",
                            "classLabel": {"numClasses": "10"},
                        },
                    }
                },
            }
        )
    )
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
            with pytest.raises(FileNotFoundError, match=r"`data_dir` must hold cifar10 .* `tfds build cifar10 --file"):
                data.load("cifar10", folder)


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
        assert len(part.train.labels) == 500
        assert len(part.test.labels) == 300
        held_out = {image.tobytes() for image in part.test.images}
        assert not any(image.tobytes() in held_out for image in part.train.images)
        again = data.subset(dataset, 500, 300)
        np.testing.assert_array_equal(part.train.images, again.train.images)

    def test_without_sizes_nothing_changes(self):
        dataset = data.load("digits")
        assert data.subset(dataset, None, 0) is dataset

    def test_without_validation_the_test_set_stays(self):
        dataset = data.load("digits")
        assert data.subset(dataset, 100, 0).test is dataset.test

    def test_too_many(self):
        with pytest.raises(ValueError, match=r"`train_size` \+ `validation_size` must be at most 1433 .* got 1500"):
            data.subset(data.load("digits"), 1400, 100)


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
    with pytest.raises(ValueError, match=r"`dataset` must be one of 'digits', 'cifar10'; got 'cifar100'. Did you mean"):
        data.load("cifar100")
