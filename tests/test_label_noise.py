"""Label noise: exact shares, which labels each kind gives, what a draw depends on."""

import numpy as np
import pytest

from experiments import data
from experiments.config import LABEL_NOISE_KINDS
from experiments.data import label_noise


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
        noisy = label_noise.alter(dataset, rate, "symmetric", 3)
        np.testing.assert_array_equal(noisy.true_labels, dataset.train.labels)
        assert (noisy.train.labels != noisy.true_labels).sum() == round(rate * 301)
        assert noisy.train.labels.dtype == np.int32
        np.testing.assert_array_equal(noisy.test.labels, dataset.test.labels)

    def test_symmetric_reaches_every_other_class_equally(self):
        counts = transitions(label_noise.alter(labeled(5, 2000), 0.8, "symmetric", 0))
        off_diagonal = counts[~np.eye(5, dtype=bool)]
        # 20 cells, each binomial with 2,000 images and probability 0.8 / 4.
        assert abs(off_diagonal - 400).max() < 4 * np.sqrt(2000 * 0.2 * 0.8)

    def test_uniform_leaves_one_in_c_as_it_was(self):
        num_classes, size, rate = 4, 8000, 0.6
        noisy = label_noise.alter(labeled(num_classes, size // num_classes), rate, "uniform", 0)
        drawn = round(rate * size)
        kept = drawn - (noisy.train.labels != noisy.true_labels).sum()
        assert abs(kept - drawn / num_classes) < 4 * np.sqrt(drawn / num_classes * (1 - 1 / num_classes))

    @pytest.mark.parametrize("similar", [(0, 0, 3, 2, 1), None])
    def test_asymmetric_moves_the_exact_share_of_each_class_to_one_class(self, similar):
        counts = transitions(label_noise.alter(labeled(5, 30, similar), 0.43, "asymmetric", 1))
        expected = np.zeros((5, 5), int)
        for c in range(5):
            expected[c, c] += 30 - 13
            expected[c, similar[c] if similar else (c + 1) % 5] += 13
        np.testing.assert_array_equal(counts, expected)

    @pytest.mark.parametrize("kind", LABEL_NOISE_KINDS)
    def test_depends_on_the_seed(self, kind):
        dataset = labeled(6, 50)
        first, again, other = (label_noise.alter(dataset, 0.5, kind, seed).train.labels for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.1

    @pytest.mark.parametrize("kind", ["symmetric", "uniform"])
    def test_higher_rate_alters_the_same_images_and_more(self, kind):
        dataset = labeled(6, 50)
        low, high = (label_noise.alter(dataset, rate, kind, 1) for rate in (0.3, 0.7))
        altered = low.train.labels != low.true_labels
        np.testing.assert_array_equal(low.train.labels[altered], high.train.labels[altered])

    def test_leaves_the_clean_data_set_alone(self):
        dataset = labeled(6, 50)
        before = dataset.train.labels.copy()
        label_noise.alter(dataset, 0.9, "asymmetric", 1)
        np.testing.assert_array_equal(dataset.train.labels, before)

    @pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
    def test_rate_outside(self, rate):
        with pytest.raises(ValueError, match=r"`label_noise` must be between 0 and 1; got (-0.1|1.5|nan)\."):
            label_noise.alter(labeled(3, 2), rate, "uniform", 0)

    def test_unknown_kind(self):
        with pytest.raises(
            ValueError, match=r"`label_noise_kind` must be one of 'symmetric', .*; got 'symetric'\. Did"
        ):
            label_noise.alter(labeled(3, 2), 0.1, "symetric", 0)
