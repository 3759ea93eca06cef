"""Data sets: digits, parts of a data set, the order of an epoch, augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.data import label_noise


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
        noisy = data.subset(label_noise.alter(dataset, 0.5, "symmetric", 0), 400, 100)
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
