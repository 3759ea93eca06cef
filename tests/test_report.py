"""`experiments.report`: its numbers against NumPy, what it refuses, and pages that need nothing else."""

import base64
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments import report, train
from experiments.analysis import page, plots, sections, tables, tidy
from experiments.config import resolve
from experiments.measure.search import SearchConfig, summarize
from experiments.storage import claims, environment, records

ROOT = Path(__file__).parent.parent
EPOCHS = 3
VOID = {"meta", "img", "link", "br", "hr", "input"}
ENVIRONMENT = {
    "versions": {"python": "3.11", "jax": "0.10"},
    "device": {"kind": "cpu", "platform": "cpu", "count": 1, "processes": 1},
    "machine": {"processor": "x86_64", "cores": 2},
    "commit": "aaaaaaaaaaaa",
    "command": ["train", "--method", "sgd"],
}


def fake(
    folder, accuracies=(0.5, 0.6, 0.7), status="done", message="", measured=None, more=None, part=None, **fields: Any
):
    """A run folder as a run leaves it: one row an epoch, with `more` fields (a list of one value an epoch each).

    A run that is done and has more epochs than values has each value for several of them, in 10 steps a value.
    """
    folder.mkdir(parents=True)
    config = resolve(**{"method": "sgd", "epochs": EPOCHS, **fields})
    records.write(folder / "config.json", claims.to_json(config))
    records.write(folder / "environment.json", ENVIRONMENT | (part or {}))
    records.write(folder / "status.json", {"status": status, "message": message})
    rows, given = [], len(accuracies)
    epochs = config.budget.epochs if status == "done" else given
    for epoch in range(1, epochs + 1):
        i = (epoch - 1) * given // epochs
        row = {"epoch": epoch, "train_loss": 0.5 / (i + 1), "images_per_second": 640.0}
        row |= {"step": round(10 * given * epoch / epochs), "accuracy": accuracies[i]}
        rows.append(row | {name: values[i] for name, values in (more or {}).items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if measured is not None:
        records.write(folder / "measured.json", measured)
    return folder


def last(values):
    """Accuracies of a run that ends with each of these."""
    return [(0.5, 0.6, value) for value in values]


def cells_of(text, start):
    """The cells of the Markdown rows that start with this cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


class Page(html.parser.HTMLParser):
    """Reads a page; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def made(folder, *more, against=()):
    """The Markdown and the HTML of a report."""
    report.main((folder, *more), against=against)
    out = folder / "report"
    return (out / "report.md").read_text(), (out / "report.html").read_text()


MEASURED = {
    "quantized": {"channel-narrow": {"full": 97.0, "8": 96.0, "2": 60.0}},
    "curvature": {
        "eigenvalue": -4.0,
        "eigenvalue_residual": 1e-4,
        "eigenvalue_converged": True,
        "hessian_norm": 6.0,
        "hessian_norm_sem": 0.5,
        "images": 100,
    },
    "images": 364,
}


def measured(shift=0.0, **curvature):
    """measured.json with its accuracies and its eigenvalue shifted."""
    row = {name: value + shift for name, value in MEASURED["quantized"]["channel-narrow"].items()}
    changed = MEASURED["curvature"] | {"eigenvalue": -4.0 - shift} | curvature
    return MEASURED | {"quantized": {"channel-narrow": row}, "curvature": changed}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder with data for every section, and its report."""
    base = tmp_path_factory.mktemp("all")
    for seed, accuracy in enumerate((0.90, 0.93, 0.91)):
        along = {"validation_accuracy": (0.5, 0.8, 0.7)}
        fake(base / f"sgd-s{seed}", (0.5, 0.6, accuracy), seed=seed, measured=measured(seed), more=along)
    for seed, accuracy in enumerate((0.94, 0.92), start=1):
        found = {"eigenvalue": (5.0, -4.0, 3.0), "eigenvalue_residual": (1e-4, 1e-4, 0.01)}
        found |= {"hessian_norm": (7.0, 6.0, 5.0 + seed), "hessian_norm_sem": (0.3, 0.2, 0.1)}
        found |= {"penalty_grad_norm": (0.0, 0.02, 0.1 * seed), "perturbed_grad_norm": (1.0, 2.0, 0.5)}
        fake(base / f"hero-s{seed}", (0.5, 0.6, accuracy), method="hero", seed=seed, more=found, every=1)
    for rate in (0.2, 0.8):
        for kind in ("symmetric", "asymmetric"):
            for seed in (0, 1):
                told = {"memorized": (0.1, 0.2, rate + seed / 10), "recovered": (0.8, 0.6, 0.1)}
                noise: dict[str, Any] = {"label_noise": rate, "label_noise_kind": kind, "seed": seed}
                fake(base / f"noisy-{kind}-{rate}-s{seed}", (0.7, 0.8, 0.9 - rate - seed / 10), more=told, **noise)
    for seed, sizes in enumerate(((0.0, 0.0, 0.0), (0.0, 0.1, 0.2), (0.0, 0.0, 0.4))):
        along = {"penalty_grad_norm": sizes, "perturbed_grad_norm": (1.0, 1.0, 1.0)}
        fake(base / f"l1-s{seed}", (0.5, 0.6, 0.7), method="grad_l1", seed=seed, more=along)
    for penalty in ("hvp", "difference"):
        fake(base / "ablations" / penalty, (0.5, 0.6, 0.8), method="hero", penalty=penalty, every=1, seed=1)
    fake(base / "half", status="interrupted", message="max_minutes 1 passed", accuracies=(0.01,), seed=7)
    fake(base / "<b>", status="diverged", message="The loss & <i>all</i> | that", accuracies=(), seed=8)
    grid = [
        {"method": "hero", "rho": rho, "gamma": gamma, "n": 3, "validation_accuracy": rho / 2 + gamma, "std": 0.01}
        for rho in (0.5, 1.0)
        for gamma in (0.1, 0.2)
    ]
    (base / "search").mkdir()
    records.write(base / "search" / "search.json", {"grid": grid, "best": grid[3], "config": {}})
    fake(base / "search" / "trial", seed=9)
    folder = base / "landscape-a"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "plane.png")
    around = {
        "center": {"loss": 0.25, "accuracy": 0.97},
        "basin": {"line": {"mean": 0.5, "std": 0.125}, "plane": 0.375},
        "lines": [[1.0] * 300],
    }
    between = {
        "first": "sgd-s0",
        "to": {"x": {"barriers": {s: {"loss": 1.5, "error": 0.25} for s in ("train", "test")}}},
    }
    config = {"radius": 1.0, "directions": 5, "rise": 0.1}
    record = {"runs": {"sgd-s0": around}, "config": config, "between": between, "environment": ENVIRONMENT}
    record["images"] = {"sgd-s0": 1433}
    records.write(folder / "landscape.json", record)
    return base, *made(base)


def test_means_and_deviations_are_those_of_numpy(everything):
    _, text, _ = everything
    values = 100 * np.array([0.90, 0.93, 0.91])
    row = next(row for row in cells_of(text[text.index("## Accuracy") :], "SGD") if row[1] == "3")
    assert row[2] == f"{values.mean():.2f} \u00b1 {values.std(ddof=1):.2f}"
    # Each time the second epoch has the best validation accuracy.
    assert row[3] == "60.00 \u00b1 0.00"
    # 30 steps of 64 images at 640 a second.
    assert row[5].startswith("3 \u00b1")


def test_differences_are_paired_over_shared_seeds(everything):
    _, text, _ = everything
    paired = 100 * np.array([0.94 - 0.93, 0.92 - 0.91])
    row = next(row for row in cells_of(text[text.index("## Accuracy") :], "HERO") if row[1] == "2")
    assert row[-1] == f"{paired.mean():+.2f} \u00b1 {paired.std(ddof=1) / math.sqrt(2):.2f} (n\u00a02)"
    assert "minus SGD" in text


def rows(**networks):
    """Rows of the table of runs: for each network its values by seed."""
    found = [(name, "x", seed, x) for name, by_seed in networks.items() for seed, x in by_seed.items()]
    return pd.DataFrame(found, columns=["network", "label", "seed", "value"]).assign(run=range(len(found)))


def difference(values, baseline, n=None, formats=tables.FIXED):
    """The cell of paired differences."""
    found = tables.differences(rows(a=values, base=baseline), "base")
    (line,) = tables.lines(tables.texts(found, {"a": n}, {"x": formats}, "+"), ["a"], ["x"])
    return line[1]


def test_difference_by_hand():
    assert difference({0: 3.0, 1: 6.0, 5: 90.0}, {1: 2.0, 0: 1.0, 4: 7.0}) == "+3.00 \u00b1 1.00 (n\u00a02)"
    assert difference({0: 3.0}, {0: 4.0}) == "-1.00 (n\u00a01)"
    assert difference({0: 3.0}, {1: 4.0}) == "\u2014"
    assert difference({0: 3.0, 1: 6.0}, {0: 1.0, 1: 2.0}, 2) == "+3.00 \u00b1 1.00"
    assert difference({0: 3.0, 1: 6.0}, {0: 1.0, 1: 2.0}, 3) == "+3.00 \u00b1 1.00 (n\u00a02)"
    assert difference({0: 300.0, 1: 6.0}, {0: 1.0, 1: 2.0}, 2, (".1e", ".0f")) == "+1.5e+02 \u00b1 148"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A report of ASAM on four seeds, three of them those of HERO, and of both on noisy labels."""
    base = tmp_path_factory.mktemp("against")
    along = {"validation_accuracy": (0.5, 0.8, 0.7)}
    for seed, (best, accuracy) in enumerate(((0.5, 0.9), (0.6, 0.8), (0.4, 0.7), (0.1, 0.1))):
        shown = measured(seed)
        fake(base / f"asam-{seed}", (0.3, best, accuracy), measured=shown, more=along, method="asam", seed=seed)
    for seed, (best, accuracy, shift) in enumerate(((0.7, 0.93, 2.0), (0.65, 0.85, 5.0), (0.5, 0.7, 3.0))):
        shown = measured(shift) if seed else None
        fake(base / f"hero-{seed}", (0.3, best, accuracy), measured=shown, more=along, method="hero", seed=seed)
    for method, accuracy in (("sgd", 0.5), ("hero", 0.75)):
        fake(base / f"noisy-{method}", (0.1, 0.2, accuracy), method=method, label_noise=0.4)
    return made(base, against=("ASAM", "SGD"))[0]


class TestAgainst:
    """Differences to networks that are named."""

    def test_are_those_of_numpy(self, compared):
        part = compared[compared.index("minus ASAM") :]
        (row,) = cells_of(part[: part.index("\n\n#")], "HERO")
        header = next(line for line in part.splitlines() if line.startswith("| network"))
        names = [name.strip() for name in header.strip("|").split(" | ")]
        claims = ["last epoch", "at best validation", "2 bit, channel-narrow", "top eigenvalue"]
        assert names == ["network", "n", *claims]
        found = dict(zip(names, row, strict=True))
        assert found["n"] == "3"
        for label, differences in (("last epoch", (3, 5, 0)), ("at best validation", (20, 5, 10))):
            sem = np.std(differences, ddof=1) / math.sqrt(3)
            assert found[label] == f"{np.mean(differences):+.2f} \u00b1 {sem:.2f}"
        # Measured of two seeds: shifts of 5 and 3 in place of 1 and 2.
        assert found["2 bit, channel-narrow"] == "+2.50 \u00b1 1.50 (n\u00a02)"
        assert found["top eigenvalue"] == "-2.5 \u00b1 1.5 (n\u00a02)"

    def test_are_shown_for_tasks_that_have_the_network(self, compared):
        headings = [line for line in compared.splitlines() if line.startswith("### ") and "minus" in line]
        assert [("noise" in line, line.split("minus ")[1]) for line in headings] == [(False, "ASAM"), (True, "SGD")]
        assert cells_of(compared[compared.index(headings[1]) :], "HERO")[0][:3] == ["HERO", "1", "+25.00"]

    def test_are_left_out_unless_named(self, everything):
        assert "## Differences" not in everything[1]

    def test_refuse_a_name_that_is_no_network(self, tmp_path):
        fake(tmp_path / "a")
        with pytest.raises(ValueError, match=r"`against` must name networks of these runs \(SGD\); got 'ASM'\."):
            made(tmp_path, against=("ASM",))
        assert not (tmp_path / "report").exists()


def test_spread_tells_its_n_where_the_row_has_another():
    def spread(values, n=None):
        found = tables.spreads(rows(a=dict(enumerate(values))))
        return tables.lines(tables.texts(found, {"a": n}), ["a"], ["x"])[0][1]

    assert spread([1.0, 3.0], 2) == "2.00 \u00b1 1.41"
    assert spread([1.0, 3.0], 5) == "2.00 \u00b1 1.41 (n\u00a02)"
    assert spread([1.0], 1) == "1.00"
    assert spread([]) == "\u2014"


@pytest.mark.parametrize(
    ("networks", "least", "expected"),
    [
        ({"a": {0: 1.0, 1: 4.0}, "b": {0: 2.0}}, False, "a has the highest mean, 2.50 %"),
        ({"a": {0: 1.0, 1: 4.0}, "b": {0: 2.0}}, True, "b has the lowest mean, 2.00 %"),
        ({"a": {0: 2.0}, "b": {0: 2.001}, "c": {0: 1.0}}, False, "a and b have the highest mean, 2.00 %"),
        ({name: {0: 2.0} for name in "abcd"}, False, "4 networks have the highest mean, 2.00 %"),
        ({"a": {0: 2.0}}, False, "the mean of a is 2.00 %"),
        ({"a": {0: math.nan}, "b": {0: 2.0}, "c": {0: 1.0}}, False, "b has the highest mean, 2.00 %"),
        ({"a": {0: math.nan}}, False, "no mean is a number"),
    ],
)
def test_what_a_caption_says_is_so(networks, least, expected):
    assert sections.extreme(rows(**networks), least=least) == expected


def test_summary_has_a_row_a_network_and_a_column_a_claim(everything):
    _, text, _ = everything
    part = text[text.index("## Summary") : text.index("## Accuracy")]
    header, _, *rows = (line for line in part.splitlines() if line.startswith("|"))
    noises = [f"{rate} % {kind} noise" for kind in ("asymmetric", "symmetric") for rate in (20, 80)]
    expected = ["network", "n", "clean labels", "2 bit, channel-narrow", *noises, "top eigenvalue", "seconds"]
    assert [cell.strip() for cell in header.strip("|").split(" | ")] == expected
    noisy = ["65.00 \u00b1 7.07 (n\u00a02)", "5.00 \u00b1 7.07 (n\u00a02)"]
    sgd = ["SGD", "3", "91.33 \u00b1 1.53", "61.00 \u00b1 1.00", *noisy, *noisy, "-5 \u00b1 1", "3 \u00b1 0"]
    assert cells_of(part, "SGD") == [sgd]
    assert cells_of(part, "HERO")[0][:5] == ["HERO", "2", "93.00 \u00b1 1.41", "\u2014", "\u2014"]
    assert len(rows) == 3


def test_a_task_of_which_only_accuracy_is_known_has_no_summary(tmp_path):
    fake(tmp_path / "a")
    assert "Summary" not in made(tmp_path)[0]


def test_summary_marks_an_eigenvalue_that_was_not_found(tmp_path):
    for seed in (0, 1):
        fake(tmp_path / str(seed), seed=seed, measured=measured(eigenvalue_converged=seed == 0))
    assert cells_of(made(tmp_path)[0], "SGD")[0][4] == "-4 \u00b1 0*"


def test_seconds_leave_out_the_compilation_of_the_first_epoch(tmp_path):
    fake(tmp_path / "three", more={"images_per_second": (1.0, 64.0, 32.0)})
    fake(tmp_path / "one", (0.5,), more={"images_per_second": (32.0,)}, seed=1)
    found = tidy.read([tmp_path]).table
    seconds = found[found["metric"] == "seconds"].set_index("seed")["value"]
    # Batches of 64, 10 an epoch.
    assert seconds.to_dict() == {0: 10 + 10 + 20, 1: 20}


def test_networks_have_one_name_and_those_on_clean_labels_alone_are_not_among_the_noisy(tmp_path):
    noisy = {"label_noise": 0.2, "more": {"memorized": (0.1, 0.2, 0.3)}}
    fake(tmp_path / "sgd")
    fake(tmp_path / "sgd-longer", epochs=12)
    fake(tmp_path / "sgd-noisy", **noisy)
    fake(tmp_path / "hero", method="hero", rho=0.5, measured=MEASURED)
    fake(tmp_path / "hero-noisy", method="hero", rho=2.0, **noisy)
    fake(tmp_path / "asam", method="asam")
    text, _ = made(tmp_path)
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    rows = {
        name: {line.split(" | ")[0][2:] for line in sections[name].splitlines() if line.startswith(("| SG", "| HE"))}
        for name in ("Summary", "Accuracy", "Label noise", "Quantization")
    }
    assert rows == {
        "Summary": {"SGD", "SGD (epochs 12)", "HERO (rho 0.5)", "HERO (rho 2.0)"},
        "Accuracy": {"SGD", "SGD (epochs 12)", "HERO (rho 0.5)"},
        "Label noise": {"SGD", "HERO (rho 2.0)"},
        "Quantization": {"HERO (rho 0.5)"},
    }
    assert "ASAM" not in sections["Label noise"]
    assert "minus SGD |" in sections["Accuracy"]


def test_label_noise(everything):
    _, text, _ = everything
    for kind in ("symmetric", "asymmetric"):
        title = f"digits, mlp, {kind} label noise: test accuracy, %, last epoch"
        table = text[: text.index(title)]
        header = table[table.rindex("| network") :]
        assert header.splitlines()[0] == "| network | 0 % noise | 20 % noise | 80 % noise |"
        row = cells_of(header, "SGD")[0]
        assert row[1] == "91.33 \u00b1 1.53 (n\u00a03)"
        assert row[2:] == ["65.00 \u00b1 7.07 (n\u00a02)", "5.00 \u00b1 7.07 (n\u00a02)"]
    wrong = text[: text.index("symmetric label noise: altered images taken for their wrong label")]
    assert cells_of(wrong[wrong.rindex("| network") :], "SGD")[0][1:] == [
        "25.00 \u00b1 7.07 (n\u00a02)",
        "85.00 \u00b1 7.07 (n\u00a02)",
    ]
    best = text[: text.index("symmetric label noise: test accuracy, %, highest of all evaluations")]
    assert cells_of(best[best.rindex("| network") :], "SGD")[0][2] == "80.00 \u00b1 0.00 (n\u00a02)"


def test_quantization(everything):
    _, text, _ = everything
    row = next(row for row in cells_of(text, "SGD") if "364" in row)
    assert row == ["SGD", "3", "364", "98.00 \u00b1 1.00", "97.00 \u00b1 1.00", "61.00 \u00b1 1.00"]
    assert "grid channel-narrow" in text


def test_curvature_from_either_source_and_its_star(everything):
    _, text, _ = everything
    rows = text[text.index("## Curvature") : text.index("## Size of the penalty")]
    sgd, hero = cells_of(rows, "SGD")[0], cells_of(rows, "HERO")[0]
    assert sgd == ["SGD", "3", "100", "-5 \u00b1 1", "1.0e-04", "6 \u00b1 0", "0.5"]
    assert hero == ["HERO", "2", "1000", "3 \u00b1 0*", "1.0e-02", "6.5 \u00b1 0.71", "0.1"]


def test_size_of_the_penalty_over_the_steps_that_have_it(everything):
    _, text, page = everything
    rows = text[text.index("## Size of the penalty") : text.index("## Landscapes")]
    expected = ["HERO", "2", "2", "0.01 ± 0", "0.155 ± 0.071", "0.3 ± 0.14", "0.3 ± 0.14"]
    assert cells_of(rows, "HERO")[0] == expected
    # One of three seeds never has a penalty, one has it once, one twice.
    assert cells_of(rows, "GRAD L1") == [
        ["GRAD L1", "2", "1-2", "0.25 ± 0.21", "0.275 ± 0.18", "0.3 ± 0.14", "0.3 ± 0.14"]
    ]
    assert not cells_of(rows, "SGD")
    assert "size of the penalty's term along training" in html.unescape(page)


def test_ablations_have_a_row_a_setting_and_leave_the_main_table(everything):
    _, text, _ = everything
    rows = text[text.index("## Ablations") : text.index("## Search")]
    names = [line.split(" | ")[0] for line in rows.splitlines() if line.startswith("| HERO")]
    assert names == ["| HERO", "| HERO (penalty difference)", "| HERO (penalty hvp)"]
    accuracy = text[text.index("## Accuracy") : text.index("## Label noise")]
    assert "penalty" not in accuracy


def test_ablations_are_compared_with_the_base(tmp_path):
    for i, setting in enumerate(({}, {"rho": 0.5}, {"gamma": 7.0})):
        fake(tmp_path / "ablations" / str(i), (0.5, 0.6, 0.9 - i / 10), method="hero", **setting)
    text, _ = made(tmp_path)
    assert "minus HERO" in text
    assert cells_of(text, "HERO (gamma 7.0)")[0][-1] == "-20.00 (n\u00a01)"
    assert "deviation" in text


def test_search_marks_what_was_chosen(everything):
    _, text, _ = everything
    rows = text[text.index("## Search") : text.index("## Where")]
    assert "| 1.0 | 0.2 | 3 | 70.00 \u00b1 1.00 (chosen) |" in rows
    assert rows.count("(chosen)") == 1
    assert "heat-map" in rows


def test_a_search_that_was_ended_or_diverged_stays_out_of_the_table(tmp_path):
    fake(tmp_path / "main")
    configs = SearchConfig.resolve(method="sam", rho=(0.1, 0.2)).runs()
    for name, grid in (("begun", []), ("diverged", summarize(configs, []))):
        records.write(made_folder(tmp_path / name) / "search.json", {"config": {}, "grid": grid, "best": None})
        fake(tmp_path / name / "runs" / "trial", method="sam", rho=0.2)
    text, _ = made(tmp_path)
    assert "SAM" not in text[text.index("## Accuracy") : text.index("## Search")]
    rows = text[text.index("## Search") : text.index("## Where")]
    assert rows.count("| 0 | diverged |") == 2


def made_folder(path):
    path.mkdir()
    return path


def test_landscapes_are_embedded_with_their_numbers(everything):
    base, text, code = everything
    assert ["sgd-s0", "0.2500", "97.00", "50.0 \u00b1 12.5", "37.5"] in cells_of(text, "sgd-s0")
    assert "| x | 1.500 | 25.00 | 1.500 | 25.00 |" in text
    assert "over 1,433 images" in text
    image = base64.b64encode((base / "landscape-a" / "plane.png").read_bytes()).decode()
    assert image in code


def test_runs_that_are_not_done_are_listed_and_left_out(everything):
    _, text, code = everything
    assert "21 runs: 19 done, 1 diverged, 1 interrupted." in text
    assert "max_minutes 1 passed" in text
    accuracy = text[text.index("## Accuracy") : text.index("## Label noise")]
    assert cells_of(accuracy, "SGD")[0][1:3] == ["3", "91.33 \u00b1 1.53"]
    assert "max_minutes 1 passed" in Page(code).text


def test_page_needs_nothing_else_and_nests(everything):
    _, _, code = everything
    page_read = Page(code)
    images = [attributes for tag, attributes in page_read.tags if tag == "img"]
    assert len(images) > 8
    for attributes in images:
        kind, _, content = attributes["src"].partition(";base64,")
        marks = {"data:image/svg+xml": b"<svg", "data:image/png": b"\x89PNG"}
        assert marks[kind] in base64.b64decode(content)
        assert attributes["alt"]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page_read.tags}
    links = [attributes["href"] for tag, attributes in page_read.tags if tag == "a"]
    identifiers = {f"#{attributes['id']}" for _, attributes in page_read.tags if "id" in attributes}
    assert set(links) == identifiers
    assert len(links) == 12
    assert "url(" not in code
    assert "@import" not in code


def test_all_text_is_escaped(everything):
    _, text, code = everything
    page_read = Page(code)
    assert {tag for tag, _ in page_read.tags} & {"b", "i"} == set()
    assert "/<b>" in page_read.text
    assert "The loss & <i>all</i> | that" in page_read.text
    assert "<b>" not in text
    assert "&lt;b&gt;" in text


def test_a_page_that_does_not_nest_is_noticed():
    with pytest.raises(AssertionError):
        Page("<p><table></p></table>")


def test_markdown_tables_have_as_many_cells_in_every_row(everything):
    _, text, _ = everything
    tables_read = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables_read) > 10
    for lines in tables_read:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1


