"""Damaged files, baited folders: what a command makes of them is right, or one line, and never anything else.

CI makes the same attacks each time; `pytest tests/test_attacks.py --attacks 3000 --attack-seed 7` makes others.
"""

import collections
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import cli, export, landscape, progress, search
from experiments.analysis import curvature, deployment, sections, tidy
from experiments.config import resolve
from experiments.data import load
from experiments.measure import plan, sweep
from experiments.measure.deployment import ExportConfig
from experiments.measure.landscape import LandscapeConfig
from experiments.measure.search import SearchConfig
from experiments.measure.search import run as run_search
from experiments.storage import checkpoints, claims, files, records, runs
from hero_jax import quantize

ROOT = Path(__file__).parent.parent
CONFIG = resolve(method="hero", epochs=3, train_size=128, every=1, curvature_size=32, save_minutes=0.0)
MEASURING = sweep.Measuring(bits=(4,), curvature_size=32, curvature_products=8)
SEARCH = SearchConfig.resolve(
    method="asam", rho=(0.5, 2.0), trials=2, seeds=1, epochs=1, train_size=64, validation_size=32
)
RUN, SEARCHED = Path("sweep", "runs", "hero-s0"), Path("search", "clean-asam")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with two checkpoints that was measured, a search, a landscape, quantized networks, as they are left."""
    base = tmp_path_factory.mktemp("whole")
    with progress.bar() as display:
        begin = progress.lines(display)
        sweep.run_all({"hero": CONFIG}, [0], load("digits"), base / "sweep", begin, MEASURING)
    search.main(SEARCH, base / SEARCHED)
    landscape.main((base / RUN,), LandscapeConfig(images=32, points=3, directions=2), base / "landscape")
    params = runs.load_variables(base / RUN)["params"]
    spec = quantize.named("channel-narrow")
    quantize.save(base / "network.safetensors", quantize.quantize(params, 4, spec), spec)
    export.main(base / RUN, ExportConfig(bits=(4,), images=32, repeats=1), out=base / "export")

    def build(*_, **__):
        raise MadeAgain

    with pytest.MonkeyPatch.context() as patch:
        # What is not there would be trained again, which takes time, and is right.
        patch.setattr("experiments.training.compiled.build", build)
        yield base


def comparable(tree):
    """A tree of arrays or JSON values as bytes that are equal where it is."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path), np.asarray(leaf).dtype.str, np.asarray(leaf).tobytes()) for path, leaf in leaves
    ]


class Pictures:
    """Makes no picture."""

    def copied(self, image, caption):
        return image.name, caption

    def __call__(self, plot, *arguments, caption, **options):
        return repr(arguments), caption


def ignored(*_: Any) -> Any:
    return ignored


# What commands make of each kind of file: the folder is that of `whole`, or a copy.
def report(base):
    found = tidy.read([base / "sweep"])
    return found.table.to_csv(), found.runs.drop(columns=["path"]).to_csv()


def continued_sweep(base):
    found = sweep.run_all({"hero": CONFIG}, [0], load("digits"), base / "sweep", ignored, MEASURING)
    return json.dumps([(run.name, run.history, run.measured) for run in found], sort_keys=True)


def continued_run(base):
    """The state that a run goes on from, and the evaluations until then."""
    out = base / RUN
    with runs.RunFolder(out, CONFIG, CONFIG.may_differ()) as folder:
        state = folder.restore(None, 2)
        return comparable(state), repr(runs.read_metrics(out))


def saved_run(base):
    return repr(runs.config(base / RUN)), comparable(runs.load_variables(base / RUN))


def found_searches(base):
    found = plan.found_in(plan.ReproduceConfig.resolve(), base)
    return repr(found), repr(list(sections.search([base / SEARCHED], Pictures()))).replace(str(base), "")


def opened_search(base):
    """Whether it is the same search."""
    claims.claim_same(base / SEARCHED, SEARCH)
    return True


def continued_search(base):
    return repr(run_search(SEARCH, load("digits"), base / SEARCHED, ignored))


