"""The command that prepares a data set: what is there, what is missing, and what failed, each in one line."""

import io

import pytest
import tensorflow_datasets as tfds

from experiments import data, prepare
from experiments.data import records
from experiments.storage import files
from tests.test_prepared import cifar_row, pixels, write_prepared


@pytest.fixture
def with_tensorflow(monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)


def says(capsys, name, root):
    """What the command prints."""
    prepare.main(name, root)
    return capsys.readouterr().out


def test_digits_need_nothing(tmp_path, capsys):
    assert "nothing to prepare" in says(capsys, "digits", tmp_path)


def test_what_is_there_is_said_with_its_sizes(tmp_path, capsys):
    rows = [cifar_row("train", i) for i in range(6)]
    folder = write_prepared(tmp_path, "cifar10", "3.0.2", {"train": rows, "test": rows[:4]})
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    assert f"{folder}, 6 train and 4 test images, {size:.1f} MB: already there" in says(capsys, "cifar10", tmp_path)


def test_what_is_damaged_is_not_prepared_again(tmp_path, with_tensorflow):
    rows = [cifar_row("train", i) for i in range(6)]
    folder = write_prepared(tmp_path, "cifar10", "3.0.2", {"train": rows, "test": rows})
    file = next(folder.glob("*train*"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"`data_dir` holds a damaged cifar10: .*train.* has 0 of its 6 images"):
        prepare.main("cifar10", tmp_path)
    assert file.stat().st_size == 1000


def test_what_is_in_another_format_is_not_prepared_there(tmp_path, with_tensorflow):
    rows = [cifar_row("train", i) for i in range(6)]
    folder = write_prepared(tmp_path, "cifar10", "3.0.2", {"train": rows, "test": rows})
    file = folder / "dataset_info.json"
    file.write_text(file.read_text().replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match=r"^`data_dir` must hold cifar10 prepared as array_record; .* is tfrecord\. With"
    ):
        prepare.main("cifar10", tmp_path)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tensorflow_itself_is_not_needed_to_write(tmp_path, with_tensorflow, monkeypatch, capsys, cache_folder):
    """tensorflow-datasets' own machinery, on rows that are made here in place of those in the archive."""

    def examples():
        for i in range(5):
            row = cifar_row("train", i)
            yield i, row | {"image": io.BytesIO(row["image"]), "id": row["id"].decode()}

    cifar10 = tfds.builder_cls("cifar10")
    monkeypatch.setattr(cifar10, "_split_generators", lambda *_: {"train": examples(), "test": examples()})
    assert "5 train and 5 test images" in says(capsys, "cifar10", tmp_path)
    assert "already there" in says(capsys, "cifar10", tmp_path)
    found = {image.tobytes() for image in data.load("cifar10", tmp_path).train.images}
    assert found == {pixels("train", i).tobytes() for i in range(5)}


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HERO_JAX_CACHE", str(tmp_path / "cache"))


def test_preparation_that_fails_leaves_nothing(tmp_path, with_tensorflow, monkeypatch):
    def fail(*_):
        raise ConnectionError("Failed to resolve\nthe host")

    monkeypatch.setattr(tfds.builder_cls("cifar10"), "_split_generators", fail)
    with pytest.raises(files.Failed, match=r"^cifar10 was not prepared, .* \(Failed to resolve the host\)\.$"):
        prepare.main("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError):
        records.find("cifar10", tmp_path)
    assert not list((tmp_path / "cifar10").rglob("*.array_record*"))


def test_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        files.Failed, match=r"Preparing cifar100 needs TensorFlow, which is not there \(`pip install tens"
    ):
        prepare.main("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def test_imagenet_must_be_fetched_by_hand(tmp_path, with_tensorflow):
    manual = tmp_path / "downloads" / "manual"
    both = r"ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar must be in .*downloads/manual\.$"
    with pytest.raises(files.Failed, match=f"imagenet2012 must be fetched by hand, from https://image-net.* {both}"):
        prepare.main("imagenet2012", tmp_path)
    manual.mkdir(parents=True)
    (manual / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(files.Failed, match=r"images; ILSVRC2012_img_val.tar must be in"):
        prepare.main("imagenet2012", tmp_path)


def test_the_folder_is_the_one_that_tensorflow_datasets_looks_in(tmp_path):
    """Of files fetched by hand."""
    builder = tfds.builder("imagenet2012", data_dir=tmp_path, file_format="array_record")
    config = tfds.download.DownloadConfig()
    with pytest.raises(AssertionError, match=str(tmp_path / "downloads" / "manual")):
        _ = builder._make_download_manager(download_dir=None, download_config=config).manual_dir


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"`name` must be one of 'digits', .*; got 'imagenete'. Did you mean 'imagene"):
        prepare.main("imagenete", tmp_path)


def test_every_data_set_has_the_name_and_classes_that_tensorflow_datasets_knows(tmp_path):
    for about in records.DATASETS.values():
        builder = tfds.builder(about.name, data_dir=tmp_path, file_format="array_record")
        assert builder.info.features["label"].num_classes == about.num_classes
        assert builder.info.full_name.startswith(about.name)
