"""Tables that are shown are those of the records that are kept beside them."""

import functools
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pandas
import PIL.Image
import pytest

from benchmarks import compiled, language_model
from experiments import cli, train
from experiments.analysis import deployment, page, sections, summary, tables, tidy
from experiments.config import METHODS, presets
from experiments.config.fields import types_of
from experiments.measure import search
from experiments.measure.deployment import ExportRecord
from experiments.storage import records

ROOT = Path(__file__).parent.parent


# Networks to which the page of CIFAR-10 shows the differences, as docs/results.md asks for them.
AGAINST = ("SGD", "ASAM", "ASAM (rho 0.5)", "GRAD L1")


@functools.cache
def archived(name):
    """The rows of the table of the archived runs of a folder of results that are of no ablation."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(ROOT / "results" / name / "runs.tar.xz") as tar:
        tar.extractall(folder, filter="data")
        found = tidy.read([Path(folder)]).table
    return found[found["section"] == "main"]


def in_markdown(content):
    """The lines of each table of a section."""
    found = [made for made in content if isinstance(made, page.Table)]
    return [tables.markdown(made.header, made.lines, made.left).splitlines() for made in found]


def table_below(path, header):
    """The lines of the table with this header, the header first."""
    text = path.read_text().splitlines()
    start = text.index(header)
    end = next(i for i in range(start, len(text)) if not text[i].startswith("|"))
    return text[start:end]


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("cifar10-small", ("results/cifar10-small/README.md", "docs/results.md")),
        ("digits-reproduce", ("results/digits-reproduce/README.md",)),
        ("digits-cheap", ("results/digits-cheap/README.md",)),
    ],
)
def test_shown_tables_are_those_of_the_records(name, pages):
    (lines,) = in_markdown(summary.summary(archived(name)))
    assert len(lines) > 5
    for shown in pages:
        assert table_below(ROOT / shown, lines[0]) == lines, shown


def test_shown_cheaper_methods_after_noise_are_those_of_the_records():
    names = {
        "SGD": "SGD",
        "MSAM": "MSAM",
        "SAM (suppress 0.5)": "SAM, suppression 0.5",
        "NSO": "NSO",
        "HERO (perturb_from 0.75)": "HERO late",
        "HERO (ascent_batch_size 16)": "HERO on a quarter",
        "HERO (product difference)": "HERO by differences",
    }
    rows = archived("cifar10-cheap")
    labels = {"accuracy": "last epoch", "at_best_validation": "chosen epoch", "memorized": "memorized"}
    columns, lines = ["n", *labels.values()], []
    for rate in (0.4, 0.8):
        end = sections.at_end(rows[rows["noise"] == rate], labels)
        for network, line in zip(names, tables.lines(tables.means(end), names, columns), strict=True):
            lines.append([f"{100 * rate:g} %", names[network], *line[1:]])
    made = tables.markdown(["labels altered", "method", *columns], lines, left=2).splitlines()
    assert [line[2] for line in lines] == ["3"] * 14
    assert table_below(ROOT / "results" / "cifar10-cheap" / "README.md", made[0]) == made


def test_shown_differences_are_those_of_the_records():
    command = "--against " + " ".join(f'"{name}"' if " " in name else name for name in AGAINST)
    assert command in (ROOT / "docs" / "results.md").read_text()
    text = (ROOT / "results" / "cifar10-small" / "README.md").read_text()
    made = in_markdown(summary.differences(archived("cifar10-small"), AGAINST))
    # Clean labels and two rates of noise.
    assert len(made) == 3 * len(AGAINST)
    section = text[text.index("\n## Differences") : text.index("\n## Accuracy")]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == [line for lines in made for line in lines]


def test_shown_accuracies_after_noise_are_those_of_the_records():
    rows = archived("digits-reproduce")
    symmetric = rows[(rows["noise"] > 0) & (rows["kind"] == "symmetric")]
    rates = [0.2, 0.4, 0.6, 0.8]
    end = sections.at_end(symmetric, {"accuracy": ""})
    found = tables.spreads(end.assign(label=end["noise"]))
    names = list(dict.fromkeys(end["network"]))
    expected = {tuple(line) for line in tables.lines(tables.texts(found, dict.fromkeys(names, 10)), names, rates)}
    header = "| method | 20 % altered | 40 % | 60 % | 80 % |"
    shown = table_below(ROOT / "docs" / "results.md", header)[2:]
    assert {tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in shown} == expected


def test_the_main_job_in_the_docs_is_that_of_its_record():
    made = (ROOT / "results" / "digits" / "table.md").read_text().splitlines()
    made = made[: next((i for i, line in enumerate(made) if not line.startswith("|")), len(made))]
    assert len(made) == 2 + 5
    assert table_below(ROOT / "docs" / "experiments.md", made[0]) == made


def step_costs(name):
    """The rows of a record of benchmarks.step_cost by method, and its commit."""
    record = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return {row["method"]: row for row in record["rows"]}, record["environment"]["commit"]


def test_costs_in_the_readme_are_those_of_the_record():
    """Gradients per step and time of each transformation, ResNet20."""
    rows, _ = step_costs("step-cost-methods-cpu")
    costs = {name: (f"{row['floor']:.1f}", f"{row['ratio']:.2f}") for name, row in rows.items()}
    header = "| transformation | direction | gradients per step | time, x SGD | take it |"
    shown = [line.strip("| ").split(" | ") for line in table_below(ROOT / "README.md", header)[2:]]
    names = ["msam", "sam", "sam suppressed", "nso", "grad_l1", "hero detached"]
    assert [tuple(line[2:4]) for line in shown] == [costs[name] for name in names]


def test_step_costs_by_network_are_those_of_the_records():
    networks = {
        "ResNet20, batch 64": "step-cost-cpu",
        "ViT, batch 32": "step-cost-vit-cpu",
        "MobileNetV2, batch 16": "step-cost-mobilenet-cpu",
    }
    found = {title: step_costs(name) for title, name in networks.items()}
    page = ROOT / "docs" / "cost.md"
    first, second = (rows for rows, _ in list(found.values())[:2])
    methods = [name for name in first if name != "sgd" and not name.startswith("torch")]
    shown = {"sam": "SAM", "asam": "ASAM", "grad_l1": "GRAD L1"}
    lines = []
    for name in methods:
        times = [f"{rows[name]['ratio']:.2f}" if name in rows else "" for rows, _ in found.values()]
        operations = [f"{rows[name]['flop_ratio']:.2f}" for rows in (first, second)]
        lines.append([shown.get(name, name.replace("hero", "HERO")), *times, *operations])
    seconds = [f"{1000 * rows['sgd']['seconds']:.0f} ms" for rows, _ in found.values()]
    lines.append(["a step of SGD", *seconds, "", ""])
    made = tables.markdown(["time, x SGD", *networks, "operations, ResNet20", "operations, ViT"], lines).splitlines()
    assert table_below(page, made[0]) == made
    for _, commit in found.values():
        assert commit in page.read_text()


def test_costs_of_cheaper_steps_are_those_of_the_record():
    rows, commit = step_costs("step-cost-methods-cpu")
    names = {
        "sgd": "SGD",
        "msam": "MSAM",
        "sam quarter": "SAM on a quarter of the batch",
        "sam": "SAM",
        "sam suppressed": "SAM with suppression",
        "nso": "NSO",
        "hero quarter": "HERO detached on a quarter of the batch",
        "hero by difference": "HERO detached by differences",
        "hero detached": "HERO detached",
    }
    lines = []
    for name, title in names.items():
        row = rows[name]
        cells = [f"{row['floor']}", f"{row['ratio']:.2f}", f"{row['flop_ratio']:.2f}", f"{row['temporary_mib']:.0f}"]
        lines.append([title, *cells])
    page = ROOT / "docs" / "cost.md"
    header = ["method", "floor, gradients", "time, x SGD", "operations, x SGD", "temporary MiB"]
    made = tables.markdown(header, lines).splitlines()
    assert table_below(page, made[0]) == made
    assert commit in page.read_text()


def test_values_to_begin_with_are_those_of_the_presets():
    columns = {
        "SAM rho": ("sam", "rho"),
        "ASAM rho": ("asam", "rho"),
        "GRAD L1 gamma": ("grad_l1", "gamma"),
        "HERO rho": ("hero", "rho"),
        "HERO gamma": ("hero", "gamma"),
    }
    lines = []
    for name in presets.DATASETS:
        lines.append([name, *(f"{presets.settings(name, method)[key]:g}" for method, key in columns.values())])
    made = tables.markdown(["data set", *columns], lines).splitlines()
    assert table_below(ROOT / "docs" / "training.md", made[0]) == made


# The rows of docs/which-method.md on digits: the network on clean labels and that on altered ones, each searched there.
ON_DIGITS = {
    "SGD": ("SGD", "SGD (weight_decay 0.008)"),
    "SGD, averaged weights": ("EMA (weight_decay 0.002)", "EMA (weight_decay 0.008)"),
    "MSAM": ("MSAM (rho 0.15)", "MSAM (rho 0.6)"),
    "SAM": ("SAM", "SAM (rho 0.2)"),
    "SAM, suppression": ("SAM (rho 0.05, suppress 0.25)", "SAM (suppress 0.5)"),
    "ASAM": ("ASAM (rho 2.5)", "ASAM (rho 2.0)"),
    "ASAM around 3-bit noise": ("ASAM (rho 2.5, noise_bits 3)", "ASAM (rho 2.0, noise_bits 3)"),
    "NSO": ("NSO (sigma 0.08)", "NSO (sigma 0.08)"),
    "HERO on a quarter": ("HERO (ascent_batch_size 16)", "HERO (rho 2.0, gamma 10.0, ascent_batch_size 16)"),
    "GRAD L1": ("GRAD L1", "GRAD L1 (gamma 0.009, learning_rate 0.2)"),
    "HERO": ("HERO", "HERO (rho 2.0, gamma 10.0)"),
    "HERO, suppression": ("HERO (suppress 0.5)", "HERO (rho 2.0, gamma 10.0, suppress 0.5)"),
}
# On CIFAR-10: the archive, and the network in it.
ON_CIFAR10 = {
    "SGD, weight decay 5e-4": ("cifar10-small", "SGD"),
    "SGD, weight decay 5e-3": ("cifar10-cheap", "SGD"),
    "MSAM": ("cifar10-cheap", "MSAM"),
    "SAM": ("cifar10-small", "SAM"),
    "SAM, suppression": ("cifar10-cheap", "SAM (suppress 0.5)"),
    "ASAM": ("cifar10-small", "ASAM"),
    "NSO": ("cifar10-cheap", "NSO"),
    "HERO on a quarter": ("cifar10-cheap", "HERO (ascent_batch_size 16)"),
    "GRAD L1": ("cifar10-small", "GRAD L1"),
    "HERO": ("cifar10-small", "HERO (gamma 50.0)"),
}
# Their columns with altered labels: (metric, rate).
WITH_ALTERED_LABELS = {
    "40 % altered": ("accuracy", 0.4),
    "chosen epoch": ("at_best_validation", 0.4),
    "80 % altered": ("accuracy", 0.8),
}


def choices(rows, columns):
    """The table of these rows in Markdown, a line for each network; a column is (metric, rate of altered labels)."""
    ends = []
    for title, (metric, rate) in columns.items():
        ends.append(sections.at_end(rows[rows["noise"] == rate], {metric: title}))
    labels = ["n", *columns]
    networks = list(dict.fromkeys(rows["network"]))
    steps = rows[rows["metric"] == "gradients"].groupby("network")["value"].agg(set)
    lines = []
    for name, *cells in tables.lines(tables.means(pandas.concat(ends)), networks, labels):
        (gradients,) = steps[name]
        lines.append([name, f"{gradients:g}", *cells])
    return tables.markdown(["method", "gradients", *labels], lines).splitlines()


def test_shown_choices_on_digits_are_those_of_the_records():
    rows = archived("digits-cheap")
    found = []
    for name, (clean, altered) in ON_DIGITS.items():
        here = rows[
            ((rows["noise"] == 0) & (rows["network"] == clean)) | ((rows["noise"] > 0) & (rows["network"] == altered))
        ]
        found.append(here.assign(network=name))
    clean = {"clean labels": ("accuracy", 0), "2 bit": ("2 bit, channel-narrow", 0)}
    made = choices(pandas.concat(found), clean | WITH_ALTERED_LABELS)
    assert len(made) == 2 + len(ON_DIGITS)
    assert table_below(ROOT / "docs" / "which-method.md", made[0]) == made


def test_shown_choices_on_cifar10_are_those_of_the_records():
    archives = {name: archived(name) for name in ("cifar10-small", "cifar10-cheap")}
    found = []
    for name, (archive, network) in ON_CIFAR10.items():
        rows = archives[archive]
        found.append(rows[rows["network"] == network].assign(network=name))
    made = choices(pandas.concat(found), {"clean labels": ("accuracy", 0)} | WITH_ALTERED_LABELS)
    assert len(made) == 2 + len(ON_CIFAR10)
    assert table_below(ROOT / "docs" / "which-method.md", made[0]) == made


def test_figures_of_the_pages_are_of_the_tables_that_are_shown():
    """`python docs/figures.py` draws them anew; each keeps the table that it was drawn from."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for name in figures["DRAWN"]:
        with PIL.Image.open(figures["FIGURES"] / f"{name}.png") as image:
            assert json.loads(image.info["Description"]) == figures["shown"](name), name
    assert {path.stem for path in figures["FIGURES"].iterdir()} == set(figures["DRAWN"])