def test_links_of_the_markdown_are_files_beside_it(everything):
    base, text, _ = everything
    files = re.findall(r"\]\(([^)]*)\)", text)
    assert len(files) > 8
    assert {file.name for file in (base / "report").iterdir()} == {*files, "report.md", "report.html"}
    for file in files:
        if file.endswith(".png") and "plane" not in file:
            with Image.open(base / "report" / file) as image:
                assert min(image.size) > 150
                assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20


def test_all_commits_and_hardware_are_listed(tmp_path):
    gpu = {"kind": "H", "platform": "gpu", "count": 4, "processes": 1}
    fake(tmp_path / "a", seed=0)
    fake(tmp_path / "b", seed=1, part={"commit": "bbbbbbbbbbbb", "device": gpu})
    fake(tmp_path / "c", seed=2, part={"continued": [ENVIRONMENT | {"commit": "cccccccccccc"}]})
    text, _ = made(tmp_path)
    caption = next(line for line in text.splitlines() if line.startswith("Accuracy in percent"))
    assert "SGD has runs of aaaaaaaaaaaa and aaaaaaaaaaaa then cccccccccccc and bbbbbbbbbbbb" in caption
    assert "1 x cpu, 2 cores (2 runs), 4 x H, 2 cores (1 runs)" in caption
    assert "train --method sgd" in text


