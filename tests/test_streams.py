"""Streams: what a read gives, random crops, reading ahead, every layout, two real processes, training and resuming."""

import io
import math
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import data, train
from experiments.config import resolve
from experiments.data import label_noise, records, streams
from experiments.storage import files, runs
from experiments.training import compiled, loop
from tests import problems
from tests.test_parallel import run_two
from tests.test_prepared import encoded, write_prepared

SIDE = 8
SIZES = {"train": 40, "validation": 21}
LAYOUTS = {
    "none": {},
    "groups": {"sync": False, "groups": 4},
    "pmap": {"parallel": "pmap"},
    "jit": {"parallel": "jit"},
    "sharded": {"parallel": "jit", "shard_params": True},
}


def picture(split, i):
    """Image i of a split: of a size of its own, its brightness tells its class, i mod 10."""
    rng = np.random.default_rng([len(split), i])
    height, width = rng.integers(12, 40, 2)
    return (rng.integers(0, 20, (height, width, 3)) + 23 * (i % 10)).astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with imagenette of 40 and 21 made-up images."""
    root = tmp_path_factory.mktemp("tfds")
    splits = {
        split: [{"image": encoded(picture(split, i)), "label": i % 10} for i in range(size)]
        for split, size in SIZES.items()
    }
    write_prepared(root, "imagenette/320px-v2", "1.0.0", splits)
    return root


@pytest.fixture(autouse=True)
def small_side(monkeypatch):
    monkeypatch.setattr(records, "STREAM_SIDE", SIDE)


@pytest.fixture
def dataset(root):
    return data.load("imagenette", root)


def stream(images, side=SIDE, num_classes=10):
    """A stream of images in memory, with the labels 0, 1, 2, ..."""
    source = [{"image": encoded(image), "label": i % num_classes} for i, image in enumerate(images)]
    return streams.Stream(source, "made up", side, np.arange(len(images)), np.zeros(len(images), np.int32), num_classes)


def gradient(height, width):
    """A smooth image: brightness rises to the right in red, downwards in green."""
    y, x = np.mgrid[:height, :width] * 1.0
    return np.stack([255 * x / width, 255 * y / height, 0 * x], -1).astype(np.uint8)


def config(**options):
    options = {"model": "mlp", "epochs": 2, "batch_size": 8, "learning_rate": 0.02, "rho": 0.1, "gamma": 1.0} | options
    return resolve(dataset="imagenette", gamma_warmup=0, **options)


class TestStream:
    def test_reads_what_tensorflow_datasets_prepared(self, dataset):
        assert (dataset.train.size, dataset.test.size) == (40, 21)
        assert dataset.train.shape == (SIDE, SIDE, 3)
        split = dataset.test.rows(np.array([20, 3]))
        assert split.images.shape == (2, SIDE, SIDE, 3)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(split.labels, [0, 3])
        # Noise in 0..19, averaged, on 23 times the class.
        np.testing.assert_allclose(split.images.mean((1, 2, 3)), [9.5, 9.5 + 3 * 23], atol=2)

    @pytest.mark.parametrize("shape", [(300, 400), (500, 260)])
    def test_evaluation_is_a_resize_and_a_central_crop(self, shape):
        """The oracle makes the shorter side 256 and cuts 224 pixels out of the middle."""
        image = Image.fromarray(gradient(*shape))
        width, height = (round(x * 256 / min(image.size)) for x in image.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        oracle = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
        found = stream([np.asarray(image)], side=224).first(1).images[0]
        assert np.abs(found.astype(int) - np.asarray(oracle)).max() <= 2

    def test_gray_and_palette_images_become_color(self):
        gray = Image.fromarray(gradient(20, 20)[..., 0])
        files = []
        for image in (gray, gray.convert("P"), gray.convert("CMYK")):
            file = io.BytesIO()
            image.save(file, "TIFF")
            files.append({"image": file.getvalue(), "label": 0})
        split = streams.Stream(files, "", SIDE, np.arange(3), np.zeros(3, np.int32), 1).first(3)
        for image in split.images:
            np.testing.assert_array_equal(image, split.images[0])
            np.testing.assert_array_equal(image[..., 0], image[..., 2])

    def test_random_crops_depend_on_seed_epoch_and_image_alone(self, dataset):
        train = dataset.train
        rows = train.rows(np.arange(10), augment=(3, 5)).images
        shuffled = train.rows(np.array([7, 2]), augment=(3, 5)).images
        np.testing.assert_array_equal(shuffled, rows[[7, 2]])
        part = train.take(np.array([30, 7, 2])).rows(np.array([1, 2]), augment=(3, 5)).images
        np.testing.assert_array_equal(part, rows[[7, 2]])
        for other in ((3, 6), (4, 5), None):
            assert (train.rows(np.arange(10), augment=other).images != rows).any((1, 2, 3)).all()

    def test_half_are_flipped(self):
        found = stream([gradient(40, 40)] * 200).rows(np.arange(200), augment=(0, 0)).images.astype(int)
        flipped = found[:, :, 0, 0].mean(1) > found[:, :, -1, 0].mean(1)
        assert abs(flipped.sum() - 100) < 4 * math.sqrt(50)
        # Never upside down.
        assert (found[:, 0, :, 1].mean(1) < found[:, -1, :, 1].mean(1)).all()

    def test_take_relabeled_and_first(self, dataset):
        shift = np.arange(40, dtype=np.int32)
        part = dataset.train.relabeled(shift, 10).take(np.array([12, 5, 39]))
        assert part.size == 3
        np.testing.assert_array_equal(part.first(2).labels, [(2 + 12) % 10, (5 + 5) % 10])
        assert dataset.train.first(None).size == 40
        np.testing.assert_array_equal(part.first(9).images, dataset.train.rows(np.array([12, 5, 39])).images)

    def test_parts_are_all_images_in_order(self, dataset):
        parts = list(dataset.test.parts(8))
        assert [part.size for part in parts] == [8, 8, 5]
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), dataset.test.first(99).images)
        split = dataset.test.first(99)
        assert list(split.parts(8)) == [split]

    def test_damaged_image_is_named(self):
        broken = stream([gradient(20, 20)] * 6)
        broken.source[4]["image"] = broken.source[4]["image"][:60]
        with pytest.raises(files.Failed, match=r"Image 4 of made up cannot be read \("):
            broken.take(np.array([0, 4])).rows(np.array([0, 1]))


class TestRandomCrop:
    def test_lies_in_the_image_with_the_stated_areas_and_ratios(self):
        width, height = 640, 480
        boxes = np.array([streams.random_crop(np.random.default_rng(i), width, height) for i in range(2000)])
        left, top, right, bottom = boxes.T
        assert (boxes >= 0).all()
        assert (right <= width).all()
        assert (bottom <= height).all()
        areas, ratios = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
        assert areas.min() > 0.079
        assert areas.min() < 0.09
        assert areas.max() > 0.95
        assert ratios.min() > 0.74
        assert ratios.max() < 1.35
        # As likely wide as tall among small crops, which all fit; and anywhere.
        small = areas < 0.3
        assert abs((ratios[small] > 1).mean() - 0.5) < 4 * 0.5 / math.sqrt(small.sum())
        assert abs((left + right).mean() / 2 - width / 2) < 10

    def test_image_that_no_crop_fits(self):
        assert streams.random_crop(np.random.default_rng(0), 1000, 10) == streams.central_crop(1000, 10)
        assert streams.central_crop(1000, 10) == pytest.approx((495.625, 0.625, 504.375, 9.375))


class TestPrefetch:
    def test_order_and_bounded_memory(self):
        started = []

        def load(i):
            started.append(i)
            return i * i

        found = []
        for value in streams.prefetch(load, range(20), ahead=3):
            found.append(value)
            time.sleep(0.005)
            assert len(started) <= len(found) + 3
        assert found == [i * i for i in range(20)]

    def test_reads_ahead(self):
        third = threading.Event()
        iterator = streams.prefetch(lambda i: third.set() if i == 2 else None, range(5), ahead=2)
        next(iterator)
        assert third.wait(10)
        iterator.close()

    def test_error_comes_in_its_turn(self):
        iterator = streams.prefetch(lambda i: 1 / (2 - i), range(5))
        assert [next(iterator), next(iterator)] == [0.5, 1.0]
        with pytest.raises(ZeroDivisionError):
            next(iterator)
        assert not threads()

    def test_closing_ends_the_thread(self):
        iterator = streams.prefetch(lambda i: i, iter(range(10**9)))
        next(iterator)
        assert threads()
        iterator.close()
        assert not threads()


def threads():
    """The threads that read."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