def test_figures_of_the_pages_have_every_number_of_their_columns():
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    columns = {"cost": ["x SGD"], "deployment": ["KiB", "accuracy"]}
    only = {"cost": "one device", "deployment": "floating point"}
    for name, (draw, _, _) in figures["DRAWN"].items():
        header, *rows = table = figures["shown"](name)
        rows = [row for row in rows if only.get(name) in (None, *row[:2])]
        spreads = [title for title, cell in zip(header, rows[0], strict=True) if " ± " in cell]
        taken = columns.get(name, [title for title in spreads if title != "chosen epoch"])
        drawn = set()
        for axes in draw(table).axes:
            drawn |= {float(x) for line in axes.lines for x in (*line.get_xdata(), *line.get_ydata())}
            drawn |= {float(bar.get_width()) for bar in axes.patches}
        for row in rows:
            cells = [cell for title, cell in zip(header, row, strict=True) if title in taken]
            assert {float(cell.split(" ± ")[0].replace(",", "")) for cell in cells} <= drawn, (name, row)


def test_shown_pilots_are_those_of_the_records():
    """Where each run ended, and the best of its evaluations."""
    lines = []
    for folder in sorted((ROOT / "results" / "cifar10-protocol2").glob("pilot-*")):
        config = json.loads((folder / "config.json").read_text())
        assert json.loads((folder / "status.json").read_text())["status"] == "done"
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last, best = found[-1], max(row["accuracy"] for row in found)
        assert (last["epoch"], config["train_size"], config["seed"]) == (config["epochs"], 5000, 100)
        run = (100 * config["label_noise"], config["batch_size"], config["learning_rate"], config["epochs"])
        shares = [f"{100 * share:.1f}" for share in (last["accuracy"], best, last["memorized"])]
        lines.append((run, [f"{run[0]:.0f} %", *map(str, run[1:]), f"{last['train_loss']:.3f}", *shares]))
    settings = ["labels altered", "batch", "learning rate", "epochs"]
    header = [*settings, "training loss", "accuracy", "best accuracy", "wrong labels learned"]
    made = tables.markdown(header, [line for _, line in sorted(lines)], left=1).splitlines()
    assert table_below(ROOT / "results" / "cifar10-protocol2" / "README.md", made[0]) == made


