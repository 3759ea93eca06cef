"""Commands on a disk that is full: `unshare --user --map-root-user --mount python -m tests.full_disk FOLDER [NAME...]`

mounts a small file system on FOLDER/disk, gives each command too little room, and then again with room. Prints what
came of it as JSON: {name: {"code", "lines" (of stderr), "left" (unfinished files), "again" (code with room), "told"}}.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from experiments import cli

SMALL = ("--train-size", "64", "--epochs", "2")
# Command, kilobytes that are left, arguments; "RUN" is a run that is done.
TRIES = {
    "train, no room": ("train", 0, ("--method", "sgd", *SMALL, "--out", "new")),
    "train, records alone": ("train", 40, ("--method", "sgd", *SMALL, "--out", "new")),
    "train, some checkpoints": ("train", 200, ("--method", "sgd", *SMALL, "--save-minutes", "1e-6", "--out", "new")),
    "train, no events": ("train", 24, ("--method", "sgd", *SMALL, "--tensorboard", "--out", "new")),
    "hessian, no room": ("hessian", 0, ("RUN", "--images", "32", "--max-products", "5", "--probes", "2")),
    "hessian, one plot": ("hessian", 60, ("RUN", "--images", "32", "--max-products", "5", "--probes", "2")),
    "quantize": ("quantize", 12, ("RUN", "--bits", "4", "--specs", "channel-narrow")),
    "export": ("export", 12, ("RUN", "--bits", "4", "--images", "32", "--repeats", "1")),
    "landscape": ("landscape", 16, ("RUN", "--images", "32", "--points", "3", "--directions", "2")),
    "report, no room": ("report", 0, ("RUN",)),
    "report, no page": ("report", 90, ("RUN",)),
    "compare": ("compare", 40, ("--methods", "sgd", "--seeds", "1", *SMALL, "--bits", "4", "--out", "new")),
    "search": ("search", 40, ("--method", "sam", "--rho", "0.1", "--seeds", "1", *SMALL, "--out", "new")),
}


def call(command, arguments):
    """(exit code, lines of stderr) of a command, in this process."""
    sys.argv = [command, *arguments]
    sys.stdout.flush()
    saved, code = [os.dup(1), os.dup(2)], 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            cli.run(importlib.import_module(f"experiments.{command}").main)
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            code = repr(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, handle in enumerate(saved, 1):
                os.dup2(handle, number)
                os.close(handle)
        err.seek(0)
        return code, err.read().decode().splitlines()


def main(folder, tries):
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], check=True)
    os.chdir(disk)
    # Programs are kept there too.
    os.environ["HERO_JAX_CACHE"] = str(disk / "cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    code, lines = call("train", ["--method", "sgd", *SMALL, "--out", "RUN"])
    assert code == 0, lines
    shutil.copytree("RUN", folder / "RUN")
    found = {}
    for name in tries:
        command, kilobytes, arguments = TRIES[name]
        there = os.statvfs(disk)
        Path("filler").write_bytes(bytes(max(0, there.f_bavail * there.f_frsize - 1024 * kilobytes)))
        code, lines = call(command, arguments)
        Path("filler").unlink()
        # A lock is empty; Orbax clears away what it has begun; the cache is JAX's.
        there = [path for path in Path().rglob("*") if not re.search(r"lock$|orbax-checkpoint-tmp|^cache/", str(path))]
        left = [str(path) for path in there if path.is_file() and (path.suffix == ".tmp" or not path.stat().st_size)]
        again, told = call(command, arguments)
        found[name] = {"code": code, "lines": lines, "left": left, "again": again, "told": told}
        for path in ("new", "RUN"):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path)
        shutil.copytree(folder / "RUN", "RUN")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or TRIES)
