"""The sections of a report on accuracy: tables of means, each with its n, spread, commits and hardware, and plots.

The others are in `summary`, `curvature` and `cost`. Each takes rows of the table of runs (`tidy.Found`), and gives
headings, tables and pictures, task by task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import page, plots, tables
from experiments.analysis.tables import Frame
from experiments.analysis.tidy import read_record, width_label
from experiments.config import LABELS
from experiments.measure.search import SEARCHED, SearchRecord
from experiments.storage import files
from experiments.storage.records import numbers

SPREAD = "Mean \u00b1 standard deviation over n seeds; a single run has no deviation."
ACCURACIES = {"accuracy": "last epoch", "at_best_validation": "at best validation"}
ALONG = "a line is the mean over seeds, its band their range"
Parts = Iterator[page.Part]


class Plotter:
    """Draws the plots of a report into its folder, as PNG and SVG; a network looks the same in all of them."""

    def __init__(self, out: Path, networks: Iterable[str]) -> None:
        self.out, self.styles, self._count = out, plots.styles_of(networks), 0

    def __call__(self, plot: Callable[..., None], *arguments: Any, caption: str, **options: Any) -> page.Picture:
        """The picture of a plot."""
        self._count += 1
        names = [f"plot-{self._count:02}-{plot.__name__.replace('_', '-')}.{kind}" for kind in ("svg", "png")]
        for name in names:
            plot(*arguments, self.out / name, **options)
        return page.Picture(names[0], caption, names)

    def of_networks(self, plot: Callable[..., None], *arguments: Any, **options: Any) -> page.Picture:
        """The picture of a plot that takes the styles of networks."""
        return self(plot, *arguments, styles=self.styles, **options)

    def along(self, panels: Mapping[str, Frame], caption: str, *, log: bool = False) -> Parts:
        """The picture of curves along training, of the panels that have some."""
        panels = {label: rows for label, rows in panels.items() if len(rows)}
        if panels:
            yield self.of_networks(plots.along_epochs, panels, caption=caption, log=panels if log else ())

    def copied(self, image: Path, caption: str) -> page.Picture:
        """A picture that is there already."""
        self._count += 1
        name = f"plot-{self._count:02}-{image.name}"
        content = image.read_bytes()
        with files.atomic(self.out / name) as file:
            file.write(content)
        return page.Picture(name, caption, [name])


def parts(data: Frame, by: str = "title") -> Iterator[tuple[str, str, Frame]]:
    """Each task (`title`, or whatever was done to its labels: `clean`) with its split and rows, networks in order."""
    for (title, split), part in data.groupby([by, "split"], sort=False):
        yield str(title), str(split), part.sort_values("rank", kind="stable")


def at_end(part: Frame, labels: Mapping[str, str]) -> Frame:
    """The values at the end of training of these metrics, with the label of their column."""
    rows = part[part["epoch"].isna() & part["metric"].isin(list(labels))]
    return rows.assign(label=rows["metric"].map(labels))


def along(part: Frame, metric: str, least: int = 1) -> Frame:
    """The values of a metric along training, of the networks of which every run has at least so many."""
    rows = part[(part["metric"] == metric) & part["epoch"].notna()]
    counts = part["run"].map(rows["run"].value_counts()).fillna(0)
    return rows[~rows["network"].isin(part["network"][counts < least])]


def is_curve(rows: Frame) -> bool:
    """Whether some run has more than one value."""
    return rows.duplicated(["network", "run"]).any()


def networks(part: Frame) -> list[str]:
    """Their names, in order."""
    return list(part["network"].unique())


def extreme(rows: Frame, unit: str = " %", form: str = ".2f", *, least: bool = False) -> str:
    """Which network has the highest (or lowest) mean, in words; those that show the same number have it together."""
    means = tables.spreads(rows, ["network"])["mean"].dropna()
    if means.empty:
        return "no mean is a number"
    shown = f"{means.min() if least else means.max():{form}}"
    best = [str(name) for name, mean in means.items() if f"{mean:{form}}" == shown]
    if len(means) == 1:
        return f"the mean of {best[0]} is {shown}{unit}"
    who = f"{best[0]} has"
    if len(best) > 1:
        who = f"{', '.join(best[:-1])} and {best[-1]} have" if len(best) < 4 else f"{len(best)} networks have"
    return f"{who} the {'lowest' if least else 'highest'} mean, {shown}{unit}"


def of(part: Frame, rows: Frame) -> Frame:
    """All rows of the networks that some rows are of."""
    return part[part["network"].isin(rows["network"])]


def last_of(rows: Frame) -> Frame:
    """The last value of each run."""
    return rows.sort_values("epoch", kind="stable").groupby("run", sort=False).tail(1)


def accuracy(data: Frame, draw: Plotter) -> Parts:
    """A row a network: accuracy, loss, time, and paired differences."""
    for title, split, part in parts(data):
        yield page.Heading(title)
        yield _accuracy_table(part, split)
        where, last = f"{split} accuracy, %", at_end(part, {"accuracy": "last epoch"})
        if len(last) > 1:
            caption = (
                f"Further right is better: {extreme(last)}. {title}: accuracy after the last epoch; a mark is a run,"
                " the bar the mean."
            )
            yield draw.of_networks(plots.each_run, last, where, caption=caption)
        curves = along(part, "accuracy")
        if is_curve(curves):
            caption = f"Higher is better: {ALONG}, and at the end {extreme(last)}. {title}: accuracy along training."
            yield from draw.along({where: curves}, caption)


def _base(part: Frame, last: Frame) -> str | None:
    """What others are compared with: in ablations the plain network, else SGD, plain or that of best accuracy."""
    if (part["section"] == "ablations").all():
        plain = LABELS[part["method"].iloc[0]]
        return plain if plain in networks(part) else None
    of_sgd = last[last["method"] == "sgd"]
    return LABELS["sgd"] if LABELS["sgd"] in networks(of_sgd) else _best(of_sgd)


def _best(last: Frame) -> str | None:
    return None if last.empty else tables.spreads(last, ["network"])["mean"].idxmax()


def _accuracy_table(part: Frame, split: str) -> page.Table:
    labels = ACCURACIES | {"train_loss": "train loss", "seconds": "seconds"}
    end = at_end(part, labels)
    made, last = tables.means(end), end[end["metric"] == "accuracy"]
    rivals = last[last["method"] != "hero"]
    base, best = _base(part, last), _best(rivals) if len(rivals) < len(last) else None
    compared = [name for name in dict.fromkeys((base, best)) if name is not None]
    for name in compared:
        made |= tables.texts(tables.differences(last.assign(label=f"minus {name}"), name), sign="+")
    text = f"Accuracy in percent on the {split} images. {SPREAD}"
    if compared and len(networks(part)) > 1:
        text += " Differences of the last epoch: paired over the n seeds that both have, mean \u00b1 standard error."
    if best is not None:
        text += f" {best} has the best mean of those that are not HERO."
    text += (
        " Train loss: mean over the last epoch, with noise_bits at the noisy weights. Seconds: in training steps; an"
        " epoch counts at the speed of the next that was evaluated, the first of those, in which a process may compile,"
        " at that of the second."
    )
    shown = ["n", *labels.values(), *(f"minus {name}" for name in compared)]
    return listed(made, [label for label in shown if label in {label for _, label in made}], text, part)


def label_noise(data: Frame, draw: Plotter) -> Parts:
    """For each kind of noise, accuracy and memorization by rate; curves along training for each rate."""
    for clean, split, part in parts(data, "clean"):
        for kind in part["kind"][part["noise"] > 0].unique():
            of_kind = part[(part["noise"] == 0) | (part["kind"] == kind)]
            # Without the networks that were trained on clean labels alone.
            of_kind = of(of_kind, of_kind[of_kind["noise"] > 0])
            title, where = f"{clean}, {kind} label noise", f"{split} accuracy, %"
            yield page.Heading(title)
            shown = {
                "accuracy": f"{where}, last epoch",
                "at_best_validation": f"{where}, at best validation",
                "highest": f"{where}, highest of all evaluations",
                "memorized": "altered images taken for their wrong label, %",
                "recovered": "altered images taken for their true label, %",
            }
            for metric, label in shown.items():
                end = at_end(of_kind, {metric: label})
                if end.empty:
                    continue
                text = f"{title}: {label}. {SPREAD}"
                if metric == "highest":
                    text += f" The epoch is chosen by the very numbers that are shown, on the {split} images."
                rates = {rate: f"{100 * rate:g} % noise" for rate in sorted(end["noise"].unique())}
                made = tables.texts(tables.spreads(end.assign(label=end["noise"].map(rates))))
                yield listed(made, list(rates.values()), text, of_kind, of_kind)
                if metric == "accuracy":
                    worst = max(rates)
                    caption = (
                        f"Higher is better, and a level line loses little to wrong labels: at {rates[worst]}"
                        f" {extreme(end[end['noise'] == worst])}. {title}: {label}; mean \u00b1 standard deviation over"
                        " seeds."
                    )
                    yield draw.of_networks(plots.over_noise, end, where, caption=caption)
            for rate, of_rate in of_kind.groupby("noise"):
                learned, found = along(of_rate, "memorized"), along(of_rate, "recovered")
                told = f"; of wrong labels at the end {extreme(last_of(learned), least=True)}" if len(learned) else ""
                caption = (
                    f"Fewer wrong labels learned and more true labels found are better: {ALONG}{told}. {title} of"
                    f" {100 * rate:g} %: altered training images along training."
                )
                yield from draw.along({"wrong label learned, %": learned, "true label found, %": found}, caption)


def quantization(data: Frame, draw: Plotter) -> Parts:
    """For each quantizer, accuracy by bit width."""
    for title, _, part in parts(data):
        images = part[part["metric"] == "images"].groupby("network")["value"].first()
        for spec, rows in part.groupby("spec", sort=False):
            widths = {bits: width_label(bits) for bits in rows["bits"].unique()}
            rows = rows.assign(label=rows["bits"].map(widths))
            made = tables.means(rows) | {(name, "images"): f"{images[name]:.0f}" for name in networks(rows)}
            text = (
                f"Accuracy in percent with the weights rounded after training, grid {spec}, on so many images. {SPREAD}"
            )
            yield page.Heading(f"{title}: {spec}")
            yield listed(made, ["n", "images", *widths.values()], text, of(part, rows))
            least = list(widths)[-1]
            at, told = "full precision" if least == "full" else f"{least} bits", extreme(rows[rows["bits"] == least])
            caption = (
                f"Higher is better, and bits fall to the right: at {at} {told}. {title}: accuracy over the bits of a"
                f" weight, {spec}; mean \u00b1 standard deviation."
            )
            yield draw.of_networks(plots.over_bits, {str(spec): rows}, caption=caption)


def search(folders: Sequence[Path], draw: Plotter) -> Parts:
    """What was tried in each search, by method; the chosen settings are marked."""
    for folder in folders:
        record = read_record(folder / "search.json", SearchRecord)
        # Older searches have no entry for settings that came later.
        grid: list[dict[str, Any]] = [{**dict.fromkeys(SEARCHED), **row} for row in record.get("grid", [])]
        best = record.get("best") or {}
        for method in dict.fromkeys(row["method"] for row in grid):
            rows = [row for row in grid if row["method"] == method]
            used = [name for name in SEARCHED if any(row[name] is not None for row in rows)]
            means = [100 * numbers(row)["validation_accuracy"] for row in rows]
            lines = []
            for row, mean in zip(rows, means, strict=True):
                values = [tables.NOTHING if row[name] is None else str(row[name]) for name in used]
                text = tables.cell(mean, 100 * numbers(row)["std"]) if row["n"] else "diverged"
                is_best = all(row[name] == best.get(name) for name in (*used, "method"))
                lines.append([*values, str(row["n"]), text + " (chosen)" * is_best])
            text = f"Validation accuracy in percent of the runs that did not diverge. {SPREAD}"
            yield page.Heading(f"{folder}: {LABELS[method]}")
            yield page.Table([*used, "n", "validation accuracy"], lines, text, left=0)
            varied = [name for name in used if len({row[name] for row in rows}) > 1]
            places = [tuple(row[name] for name in varied) for row in rows]
            if len(varied) == 2 and len(set(places)) == len(rows) and any(row["n"] for row in rows):
                first, second = varied
                top, (x, y) = max((mean, place) for mean, place in zip(means, places, strict=True) if mean == mean)
                caption = (
                    f"Brighter is better: {first} {x:g} with {second} {y:g} has {top:.2f} %, and no other is higher."
                    f" {folder}, {LABELS[method]}: validation accuracy in percent."
                )
                values, labels = dict(zip(places, means, strict=True)), (first, second, "validation accuracy, %")
                yield draw(plots.heat_map, values, labels, caption=caption)


def listed(
    made: tables.Texts, labels: Sequence[str], text: str, part: Frame, behind: Frame | None = None
) -> page.Table:
    """The table of the networks of these rows in these columns; below it the text, and where its numbers are from.

    `behind`: rows of all runs behind the numbers; default those of the networks, and which of these mix them is told.
    """
    told = origin(part) if behind is None else origin(behind, mixed=False)
    return page.Table(["network", *labels], tables.lines(made, networks(part), labels), f"{text} {told}")


def origin(part: Frame, mixed: bool = True) -> str:
    """Commits and hardware of the runs behind a table, and with `mixed` which of its networks mix them."""
    of_runs = part.drop_duplicates("run")
    sentences = []
    for what in ("commit", "hardware"):
        tally = Counter(of_runs[what])
        told = [", ".join(f"{name} ({count} runs)" if len(tally) > 1 else name for name, count in tally.most_common())]
        for name, own in of_runs.groupby("network", sort=False)[what] if mixed else ():
            told += [f"{name} has runs of {' and '.join(sorted(own.unique()))}"] if own.nunique() > 1 else []
        sentences.append(f"{what.capitalize()}: {'; '.join(told)}.")
    return " ".join(sentences)