def test_shown_losses_of_the_language_model_are_those_of_the_record():
    record = records.read(ROOT / "results" / "language-model-cpu.json")
    for made in (language_model.table(record), language_model.table(record, "AdamW")):
        assert len(made) > 2 + 4
        assert table_below(ROOT / "docs" / "language-model.md", made[0]) == made
    # The page says that of thirteen columns none has a difference.
    told = language_model.verdicts(record)
    assert sum("has the lowest mean" in sentence for sentence in told) == 13
    assert not [sentence for sentence in told if "(significant)" in sentence]


def test_commands_of_the_second_protocol_are_those_of_its_rows(tmp_path):
    """No two alike, of the same data; each folder is named after what it is."""
    page = (ROOT / "results" / "cifar10-protocol2" / "README.md").read_text()
    searches = re.findall(r"^search (\S+) --method", page, re.MULTILINE)
    best = {"rho": 0.25, "gamma": 3.5, "suppress": 0.5, "learning_rate": 0.125, "weight_decay": 0.003}
    settings = {name: set(search.SEARCHED) & set(types_of(METHODS[name.partition("-")[0]])) for name in searches}
    for label, name in itertools.product(("clean", "noisy"), searches):
        (tmp_path / "search" / f"{label}-{name}").mkdir(parents=True)
        taken = {key: best[key] for key in ("learning_rate", "weight_decay", *settings[name])}
        taken |= {"suppress": 0.5 if name == "sam-suppress" else 0.0} if "suppress" in taken else {}
        record = {"best": taken | {"weight_decay": 0.003 if label == "clean" else 0.006}}
        (tmp_path / "search" / f"{label}-{name}" / "search.json").write_text(json.dumps(record))
    script = [sys.executable, str(ROOT / "results" / "cifar10-protocol2" / "commands.py"), str(tmp_path)]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    made = {}

    @functools.wraps(train.main)
    def keep(config, **named):
        made[named["out"]] = config

    for line in lines:
        cli.call(keep, shlex.split(line)[3:])
    assert len(lines) == len(made) == len(set(made.values())) == 13 * 9 + 4 * 4 + 5 * 6 + 12 * 3
    shared = {(run.task, run.validation_size, run.budget.batch_size, run.watch.eval_every) for run in made.values()}
    assert len(shared) == 1
    for out, run in made.items():
        published = "published" in out.name
        decay = 5e-4 if published else 0.006 if run.labels.label_noise else 0.003
        assert (run.optimizer.weight_decay, run.seed) == (decay, int(out.name[-1]))
        assert run.method.rho in (0.0, 0.5 if published else 0.25)
        assert (run.optimizer.learning_rate_floor > 0) == ("floor" in out.name)
        assert (run.method.ema_decay != "none") == ("ema" in out.name or "average" in out.name)
        assert (run.method.suppress > 0) == ("suppress" in out.name)