@pytest.mark.parametrize(("longest", "scale"), [(6, "linear"), (7, "log")])
def test_short_curves_keep_their_width_beside_long_ones(longest, scale, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *rest, **options: seen.extend(figure.axes))
    ends = {"SGD": 3, "HERO": longest}
    curves = pd.DataFrame([(name, epoch, 1.0) for name, end in ends.items() for epoch in range(1, 1 + end)])
    curves.columns = ["network", "epoch", "value"]
    plots.along_epochs({"loss": curves, "accuracy": curves}, tmp_path / "plot.png")
    assert [axes.get_xscale() for axes in seen] == [scale, scale]


def test_names_tell_settings_apart_and_pace_does_not(tmp_path):
    fake(tmp_path / "a", seed=0)
    fake(tmp_path / "b", seed=1, save_minutes=60.0, every=5)
    fake(tmp_path / "c", seed=1, learning_rate=0.3)
    fake(tmp_path / "d", seed=0, train_size=100)
    text, _ = made(tmp_path)
    assert cells_of(text, "SGD")[0][1] == "2"
    assert cells_of(text, "SGD (learning_rate 0.3)")[0][1:3] == ["1", "70.00"]
    assert "100 training images" in text


def test_older_runs_without_newer_fields(tmp_path):
    fake(tmp_path / "new", method="hero", seed=0)
    old = fake(tmp_path / "old", method="hero", seed=1)
    fields = json.loads((old / "config.json").read_text())
    newer = ("interval", "scope", "reduction", "label_noise", "label_noise_kind", "dtype")
    records.write(old / "config.json", {name: fields[name] for name in fields if name not in newer})
    text, _ = made(tmp_path)
    assert cells_of(text, "HERO")[0][1] == "2"


