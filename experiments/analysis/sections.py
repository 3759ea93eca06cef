"""The sections of a report: tables of cells, each with its n, spread, commits and hardware, and their plots.

Those on curvature are in `report.curvature`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments.analysis import networks, page, plots, saved, tables
from experiments.analysis.saved import Cell, Run
from experiments.config import LABELS, TrainConfig
from hero_jax.evaluate import Spread

SPREAD = "Mean \u00b1 standard deviation over n seeds; a single run has no deviation."
K = TypeVar("K")
# Formats of a mean and of its deviation where sizes differ by orders.
SCIENTIFIC = (".3g", ".2g")


class Setup(NamedTuple):
    """What the rows of one table have in common: the task."""

    dataset: str
    model: str | None
    train_size: int | None
    validation_size: int
    test_size: int | None
    augment: bool
    label_noise: float
    label_noise_kind: str
    split: str

    @classmethod
    def of(cls, run: Run) -> Setup:
        """The task of a run."""
        return cls(*(getattr(run.config, name) for name in cls._fields[:-1]), split=run.split)

    def __str__(self) -> str:
        parts = [self.dataset, str(self.model)]
        if self.train_size is not None:
            parts.append(f"{self.train_size:,} training images")
        if self.validation_size:
            parts.append(f"{self.validation_size:,} held out")
        if self.test_size is not None:
            parts.append(f"{self.test_size:,} test images")
        if not self.augment:
            parts.append("no augmentation")
        if self.label_noise:
            parts.append(f"{100 * self.label_noise:g} % {self.label_noise_kind} label noise")
        return ", ".join(parts)


class Part(NamedTuple):
    """A table's worth of cells; `base` is what the others are compared with, where there is one."""

    title: str
    setup: Setup
    cells: list[Cell]
    base: Cell | None


class Plotter:
    """Draws the plots of a report into its folder, as PNG and SVG."""

    def __init__(self, out: Path) -> None:
        self.out, self._count = out, 0

    def __call__(self, plot: Callable[..., None], *arguments: Any, caption: str, **options: Any) -> page.Picture:
        self._count += 1
        names = [f"plot-{self._count:02}-{plot.__name__.replace('_', '-')}.{kind}" for kind in ("svg", "png")]
        for name in names:
            plot(*arguments, self.out / name, **options)
        return page.Picture(names[0], caption, names)

    def copied(self, image: Path, caption: str) -> page.Picture:
        """A picture that is there already."""
        self._count += 1
        name = f"plot-{self._count:02}-{image.name}"
        (self.out / name).write_bytes(image.read_bytes())
        return page.Picture(name, caption, [name])


def accuracy(made: Sequence[Part], draw: Plotter) -> list[Any]:
    """For each task a row a network: accuracy, loss, time, and paired differences."""
    content = []
    for part in made:
        content += [page.Heading(part.title), accuracy_table(part)]
        values = {cell.name: [run.accuracy for run in cell.runs] for cell in part.cells}
        if max(len(values), *map(len, values.values())) > 1:
            caption = f"{part.title}: accuracy after the last epoch; a mark is a run, the bar the mean."
            content.append(draw(plots.each_run, values, f"{part.setup.split} accuracy, %", caption=caption))
        curves = {cell.name: [curve(run, "accuracy", 100) for run in cell.runs] for cell in part.cells}
        if max(len(seed) for seeds in curves.values() for seed in seeds) > 1:
            caption = f"{part.title}: accuracy along training; mean, and range over seeds."
            content.append(draw(plots.along_epochs, {f"{part.setup.split} accuracy, %": curves}, caption=caption))
    return content


