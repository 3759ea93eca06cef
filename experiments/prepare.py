"""Downloads and prepares a data set, once: `python -m experiments.prepare cifar100`.

tensorflow-datasets itself downloads, shuffles and writes array_record without TensorFlow, but the code that it has for
each data set opens archives and image files through it, so that this command needs it; nothing else here does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli, data
from experiments.data import records
from experiments.storage import files
from hero_jax import errors


def main(name: Annotated[str, tyro.conf.Positional], data_dir: Path | None = None) -> None:
    """Downloads a data set and prepares it as array_record; where it is there and whole, says so and does nothing.

    Args:
      name: digits, cifar10, cifar100, fashion_mnist, imagenette or imagenet2012.
      data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR, then ~/tensorflow_datasets.
    """
    errors.one_of("name", name, data.DATASETS)
    if name == "digits":
        cli.console.print("digits comes with scikit-learn: there is nothing to prepare")
        return
    try:
        builder, state = records.find(name, data_dir), "already there"
    except FileNotFoundError:
        prepare(name, records.folder(data_dir))
        builder, state = records.find(name, data_dir), "prepared"
    sizes = [f"{builder.info.splits[split].num_examples:,} {split}" for split in records.DATASETS[name].splits]
    megabytes = sum(file.stat().st_size for file in Path(builder.data_path).iterdir()) / 1e6
    where = f"{name} in {builder.data_path}, {' and '.join(sizes)} images, {megabytes:,.1f} MB"
    cli.console.print(f"{where}: {state}", soft_wrap=True)


def prepare(name: str, root: Path) -> None:
    """Downloads and prepares a data set that is not in `root`.

    Raises files.Failed where TensorFlow or files to be fetched by hand are missing, or the download fails; says which.
    """
    # It may be megabytes of wheels away: say so before anything is downloaded.
    if importlib.util.find_spec("tensorflow") is None:
        raise files.Failed(
            f"Preparing {name} needs TensorFlow, which is not there (`pip install tensorflow`); reading it does not."
        )
    import tensorflow_datasets as tfds

    about, manual = records.DATASETS[name], root / "downloads" / "manual"
    missing = [file for file in about.manual if not (manual / file).exists()]
    if missing:
        raise files.Failed(
            f"{name} must be fetched by hand, from https://image-net.org/download-images; {' and '.join(missing)}"
            f" must be in {manual}."
        )
    builder = tfds.builder(about.name, data_dir=root, file_format="array_record")
    cli.console.print(f"preparing {name} in {builder.data_path}", soft_wrap=True)
    try:
        builder.download_and_prepare()
    except Exception as error:  # of the network, the disk, or a changed archive
        reason = records.one_line(error)
        raise files.Failed(f"{name} was not prepared, and nothing was left half done ({reason}).") from error


if __name__ == "__main__":
    cli.run(main)