def test_accuracy_of_older_runs_on_held_out_images_says_so(tmp_path):
    fake(tmp_path / "a", validation_size=100)
    fake(tmp_path / "b", validation_size=100, seed=1, more={"validation_accuracy": (0.1, 0.2, 0.3)})
    text, _ = made(tmp_path)
    assert "percent on the validation images" in text
    assert "percent on the test images" in text


def test_a_report_replaces_an_earlier_one_only(tmp_path):
    run = fake(tmp_path / "runs" / "a")
    out = tmp_path / "out"
    report.main((tmp_path / "runs",), out)
    (out / "plot-99-old.png").write_text("")
    report.main((run, tmp_path / "runs"), out)
    assert not (out / "plot-99-old.png").exists()
    assert "1 finished run " in (out / "report.md").read_text()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`out` must be a new or empty folder, or that of a report"):
        report.main((run,), out)
    assert (out / "report.html").exists()


def test_runs_of_which_none_is_done_are_listed(tmp_path):
    fake(tmp_path / "a", status="interrupted", message="max_minutes 1 passed")
    text, _ = made(tmp_path)
    assert "1 runs: 1 interrupted." in text
    assert re.findall("^## (.*)", text, flags=re.MULTILINE) == ["What was run", "Where every number comes from"]


def test_a_table_of_every_number_of_every_run(everything):
    found = tidy.read([everything[0]]).table
    sgd = found[(found["section"] == "main") & (found["network"] == "SGD") & (found["noise"] == 0)]
    values = sgd.set_index(["seed", "metric", "epoch"])["value"]
    assert values[0, "accuracy", 2.0] == 60
    at_end = sgd[sgd["epoch"].isna()].set_index(["seed", "metric"])["value"]
    assert at_end[1, "accuracy"] == 93
    assert at_end[1, "2 bit, channel-narrow"] == 61
    assert at_end[1, "eigenvalue"] == -5
    assert set(sgd["bits"].dropna()) == {"full", "8", "2"}
    # A trial of a search and a run that diverged are not in it.
    assert not set(found["seed"]) & {8, 9}