def accuracy_table(part: Part) -> page.Table:
    """The table of one task."""
    rivals = [cell for cell in part.cells if cell.network.method != "hero"]
    best = max(rivals, key=saved.mean_accuracy, default=None)
    compared = [part.base] if part.base is not None else []
    if best is not None and best is not part.base and len(rivals) < len(part.cells):
        compared.append(best)
    header = ["network", "n", "last epoch", "at best validation", "train loss", "seconds"]
    header += [f"minus {base.name}" for base in compared]
    lines = []
    for cell in part.cells:
        n = len(cell.runs)
        validated, seconds = (
            [value for run in cell.runs if (value := getattr(run, name)) is not None]
            for name in ("accuracy_at_best_validation", "seconds")
        )
        columns = [
            tables.spread([run.accuracy for run in cell.runs], n),
            tables.spread(validated, n),
            tables.spread([run.rows[-1]["train_loss"] for run in cell.runs], n, SCIENTIFIC),
            tables.spread(seconds, n, SCIENTIFIC),
        ]
        seeds, *others = (c.by_seed(lambda run: run.accuracy) for c in (cell, *compared))
        columns += [
            tables.NOTHING if base is cell else tables.difference(seeds, other)
            for base, other in zip(compared, others, strict=True)
        ]
        lines.append([cell.name, str(n), *columns])
    text = f"Accuracy in percent on the {part.setup.split} images. {SPREAD}"
    if compared and len(part.cells) > 1:
        text += " Differences of the last epoch: paired over the n seeds that both have, mean \u00b1 standard error."
    if compared and compared[-1] is best and len(rivals) < len(part.cells):
        text += f" {compared[-1].name} has the best mean of those that are not HERO."
    text += (
        " Train loss: mean over the last epoch, with noise_bits at the noisy weights. Seconds: in training steps; an"
        " epoch counts at the speed of the next that was evaluated, the first of those, in which a process may compile,"
        " at that of the second."
    )
    return page.Table(*_without_empty(header, lines), f"{text} {origin(part.cells)}")


def label_noise(runs: Sequence[Run], draw: Plotter) -> list[Any]:
    """For each task and kind of noise, accuracy and memorization by rate; curves along training for each rate."""
    content = []
    by_setup, named = by_clean_setup(runs), names(runs)
    kinds = [
        (s, run.config.label_noise_kind)
        for s, of_setup in by_setup.items()
        for run in of_setup
        if run.config.label_noise
    ]
    for setup, kind in dict.fromkeys(kinds):
        of_kind = [run for run in by_setup[setup] if not run.config.label_noise or run.config.label_noise_kind == kind]
        rows = by_noise(of_kind, named, lambda run: run.config.label_noise)
        # Without the networks that were trained on clean labels alone.
        rows = {name: row for name, row in rows.items() if any(row)}
        of_kind = [run for row in rows.values() for of_rate in row.values() for run in of_rate]
        title = f"{setup}, {kind} label noise"
        content.append(page.Heading(title))
        where = f"{setup.split} accuracy, %"
        shown: list[tuple[str, Callable[[Run], float | None]]] = [
            (f"{where}, last epoch", lambda run: run.accuracy),
            (f"{where}, at best validation", lambda run: run.accuracy_at_best_validation),
            (f"{where}, highest of all evaluations", lambda run: 100 * max(row["accuracy"] for row in run.rows)),
            ("altered images taken for their wrong label, %", lambda run: _percent(run.rows[-1].get("memorized"))),
            ("altered images taken for their true label, %", lambda run: _percent(run.rows[-1].get("recovered"))),
        ]
        for label, value in shown:
            values = {
                name: {rate: [x for run in of_rate if (x := value(run)) is not None] for rate, of_rate in row.items()}
                for name, row in rows.items()
            }
            if not any(numbers for row in values.values() for numbers in row.values()):
                continue
            text = f"{title}: {label}. {SPREAD}"
            if "highest" in label:
                text += f" The epoch is chosen by the very numbers that are shown, on the {setup.split} images."
            content.append(_rate_table(values, f"{text} {origin(of_kind)}"))
            if "last epoch" in label:
                points = {
                    name: {rate: Spread.of(numbers)[:2] for rate, numbers in sorted(row.items())}
                    for name, row in values.items()
                }
                caption = f"{title}: {label}; mean \u00b1 standard deviation over seeds."
                content.append(draw(plots.over_noise, points, where, caption=caption))
        content += _memorization(rows, title, draw)
    return content