def exported():
    """The records of results/deployment: digits first, then by network, weights and layers."""
    found = [records.read(path, ExportRecord) for path in sorted((ROOT / "results" / "deployment").glob("*.json"))]
    return sorted(found, key=lambda record: not record["run"].startswith("digits"))


def test_shown_files_are_those_of_the_records():
    """Size, accuracy and time of the files with narrow codes by channel, to nearest."""
    lines = []
    for record in exported():
        is_int8 = record["config"]["activations"] == "int8"
        if (record["config"]["spec"], record["config"]["step"]) != ("channel-narrow", "nearest"):
            continue
        for row, line in zip(record["rows"], deployment.cells(record["rows"])[1], strict=True):
            # With layers of integers, the codes of 4 bits take 8 too, and the file in floating point is there already.
            if row["bits"] in ((8,) if is_int8 else (None, 8, 4, 2)):
                layers = "integers" if is_int8 else "floating point"
                shown = [line[0], line[1], line[2], line[3], line[4], line[7], line[8]]
                lines.append([record["run"], layers, *shown])
    header = ["network", "layers", *(deployment.HEADER[i] for i in (0, 1, 2, 3, 4, 7, 8))]
    guide = [line for line in lines if line[0] == "cifar10-resnet20"]
    for path, shown in (("docs/deployment.md", guide), ("results/deployment/README.md", lines)):
        made = tables.markdown(header, shown, left=4).splitlines()
        assert table_below(ROOT / path, made[0]) == made, path