def test_a_network_looks_the_same_in_all_figures(everything, monkeypatch, tmp_path):
    seen: dict[str, set[Any]] = {}

    def drawn(figure, *_, **__):
        for axes in figure.axes:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                line = getattr(handle, "lines", [handle])[0]
                seen.setdefault(name, set()).add((line.get_color(), line.get_marker(), line.get_linestyle()))

    monkeypatch.setattr(plots.Figure, "savefig", drawn)
    data = tidy.read([everything[0]]).table
    draw = sections.Plotter(tmp_path, data["network"])
    end = sections.at_end(data, {"accuracy": "x"})
    every = sections.networks(end)
    # Alone and beside others, a network would be given the first free style if each figure gave its own.
    for names in (["HERO (penalty hvp)"], ["HERO (penalty difference)", "HERO (penalty hvp)"], every):
        draw.of_networks(plots.over_noise, end[end["network"].isin(names)], "%", caption="")
    assert {len(looks) for looks in seen.values()} == {1}
    assert len(set.union(*seen.values())) == len(seen) == len(every)


def test_captions_of_plots_begin_with_what_is_to_be_seen(everything):
    _, text, _ = everything
    captions = re.findall(r"^!\[\]\(.*\)\n\n(.*)", text, flags=re.MULTILINE)
    assert len(captions) > 8
    for caption in captions:
        assert re.match(
            r"(Further|Higher|Fewer|Lower|Brighter|At 1|A larger) [^.]*(better|flatter|gradient|wider)", caption
        )
    accuracy = text[text.index("## Accuracy") :]
    assert "Further right is better: HERO has the highest mean, 93.00 %. digits, mlp: accuracy" in accuracy