def landscapes(base):
    return repr(list(curvature.landscapes([base / "landscape"], Pictures()))).replace(str(base), "")


def network(base):
    tree, spec = quantize.load(base / "network.safetensors")
    return comparable(tree), spec


def exports(base):
    return repr(list(deployment.section([base / "export"]))).replace(str(base), "")


def exported(base):
    return repr(quantize.onnx.inspect(base / "export" / "bits-4.onnx"))


# By the path of the file in `whole`.
READERS = {
    RUN / "config.json": (report, saved_run, continued_run, continued_sweep),
    RUN / "environment.json": (report, saved_run, continued_run),
    RUN / "status.json": (report, continued_run, continued_sweep),
    RUN / "metrics.jsonl": (report, saved_run, continued_run, continued_sweep),
    RUN / "measured.json": (report, continued_sweep),
    SEARCHED / "search.json": (found_searches,),
    SEARCHED / "config.json": (opened_search,),
    SEARCHED / "optuna.journal": (continued_search,),
    Path("landscape", "landscape.json"): (landscapes,),
    Path("network.safetensors"): (network,),
    Path("export", "export.json"): (exports,),
    Path("export", "bits-4.onnx"): (exported,),
}


class MadeAgain(Exception):
    """What a command would have made again."""


def outcome(read, base, right, fallback=None):
    """Whether what is read is right, would be made again, is told in one line, is wrong, or ends in a traceback."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read(base)
        except MadeAgain:
            return "again"
        except Exception as error:
            line = cli.in_one_line(error)
            if line is None or "\n" in line[0]:
                return f"traceback {error!r}"
            return "one line"
    if found == right:
        return "right"
    return "right" if told and found == fallback else "silent"


def flip(rng, content):
    made = bytearray(content)
    made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(rng, content):
    return content[: rng.randrange(len(content))]


def hole(rng, content):
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randrange(1, 60) :]


def zeros(rng, content):
    start, n = rng.randrange(len(content)), rng.randrange(1, 60)
    return (content[:start] + bytes(n) + content[start + n :])[: len(content)]


def digit(rng, content):
    places = [i for i, byte in enumerate(content) if byte in b"0123456789"]
    i = rng.choice(places)
    return content[:i] + str((int(chr(content[i])) + rng.randrange(1, 10)) % 10).encode() + content[i + 1 :]


def junk(rng, content):
    start = rng.randrange(len(content))
    return content[:start] + rng.choice([b"\xff\xfe", b"\x00", "\u2028".encode(), b"\r\n", b"NaN"]) + content[start:]


def other(rng, content):
    return rng.choice([b"", b"\n", b"[]", b"null", b"3", b'"text"', b'{"x": 1}\n', b"[" * 50_000, b'{"a":' * 50_000])


def line_gone(rng, content):
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def line_twice(rng, content):
    lines = content.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    return b"".join([*lines[:i], lines[i], *lines[i:]])


def lines_swapped(rng, content):
    lines = content.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"".join(lines)


def value(rng, content):
    """A JSON file with another value somewhere, or an entry more or less."""
    line = rng.choice(content.splitlines()) if b"\n{" in content else content
    try:
        record = json.loads(line)
    except ValueError:  # not a JSON file
        return digit(rng, content)
    inside, key = rng.choice(list(places(record)))
    if rng.random() < 0.1:
        del inside[key]
    elif rng.random() < 0.1 and isinstance(inside, dict):
        inside["another"] = 1
    else:
        inside[key] = rng.choice([None, True, "text", -1, 1.5, "long", [], {}, [[1]], "\ud800", float("nan")])
    # Python refuses to write a number of so many digits.
    return content.replace(line, json.dumps(record).replace('"long"', 5000 * "9").encode())


def places(record):
    items = record.items() if isinstance(record, dict) else enumerate(record)
    for key, inside in items:
        yield record, key
        if isinstance(inside, dict | list):
            yield from places(inside)


MUTATIONS = (flip, cut, hole, zeros, digit, junk, other, line_gone, line_twice, lines_swapped, value, value, value)


def tampered(rng, base):
    """A record in which a value is of another type: (name, record)."""
    of_run = [RUN / name for name in ("measured.json", "environment.json", "status.json")]
    name = rng.choice([*of_run, SEARCHED / "search.json", Path("landscape", "landscape.json")])
    record = json.loads((base / name).read_text())
    # What a configuration holds is compared as a whole.
    shown = {key: value for key, value in record.items() if key not in ("config", "sha256")}
    inside, key = rng.choice([(inside, key) for inside, key in places(shown) if inside[key] is not None])
    inside[key] = {str: 12.5, bool: "yes", int: "text", float: "text", dict: [1], list: {"a": 1}}[type(inside[key])]
    return name, record | shown


def counted(rng, whole, tmp_path, attacks, attack):
    """How attacks ended, by outcome; those that must not be, with what was done."""
    right = {read: read(copied(whole, tmp_path / "right")) for read in {r for each in READERS.values() for r in each}}
    found, wrong = collections.Counter(), []
    for i in range(attacks):
        base = copied(whole, tmp_path / str(i))
        told, readers = attack(rng, base)
        for read in readers:
            ended = outcome(read, base, right[read])
            found[ended.split()[0]] += 1
            # What a crash of the machine left empty is as good as not there.
            may_be = ("right", "one", "again") if told.endswith("b''") else ("right", "one")
            if not ended.startswith(may_be):
                wrong.append((told, read.__name__, ended))
        shutil.rmtree(base)
    return found, wrong


def copied(whole, to):
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(whole, to)
    return to


def test_mutated_files(whole, tmp_path, attacks, attack_seed):
    """100 files in CI, each read by one of the commands that read it."""
    names = list(READERS)

    def attack(rng, base):
        name, mutate = rng.choice(names), rng.choice(MUTATIONS)
        file = base / name
        file.write_bytes(mutate(rng, file.read_bytes()))
        return f"{mutate.__name__} {name}: {file.read_bytes()[:3000]!r}", [rng.choice(READERS[name])]

    found, wrong = counted(random.Random(attack_seed), whole, tmp_path, attacks, attack)
    print(f"{attacks} mutated files: {dict(found)}")
    assert not wrong, "\n".join(map(str, wrong))
    assert found["one"] > attacks / 2


def test_values_of_another_type(whole, tmp_path, attacks, attack_seed):
    """With a digest that is right: the schema finds them."""

    def attack(rng, base):
        name, record = tampered(rng, base)
        records.write(base / name, record)
        return f"{name}: {record!r}"[:3000], READERS[name][:1]

    found, wrong = counted(random.Random(attack_seed), whole, tmp_path, attacks // 4, attack)
    print(f"{attacks // 4} values of another type: {dict(found)}")
    assert found == {"one": attacks // 4}
    assert not wrong, "\n".join(map(str, wrong))


def test_flipped_bits_of_checkpoints(whole, tmp_path, attacks, attack_seed):
    """Of the last step; with a warning the one before takes its place."""
    rng = random.Random(attack_seed)
    before = copied(whole, tmp_path / "before")
    with checkpoints.Checkpoints(before / RUN) as there:
        last = there.steps()[0]
    shutil.rmtree(before / RUN / "checkpoint" / str(last))
    readers = saved_run, continued_run
    right = {read: read(copied(whole, tmp_path / "right")) for read in readers}
    with pytest.warns(UserWarning, match="is gone"):
        fallback = {saved_run: saved_run(copied(before, tmp_path / "fallback"))}
    records.write(before / RUN / "status.json", {"status": "running"})
    fallback[continued_run] = continued_run(before)
    found, wrong = collections.Counter(), []
    for i in range(attacks // 3):
        base, read = copied(whole, tmp_path / "flipped"), rng.choice(readers)
        every = [path for path in sorted((base / RUN / "checkpoint" / str(last)).rglob("*")) if path.is_file()]
        # The pages of the arrays are most of the bytes.
        file = rng.choices(every, [path.stat().st_size for path in every])[0] if i % 2 else rng.choice(every)
        file.write_bytes(flip(rng, file.read_bytes()))
        ended = outcome(read, base, right[read], fallback[read])
        found[ended.split()[0]] += 1
        if not ended.startswith("right"):
            wrong.append((str(file.relative_to(base)), read.__name__, ended))
    print(f"{attacks // 3} flipped bits: {dict(found)}")
    assert not wrong, "\n".join(map(str, wrong))


def everything(folder):
    """What a folder holds, and when it was written."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def link(place, to):
    place.symlink_to(to)