def test_shown_agreement_is_that_of_the_records():
    """Logits and predictions of onnxruntime against JAX, over all bit widths."""
    lines = []
    for record in exported():
        rows = record["rows"][record["config"]["activations"] == "int8" :]
        equal = sum(row["accuracy"] == row["jax_accuracy"] for row in rows)
        off, flipped = max(row["difference"] for row in rows), sum(row["flipped"] for row in rows)
        layers = "integers" if record["config"]["activations"] == "int8" else "floating point"
        share = f"{flipped} of {len(rows) * record['images']:,}"
        kind = [f"{record['config']['spec']}, {record['config']['step']}", layers]
        lines.append([record["run"], *kind, f"{len(rows)}", f"{equal}", share, f"{off:.0e}"])
    header = ["network", "weights", "layers", "files", "equal accuracy", "predictions that differ", "off by"]
    made = tables.markdown(header, lines, left=3).splitlines()
    assert table_below(ROOT / "results" / "deployment" / "README.md", made[0]) == made


def programs():
    """The records of results/compiled by name."""
    paths = sorted((ROOT / "results" / "compiled").glob("*.json"), key=lambda path: path.stem)
    return [json.loads(path.read_text()) for path in paths]


def test_shown_programs_are_those_of_the_records():
    """What a step is compiled to for a GPU: kernels, memory, collectives."""
    where = ["network", "target", "layout", "method"]
    header = [*where, "kernels", "x SGD", "copies", "MiB", "x SGD", "gradients", "collectives"]
    lines = []
    for record in programs():
        names, cells = compiled.cells(record["rows"])
        for line in cells:
            cell = dict(zip(names, line, strict=True))
            shown = [
                cell[name] for name in ("kernels", "x SGD", "copies", "temp", "x SGD's", "gradients", "collectives")
            ]
            step = [compiled.network(record), record["arguments"]["target"], compiled.layout(record), cell["method"]]
            lines.append([*step, *shown])
    alone = [line for line in lines if line[1] == "h100"]
    assert len(alone) > 5
    made = tables.markdown(header, lines, left=len(where)).splitlines()
    assert table_below(ROOT / "results" / "compiled" / "README.md", made[0]) == made
    made = tables.markdown(header[2:-2], [line[2:-2] for line in alone], left=2).splitlines()
    assert table_below(ROOT / "docs" / "cost.md", made[0]) == made