class TestRefusals:
    def test_no_runs(self, tmp_path):
        with pytest.raises(ValueError, match=r"`folders` must hold run folders .*; got none below"):
            report.main((tmp_path,))
        assert not (tmp_path / "report").exists()

    def test_a_seed_twice(self, tmp_path):
        fake(tmp_path / "a")
        fake(tmp_path / "b", max_minutes=3.0)
        with pytest.raises(
            ValueError, match=r"`folders` must differ; .* has the configuration and seed of another one"
        ):
            report.main((tmp_path,))

    @pytest.mark.parametrize(
        ("other", "what"),
        [
            (MEASURED | {"images": 5}, "images: 364 in .*, 5 in"),
            (MEASURED | {"quantized": {"tensor-narrow": {"full": 1.0}}}, "quantizers: .*tensor-narrow"),
            (measured(images=7), "images for the curvature: 100 in .*, 7 in"),
        ],
    )
    def test_runs_of_a_cell_measured_differently(self, other, what, tmp_path):
        fake(tmp_path / "a", measured=MEASURED)
        fake(tmp_path / "b", seed=1, measured=other)
        with pytest.raises(ValueError, match=f"`folders` must have the runs of SGD measured alike; {what}"):
            report.main((tmp_path,))
        assert not (tmp_path / "report").exists()

    def test_fields_of_another_version(self, tmp_path):
        folder = fake(tmp_path / "a")
        fields = json.loads((folder / "config.json").read_text())
        records.write(folder / "config.json", fields | {"warp": 9})
        with pytest.raises(ValueError, match=r"`folders` must hold runs of fields that are known here; .* has warp"):
            report.main((tmp_path,))

    def test_impossible_configuration(self, tmp_path):
        folder = fake(tmp_path / "a")
        fields = json.loads((folder / "config.json").read_text())
        records.write(folder / "config.json", fields | {"epochs": -1})
        with pytest.raises(ValueError, match=r"`folders` must hold runs that are possible here; .*`epochs`"):
            report.main((tmp_path,))

    @pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "rho", "gamma"])
    def test_a_setting_that_no_run_could_leave_open(self, name, tmp_path):
        """It is not made up from the presets."""
        folder = fake(tmp_path / "a", method="hero")
        fields = json.loads((folder / "config.json").read_text())
        del fields[name]
        records.write(folder / "config.json", fields)
        with pytest.raises(
            ValueError, match=rf"`folders` must hold runs that are possible here; .*`{name}` must be saved"
        ):
            report.main((tmp_path,))

    def test_damaged_file(self, tmp_path):
        (fake(tmp_path / "a") / "measured.json").write_text("{")
        with pytest.raises(ValueError, match=r"`folders` must hold whole files; .*measured.json is damaged"):
            report.main((tmp_path,))

    def test_command_exits_with_two_and_one_line(self, tmp_path, called):
        found = called("experiments.report", tmp_path)
        assert found.returncode == 2
        assert re.fullmatch(r"error: `folders` must hold run folders .*\n", found.stderr)