def second_name(place, to):
    os.link(to, place)


def pipe(place, to):
    os.mkfifo(place)


def folder_of(place, to):
    place.mkdir()


def plain_file(place, to):
    place.write_text("years of work")


def into_run(base):
    with runs.RunFolder(base / RUN, CONFIG, CONFIG.may_differ()) as folder:
        folder.restore(None, 2)
        folder.log({"epoch": 4})
        folder.save(99, {"params": np.zeros(2)})


def into_sweep(base):
    claims.claim_same(base / "sweep", SEARCH)


def into_search(base):
    out = base / SEARCHED
    search.main(SEARCH, out)


def into_results(base):
    claims.claim(base / RUN / "quantize", besides=("rows.csv", "bits.png"))
    files.write(base / RUN / "quantize" / "rows.csv", "1,2")


def into_report(base):
    from experiments import report as command

    command.main((base / "sweep",))


BAITS = [
    *((into_run, RUN / name, link) for name in ("lock", "metrics.jsonl", "status.json", "environment.json")),
    *(
        (into_run, RUN / name, link)
        for name in ("config.json", "measured.json", "checkpoint", "tensorboard", "damaged-3")
    ),
    *((into_run, RUN / name, second_name) for name in ("lock", "metrics.jsonl", "curvature.png")),
    *((into_run, RUN / "metrics.jsonl", bait) for bait in (pipe, folder_of)),
    (into_run, RUN / "checkpoint", plain_file),
    (into_run, RUN / "checkpoint" / "6", link),
    (into_run, RUN, link),
    (into_search, SEARCHED / Path("optuna.journal"), link),
    (into_search, SEARCHED / Path("optuna.journal"), second_name),
    (into_search, SEARCHED / Path("runs"), link),
    (into_search, SEARCHED / Path("search.json"), link),
    (into_results, RUN / "quantize", link),
    (into_results, RUN / "quantize" / "rows.csv", link),
    (into_report, Path("sweep/report"), link),
    (into_report, Path("sweep/report/plot-01-accuracy.png"), link),
]