def by_clean_setup(runs: Sequence[Run]) -> dict[Setup, list[Run]]:
    """Runs by their task, whatever was done to its labels."""
    made: dict[Setup, list[Run]] = {}
    for run in runs:
        clean = Setup.of(run)._replace(label_noise=0.0, label_noise_kind="symmetric")
        made.setdefault(clean, []).append(run)
    return made


def names(runs: Sequence[Run]) -> dict[TrainConfig, str]:
    """A name for each network without its noise, by what those of its task differ in: one in all sections."""
    made: dict[TrainConfig, str] = {}
    for of_setup in by_clean_setup(runs).values():
        made |= networks.names(dict.fromkeys(saved.without_noise(networks.network(run.config)) for run in of_setup))
    return made


def by_noise(
    runs: Sequence[Run], named: Mapping[TrainConfig, str], key: Callable[[Run], K]
) -> dict[str, dict[K, list[Run]]]:
    """Runs by the name of their network without its noise, and by a key that tells their noise."""
    made: dict[str, dict[K, list[Run]]] = {}
    for cell in saved.cells(runs, named):
        made.setdefault(cell.name, {})[key(cell.runs[0])] = cell.runs
    return made


def _rate_table(values: Mapping[str, Mapping[float, Sequence[float]]], caption: str) -> page.Table:
    rates = sorted({rate for row in values.values() for rate, numbers in row.items() if numbers})
    lines = [[name, *(tables.spread(row.get(rate, ())) for rate in rates)] for name, row in values.items()]
    return page.Table(["network", *(f"{100 * rate:g} % noise" for rate in rates)], lines, caption)


def _memorization(rows: Mapping[str, Mapping[float, Sequence[Run]]], title: str, draw: Plotter) -> list[page.Picture]:
    """For each rate, what networks say of the altered images along training."""
    pictures = []
    labels = {"memorized": "wrong label learned, %", "recovered": "true label found, %"}
    for rate in sorted({rate for row in rows.values() for rate in row}):
        panels: dict[str, dict[str, list[Any]]] = {}
        for field, label in labels.items():
            for name, row in rows.items():
                curves = [curve(run, field, 100) for run in row.get(rate, ())]
                if curves and all(curves):
                    panels.setdefault(label, {})[name] = curves
        if panels:
            caption = (
                f"{title} of {100 * rate:g} %: altered training images along training; mean, and range over seeds."
            )
            pictures.append(draw(plots.along_epochs, panels, caption=caption))
    return pictures


def quantization(made: Sequence[Part], draw: Plotter) -> list[Any]:
    """For each task and quantizer, accuracy by bit width."""
    content = []
    for part in made:
        cells = {c.name: [run.measured for run in c.runs if run.measured.get("quantized")] for c in part.cells}
        cells = {name: measured for name, measured in cells.items() if measured}
        for spec in dict.fromkeys(spec for measured in cells.values() for spec in measured[0]["quantized"]):
            rows = {
                name: [record["quantized"][spec] for record in measured]
                for name, measured in cells.items()
                if spec in measured[0]["quantized"]
            }
            widths = list(dict.fromkeys(width for row in rows.values() for width in row[0]))
            lines = []
            for name, row in rows.items():
                columns = [tables.spread([r[width] for r in row if width in r], len(row)) for width in widths]
                lines.append([name, str(len(row)), str(cells[name][0]["images"]), *columns])
            header = ["network", "n", "images", *(w if w == "full" else f"{w} bit" for w in widths)]
            text = f"Accuracy in percent with the weights rounded after training, grid {spec}, on so many images."
            text += f" {SPREAD} {origin([cell for cell in part.cells if cell.name in rows])}"
            content += [page.Heading(f"{part.title}: {spec}"), page.Table(header, lines, text)]
            points = {
                (spec, "nearest", name): [Spread.of([r.get(width, float("nan")) for r in row])[:2] for width in widths]
                for name, row in rows.items()
            }
            caption = f"{part.title}: accuracy over the bits of a weight, {spec}; mean \u00b1 standard deviation."
            content.append(draw(plots.quantization, points, widths, caption=caption))
    return content