def test_what_is_not_a_run_is_passed_over(tmp_path):
    fake(tmp_path / "a")
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "config.json").write_text(json.dumps({"specs": [], "seed": 0}))
    fake(tmp_path / "b" / "checkpoint" / "kept", seed=3)
    found = tidy.read([tmp_path, tmp_path / "a"])
    assert list(found.runs["path"]) == [tmp_path / "a"]


def test_a_number_that_is_not_finite_is_shown_as_such(tmp_path):
    fake(tmp_path / "a", measured=measured(hessian_norm=math.nan))
    fake(tmp_path / "b", seed=1, measured=MEASURED)
    text, _ = made(tmp_path)
    assert cells_of(text[text.index("## Curvature") :], "SGD")[0][5] == "nan"


def test_missing_cells_are_dashes(tmp_path):
    fake(tmp_path / "a", measured=MEASURED)
    more = MEASURED | {"quantized": {"channel-narrow": {"full": 97.0, "4": 90.0}}}
    fake(tmp_path / "b", method="sam", measured=more)
    text, _ = made(tmp_path)
    assert cells_of(text[text.index("## Quantization") :], "SAM")[0] == [
        "SAM",
        "1",
        "364",
        "97.00",
        "\u2014",
        "\u2014",
        "90.00",
    ]