@pytest.mark.parametrize(("act", "place", "bait"), BAITS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_baited_folders(act, place, bait, whole, tmp_path):
    """A link, a second name of a file, a pipe or a folder where a command writes: what it leads to is left alone."""
    base, outside = copied(whole, tmp_path / "inside"), tmp_path / "outside"
    there = base / place
    there.parent.mkdir(exist_ok=True)
    to = outside / "thing"
    outside.mkdir()
    if there.is_dir() or there.exists():
        there.rename(to)
    elif there.suffix or there.name == "lock":
        to.write_text("years of work")
    else:
        to.mkdir()
        (to / "thesis.tex").write_text("years of work")
    bait(there, to)
    before = everything(outside)
    with pytest.raises((ValueError, TypeError, OSError, files.Failed)) as error:
        act(base)
    line = cli.in_one_line(error.value)
    assert line is not None
    assert "\n" not in line[0]
    assert everything(outside) == before


def test_a_run_with_the_configuration_of_another(whole, tmp_path):
    """A folder that was copied, with another seed written into it, is not the run of that seed."""
    base = copied(whole, tmp_path / "copy")
    out, other = base / RUN, CONFIG.replace(seed=1)
    records.write_settings(out / "config.json", claims.to_json(other))
    told = r"config.json is damaged \(`seed` is 1, but the run began with 0\)"
    with pytest.raises(records.Damaged, match=told), runs.RunFolder(out, other, other.may_differ()):
        pass
    out.rename(out.with_name("hero-s1"))
    with pytest.raises(records.Damaged, match=told):
        sweep.run_all({"hero": CONFIG}, [1], load("digits"), base / "sweep", ignored, MEASURING)


def test_what_a_run_began_with_is_what_its_folder_says(whole, tmp_path):
    """Not what a later part was called with, in what may differ."""
    out = copied(whole, tmp_path / "copy") / RUN
    (out / "environment.json").unlink()
    records.write(out / "status.json", {"status": "running"})
    later = CONFIG.replace(save_minutes=30.0)
    with runs.RunFolder(out, later, later.may_differ()):
        pass
    assert runs.config(out) == CONFIG


def test_a_last_checkpoint_that_is_gone(whole, tmp_path):
    out = copied(whole, tmp_path / "copy") / RUN
    shutil.rmtree(out / "checkpoint" / "6")
    with pytest.warns(UserWarning, match="The last checkpoint of .*hero-s0 is gone; that of step . takes its place"):
        runs.load_variables(out)
    with runs.RunFolder(out, CONFIG, CONFIG.may_differ()) as folder:
        folder.restore(None, 2)
        assert runs.status(out) == "running"
        assert [row["epoch"] for row in runs.read_metrics(out)] == [1, 2]


def test_text_that_no_encoding_has(tmp_path):
    """A path that is not UTF-8, say, in the command of a run."""
    records.write(tmp_path / "a.json", {"command": ["train", "r\udcff"]})
    assert records.read(tmp_path / "a.json") == {"command": ["train", "r\\udcff"]}
    files.write(tmp_path / "b.md", "r\udcff")
    assert (tmp_path / "b.md").read_text() == "r\\udcff"


def test_a_torn_last_line(whole, tmp_path):
    out = copied(whole, tmp_path / "copy") / RUN
    rows = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(rows + b"\xff\xfe")
    with runs.RunFolder(out, CONFIG, CONFIG.may_differ()) as folder:
        folder.restore(None, 2)
    assert (out / "metrics.jsonl").read_bytes() == rows


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(files.Failed, match=r"could not be written \(Permission denied\)"):
        claims.claim(tmp_path)


def test_a_link_is_replaced_and_never_written_through(tmp_path):
    (tmp_path / "outside").write_text("years of work\n")
    for name in ("whole", "lines"):
        (tmp_path / name).symlink_to("outside")
    files.write(tmp_path / "whole", "new")
    assert not (tmp_path / "whole").is_symlink()
    with pytest.raises(files.Failed, match=r"lines could not be written \(Too many levels"):
        files.append(tmp_path / "lines", "new\n")
    assert (tmp_path / "outside").read_text() == "years of work\n"


def test_lines_are_added_after_whole_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in ("", '{"a": 1', '{"a": 1}\n', '{"a": 1}\n{"b"', '{"a": 1}\n{"b": 2}\n{'):
        path.write_text(content)
        records.append(path, {"c": 3}, {"d": 4})
        kept = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]
        assert records.read_lines(path) == [*kept, {"c": 3}, {"d": 4}]


def test_full_disks(tmp_path):
    """Commands without the room for all that they write: one line, nothing half written, and then they go on."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")
    command = [*alone, sys.executable, "-m", "tests.full_disk", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    tries = json.loads(found.stdout.splitlines()[-1])
    assert len(tries) == 13
    for name, ended in tries.items():
        (line,) = ended["lines"]
        assert re.fullmatch(r"stopped: \S+ could not be written \(No space left on device.*", line), (name, line)
        assert (ended["code"], ended["left"], ended["again"], ended["told"]) == (1, [], 0, []), (name, ended)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_while_modules_are_imported(number, tmp_path, request):
    """From the first line of the package on; Python itself takes those that come before."""
    # What is ignored here, as in the background of a script, is ignored there.
    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, signal.default_int_handler)))
    # The import of jax waits for the signal.
    (tmp_path / "jax.py").write_text("print('imported', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "imported\n"
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "interrupted\n")