def search(folders: Sequence[Path], draw: Plotter) -> list[Any]:
    """What was tried in each search, by method; the chosen settings are marked."""
    content = []
    for folder in folders:
        record = saved.read_json(folder / "search.json")
        found = ("n", "validation_accuracy", "std")
        best = record["best"] or {}
        for method in dict.fromkeys(row["method"] for row in record["grid"]):
            rows = [row for row in record["grid"] if row["method"] == method]
            settings = [name for name in rows[0] if name not in (*found, "method")]
            used = [name for name in settings if any(row[name] is not None for row in rows)]
            lines = []
            for row in rows:
                is_best = all(row[name] == best.get(name) for name in (*used, "method"))
                std = float("nan") if row["std"] is None else row["std"]
                values = [tables.NOTHING if row[name] is None else str(row[name]) for name in used]
                text = tables.cell(100 * row["validation_accuracy"], 100 * std) if row["n"] else "diverged"
                lines.append([*values, str(row["n"]), text + (" (chosen)" if is_best else "")])
            text = f"Validation accuracy in percent of the runs that did not diverge. {SPREAD}"
            content.append(page.Heading(f"{folder}: {LABELS[method]}"))
            content.append(page.Table([*used, "n", "validation accuracy"], lines, text, left=0))
            varied = [name for name in used if len({row[name] for row in rows}) > 1]
            if len(varied) == 2 and len({tuple(row[name] for name in varied) for row in rows}) == len(rows):
                accuracies = [float("nan") if row["n"] == 0 else 100 * row["validation_accuracy"] for row in rows]
                values = {(row[varied[0]], row[varied[1]]): x for row, x in zip(rows, accuracies, strict=True)}
                labels = (*varied, "validation accuracy, %")
                caption = f"{folder}, {LABELS[method]}: validation accuracy in percent by {varied[0]} and {varied[1]}."
                content.append(draw(plots.heat_map, values, labels, caption=caption))
    return content


def origin(cells: Sequence[Cell] | Sequence[Run]) -> str:
    """Commits and hardware of the runs behind a table, and which of its cells mix them."""
    runs_of = [run for cell in cells for run in (cell.runs if isinstance(cell, Cell) else [cell])]
    sentences = []
    for what, value in (("Commit", commit), ("Hardware", hardware)):
        counts = Counter(value(run) for run in runs_of)
        listed = [f"{name} ({count} runs)" if len(counts) > 1 else name for name, count in counts.most_common()]
        within = [(c.name, sorted({value(run) for run in c.runs})) for c in cells if isinstance(c, Cell)]
        mixed = [f"{name} has runs of {' and '.join(values)}" for name, values in within if len(values) > 1]
        sentences.append(f"{what}: {'; '.join([', '.join(listed), *mixed])}.")
    return " ".join(sentences)


def commit(run: Run) -> str:
    return " then ".join(dict.fromkeys(part.get("commit", "unknown") for part in run.parts)) or "unknown"


def hardware(run: Run) -> str:
    return " then ".join(dict.fromkeys(map(machine, run.parts))) or "unknown"


def machine(part: Mapping[str, Any]) -> str:
    device, machine = part.get("device", {}), part.get("machine", {})
    return f"{device.get('count', '?')} x {device.get('kind', 'unknown device')}, {machine.get('cores', '?')} cores"


def curve(run: Run, field: str, unit: float = 1) -> list[tuple[float, float]]:
    """(epoch, value) of each evaluation that has the field."""
    return [(row["epoch"], unit * row[field]) for row in run.rows if field in row]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _without_empty(header: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that have something in them."""
    kept = [i for i in range(len(header)) if any(line[i] != tables.NOTHING for line in lines)]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]