def test_a_page_of_one_section_has_no_contents(tmp_path):
    code = page.to_html("t", "i", [page.Section("one", ["text"])], tmp_path)
    assert "<nav>" not in code
    assert "<p>text</p>" in code


def test_a_page_uses_the_window_and_scrolls_wide_tables_alone(tmp_path):
    shown = page.Table(["a", "b"], [["x", "1"]])
    parts = ["text", shown, page.Picture("p.png", "one"), page.Picture("p.png", "two"), shown]
    Image.new("RGB", (4, 3)).save(tmp_path / "p.png")
    code = page.to_html("t", "i", [page.Section("one", parts)], tmp_path)
    read = [attributes.get("class") for tag, attributes in Page(code).tags if tag in ("div", "figure", "table")]
    # Each table in a box of its own, pictures that follow each other side by side.
    assert read == ["wide", None, "plots", None, None, "wide", None]
    assert re.search(r"\.wide {[^}]*overflow-x: auto", code)
    assert not re.search(r"body {[^}]*max-width", code)
    assert 'name="viewport"' in code
    assert "prefers-color-scheme: dark" in code


def test_a_real_run(tmp_path):
    train.main(resolve(method="sgd", epochs=1, train_size=64), out=tmp_path / "run")
    text, code = made(tmp_path)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert cells_of(text, "SGD")[0][1:3] == ["1", f"{100 * row['accuracy']:.2f}"]
    assert environment.current()["commit"] in text
    assert not [tag for tag, _ in Page(code).tags if tag == "img"]


def test_cost_of_every_network_and_accuracy_at_equal_cost(tmp_path):
    for seed, accuracies in enumerate(last([0.6, 0.7])):
        fake(tmp_path / "accuracy" / "runs" / f"sgd-s{seed}", accuracies, seed=seed)
    fake(tmp_path / "accuracy" / "runs" / "sam-s0", method="sam")
    validated = {"validation_accuracy": [0.1, 0.9, 0.2]}
    for noise, end in ((0.0, 0.8), (0.4, 0.5)):
        shared = {"label_noise": noise, "validation_size": 20, "more": validated}
        out = tmp_path / "cost" / "runs"
        fake(out / f"sgd-{noise}-s0", (0.5, 0.55, end), epochs=12, **shared)
        fake(out / f"sam-{noise}-s0", (0.5, 0.6, end + 0.1), method="sam", epochs=6, **shared)
    text, _ = made(tmp_path)
    cost = text[text.index("## Cost") : text.index("## Where every number")]
    # 640 images a second at batch 64 are 100 ms; fake runs have 30 steps.
    assert cells_of(cost, "SGD") == [
        ["SGD", "2", "1", "100 ± 0", "3", "30", "65.00 ± 7.07"],
        ["SGD", "1", "1", "100", "12", "30", "80.00", "50.00"],
        ["SGD", "1", "1", "100", "12", "30", "55.00", "55.00"],
    ]
    assert cells_of(cost, "SAM") == [
        ["SAM", "1", "2", "100", "3", "60", "70.00"],
        ["SAM", "1", "2", "100", "6", "60", "90.00", "60.00"],
        ["SAM", "1", "2", "100", "6", "60", "60.00", "60.00"],
    ]
    # Runs at equal cost are nowhere else but in the settings.
    assert "epochs 12" not in text[: text.index("## Where every number")]