def test_shown_scale_is_that_of_the_records():
    """What a step takes of each of many chips: memory, the floors of its time, what is sent."""
    where = ["network", "chips", "layout", "method"]
    header = [*where, "GiB", "arithmetic ms", "memory ms", "links ms", "sent MiB", "gradients"]
    lines = []
    for record in programs():
        for row in record["rows"]:
            if row.get("floors_ms") is None:  # of a GPU, or an older record
                continue
            used = (row["argument_mib"] + row["temporary_mib"]) / 1024
            sent = sum(kind["bytes"] for kind in row["collectives"].values()) / 2**20
            step = [compiled.network(record), record["arguments"]["target"], compiled.layout(record), row["method"]]
            floors = [f"{row['floors_ms'][name]:.1f}" for name in ("arithmetic", "memory", "links")]
            lines.append([*step, f"{used:.2f}", *floors, f"{sent:.0f}", f"{row['gradients']:.2f}"])
    assert {line[3] for line in lines} == {"sgd", "sam", "hero"}
    made = tables.markdown(header, lines, left=len(where)).splitlines()
    assert table_below(ROOT / "docs" / "scale.md", made[0]) == made


def test_the_network_of_the_guide_is_that_of_its_records():
    found = [record for record in exported() if record["config"]["step"] == "rounding"]
    assert [record["run"] for record in found] == [f"digits-mlp-sam-s{seed}" for seed in range(5)]
    text = (ROOT / "docs" / "deployment.md").read_text()
    for rows in zip(*(record["rows"] for record in found), strict=True):
        assert {row["bits"] for row in rows} in ({None}, {2})
        (size,) = {row["num_bytes"] for row in rows}
        accuracy = pandas.Series([100 * row["accuracy"] for row in rows])
        assert f"{size / 1024:.1f} KiB" in text
        assert f"{accuracy[0]:.2f} percent" in text
        assert f"{accuracy.mean():.2f} ± {accuracy.std():.2f}" in text
    assert all(f"the {record['images']} test images" in text for record in found)