class TestLabelNoise:
    @pytest.mark.parametrize("kind", ["symmetric", "uniform"])
    def test_is_that_of_the_same_images_in_memory(self, dataset, kind):
        split = dataset.train.first(40)
        noisy = label_noise.alter(dataset, 0.6, kind, 2)
        expected = label_noise.alter(dataset._replace(train=split), 0.6, kind, 2).train.labels
        assert (expected != split.labels).sum() > 10
        np.testing.assert_array_equal(noisy.train.first(40).labels, expected)
        np.testing.assert_array_equal(noisy.train.rows(np.array([31, 3]), augment=(0, 0)).labels, expected[[31, 3]])
        assert noisy.true_labels is None

    def test_asymmetric_is_refused(self, dataset):
        with pytest.raises(ValueError, match=r"`label_noise_kind` must be 'symmetric' or 'uniform' .* streamed"):
            label_noise.alter(dataset, 0.6, "asymmetric", 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_steps_equal_those_in_memory(dataset, layout):
    run = config(**LAYOUTS[layout])
    images = dataset._replace(train=dataset.train.first(40))
    in_memory, streamed = compiled.build(run, images), compiled.build(run, dataset)
    assert streamed.layout.local_rows(8) == slice(0, 8)
    whole = in_memory.layout.replicate(images.train)
    states = [trainer.init(0) for trainer in (in_memory, streamed)]
    for indices in data.epoch_order(0, 0, 40, 8)[:3]:
        states[0], expected = in_memory.step(states[0], *whole, indices)
        states[1], found = streamed.step(states[1], *dataset.train.rows(indices))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    problems.assert_close(*(in_memory.layout.to_host(state.params) for state in states), rtol=1e-5)


# Each process reads its own rows, and no others.
PROCESS = """
import sys
import jax
from experiments.training import layouts
layouts.join(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from experiments import data
from experiments.data import records
from experiments.training import compiled
from tests import test_streams
records.STREAM_SIDE = test_streams.SIDE
dataset = data.load("imagenette", sys.argv[4])
for name in ("pmap", "sharded"):
    trainer = compiled.build(test_streams.config(**test_streams.LAYOUTS[name]), dataset)
    rows = trainer.layout.local_rows(8)
    assert rows == slice(4 * int(sys.argv[2]), 4 * int(sys.argv[2]) + 4)
    state, losses = trainer.init(0), []
    for indices in data.epoch_order(0, 0, 40, 8)[:3]:
        state, loss = trainer.step(state, *dataset.train.rows(indices[rows]))
        losses.append(float(loss))
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(trainer.layout.to_host(state.params)))}
    np.savez(f"{sys.argv[3]}/{name}-{sys.argv[2]}.npz", losses=losses, **leaves)
"""


def test_two_processes_bring_their_own_rows(dataset, root, tmp_path):
    command = [sys.executable, "-c", PROCESS]
    outputs = run_two(command, lambda address, i: [address, str(i), str(tmp_path), str(root)])
    assert [code for code, _ in outputs] == [0, 0], outputs
    one = compiled.build(config(), dataset)
    state, losses = one.init(0), []
    for indices in data.epoch_order(0, 0, 40, 8)[:3]:
        state, loss = one.step(state, *dataset.train.rows(indices))
        losses.append(float(loss))
    for layout in ("pmap", "sharded"):
        for process in range(2):
            found = np.load(tmp_path / f"{layout}-{process}.npz")
            np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
            leaves = [found[str(i)] for i in range(len(found) - 1)]
            problems.assert_close(leaves, jax.tree.leaves(state.params), rtol=1e-4)


class TestTraining:
    def test_the_command(self, root, tmp_path, capsys):
        run = config(epochs=30, eval_every=30)
        train.main(run, out=tmp_path / "run", data_dir=root)
        assert "(n = 1 run, 21 images)" in capsys.readouterr().out
        last = runs.read_metrics(tmp_path / "run")[-1]
        # Ten classes that brightness tells apart.
        assert last["accuracy"] > 0.5
        assert not threads()
        read, trainer, variables, images = compiled.load(tmp_path / "run", root, None)
        assert trainer.evaluate(variables, images.test)["accuracy"] == last["accuracy"]
        in_memory = trainer.evaluate(variables, images.test.first(21))
        assert in_memory == pytest.approx({name: last[name] for name in ("accuracy", "loss")}, rel=1e-6)
        assert read.task.dataset == "imagenette"

    def test_evaluation_in_chunks_equals_that_in_memory(self, dataset, monkeypatch):
        monkeypatch.setattr(compiled, "EVAL_BATCH", 8)
        trainer = compiled.build(config(), dataset)
        state = trainer.init(1)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found, expected = (trainer.evaluate(variables, x) for x in (dataset.test, dataset.test.first(21)))
        assert found == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("augment", [True, False])
    def test_the_batches_are_those_of_the_order_with_random_crops(self, augment, dataset, monkeypatch):
        """Of a process whose devices have the last two rows."""
        run, seen = config(seed=4, augment=augment), []
        trainer = compiled.build(run, dataset)
        monkeypatch.setattr(trainer.layout, "local_rows", lambda batch_size: slice(batch_size - 2, batch_size))

        def step(state, images, labels, **options):
            seen.append((images, labels))
            return state._replace(step=state.step + 1), np.float32(0)

        loop.train(run, dataset, trainer=trainer._replace(step=step))
        assert len(seen) == 10
        for i, (images, labels) in enumerate(seen):
            indices = data.epoch_order(4, i // 5, 40, 8)[i % 5, 6:]
            expected = dataset.train.rows(indices, augment=(4, i // 5) if augment else None)
            np.testing.assert_array_equal(images, expected.images)
            np.testing.assert_array_equal(labels, indices % 10)

    def test_a_part_for_every_step_is_the_whole_run_bit_for_bit(self, dataset, tmp_path):
        run = config(every=1, curvature_size=16, save_minutes=0.0)
        trainer = compiled.build(run, dataset)

        def part(out, **options):
            now = run.replace(**options)
            with runs.RunFolder(out, now, now.may_differ()) as folder:
                return loop.train(now, dataset, folder, trainer=trainer)

        whole = part(tmp_path / "whole")
        for _ in range(10):
            parts = part(tmp_path / "parts", max_minutes=1e-9)
        jax.tree.map(np.testing.assert_array_equal, parts.variables, whole.variables)
        rows = [runs.read_metrics(tmp_path / name) for name in ("parts", "whole")]
        for row, expected in zip(*rows, strict=True):
            assert row | {"images_per_second": 0} == expected | {"images_per_second": 0}

    def test_images_held_out(self, dataset):
        part = data.subset(dataset, 24, 10)
        assert (part.train.size, part.validation.size, part.test.size) == (24, 10, 21)
        assert not set(part.train.indices) & set(part.validation.indices)
        assert "validation_accuracy" in loop.train(config(epochs=1), part).metrics

    def test_damaged_image_ends_the_run_and_its_threads(self):
        images = stream([gradient(20, 20)] * 16)
        images.source[11]["image"] = b"nothing"
        broken = data.Dataset(images, images, 10, data.Pixels(255.0, (0.5,) * 3, (0.25,) * 3, augment=False))
        with pytest.raises(files.Failed, match="Image 11 of made up cannot be read"):
            loop.train(config(), broken)
        assert not threads()

    def test_several_steps_a_call_are_refused(self, dataset):
        with pytest.raises(ValueError, match="`steps_per_call` must be 1 for a data set that is streamed; got 4"):
            compiled.build(config(steps_per_call=4), dataset)
