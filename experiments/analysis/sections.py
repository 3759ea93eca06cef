"""The sections of a report on accuracy: tables of means, each with its n, spread, commits and hardware, and plots.

The others are in `summary`, `curvature` and `cost`. Each takes rows of the table of runs (`table.Found`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import page, plots, tables
from experiments.analysis.table import read_json, width_label
from experiments.analysis.tables import Frame
from experiments.config import LABELS

SPREAD = "Mean \u00b1 standard deviation over n seeds; a single run has no deviation."
ALONG = "a line is the mean over seeds, its band their range"


class Plotter:
    """Draws the plots of a report into its folder, as PNG and SVG; a network looks the same in all of them."""

    def __init__(self, out: Path, networks: Iterable[str] = ()) -> None:
        self.out, self.styles, self._count = out, plots.styles_of(networks), 0

    def __call__(self, plot: Callable[..., None], *arguments: Any, caption: str, **options: Any) -> page.Picture:
        """The picture of a plot that takes the styles of networks."""
        self._count += 1
        names = [f"plot-{self._count:02}-{plot.__name__.replace('_', '-')}.{kind}" for kind in ("svg", "png")]
        for name in names:
            plot(*arguments, self.out / name, **options)
        return page.Picture(names[0], caption, names)

    def of_networks(self, plot: Callable[..., None], *arguments: Any, **options: Any) -> page.Picture:
        """The picture of a plot of networks."""
        return self(plot, *arguments, styles=self.styles, **options)

    def copied(self, image: Path, caption: str) -> page.Picture:
        """A picture that is there already."""
        self._count += 1
        name = f"plot-{self._count:02}-{image.name}"
        (self.out / name).write_bytes(image.read_bytes())
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
    counts = rows.groupby("run").size().reindex(part["run"].unique(), fill_value=0)
    short = part["network"][part["run"].isin(counts.index[counts < least])]
    return rows[~rows["network"].isin(short.unique())]


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
    who = f"{', '.join(best[:-1])} and {best[-1]} have" if 1 < len(best) < 4 else f"{best[0]} has"
    who = who if len(best) < 4 else f"{len(best)} networks have"
    return f"{who} the {'lowest' if least else 'highest'} mean, {shown}{unit}"


def of(part: Frame, rows: Frame) -> Frame:
    """All rows of the networks that some rows are of."""
    return part[part["network"].isin(rows["network"])]


def last_of(rows: Frame) -> Frame:
    """The last value of each run."""
    return rows.sort_values("epoch", kind="stable").groupby("run", sort=False).tail(1)


def accuracy(data: Frame, draw: Plotter) -> list[Any]:
    """For each task a row a network: accuracy, loss, time, and paired differences."""
    content = []
    for title, split, part in parts(data):
        content += [page.Heading(title), _accuracy_table(part, split)]
        where, last = f"{split} accuracy, %", at_end(part, {"accuracy": "last epoch"})
        if len(last) > 1:
            caption = (
                f"Further right is better: {extreme(last)}. {title}: accuracy after the last epoch; a mark is a run,"
                " the bar the mean."
            )
            content.append(draw.of_networks(plots.each_run, last, where, caption=caption))
        curves = along(part, "accuracy")
        if is_curve(curves):
            caption = f"Higher is better: {ALONG}, and at the end {extreme(last)}. {title}: accuracy along training."
            content.append(draw.of_networks(plots.along_epochs, {where: curves}, caption=caption))
    return content


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
    """The table of one task."""
    labels = {"accuracy": "last epoch", "at_best_validation": "at best validation", "train_loss": "train loss"}
    end = at_end(part, labels | {"seconds": "seconds"})
    formats = {"train loss": tables.SCIENTIFIC, "seconds": tables.SCIENTIFIC}
    made = tables.means(end, formats=formats)
    last = end[end["label"] == "last epoch"]
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
    shown = ["n", *labels.values(), "seconds", *(f"minus {name}" for name in compared)]
    shown = [label for label in shown if label in {label for _, label in made}]
    return listed(made, shown, text, part)


def label_noise(data: Frame, draw: Plotter) -> list[Any]:
    """For each task and kind of noise, accuracy and memorization by rate; curves along training for each rate."""
    content = []
    for clean, split, part in parts(data, "clean"):
        for kind in part["kind"][part["noise"] > 0].unique():
            of_kind = part[(part["noise"] == 0) | (part["kind"] == kind)]
            # Without the networks that were trained on clean labels alone.
            of_kind = of_kind[of_kind["network"].isin(of_kind["network"][of_kind["noise"] > 0])]
            title, where = f"{clean}, {kind} label noise", f"{split} accuracy, %"
            content.append(page.Heading(title))
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
                rates = sorted(end["noise"].unique())
                made = tables.texts(tables.spreads(end.assign(label=end["noise"].map(_rate))))
                content.append(listed(made, [*map(_rate, rates)], text, of_kind, of_kind))
                if metric == "accuracy":
                    worst = extreme(end[end["noise"] == rates[-1]])
                    caption = (
                        f"Higher is better, and a level line loses little to wrong labels: at {_rate(rates[-1])}"
                        f" {worst}. {title}: {label}; mean \u00b1 standard deviation over seeds."
                    )
                    content.append(draw.of_networks(plots.over_noise, end, where, caption=caption))
            content += _memorization(of_kind, title, draw)
    return content


def _rate(noise: float) -> str:
    return f"{100 * noise:g} % noise"


def _memorization(part: Frame, title: str, draw: Plotter) -> list[page.Picture]:
    """For each rate, what networks say of the altered images along training."""
    pictures = []
    for rate, of_rate in part.groupby("noise"):
        curves = {
            "wrong label learned, %": along(of_rate, "memorized"),
            "true label found, %": along(of_rate, "recovered"),
        }
        curves = {label: rows for label, rows in curves.items() if len(rows)}
        if curves:
            learned = curves.get("wrong label learned, %")
            told = "" if learned is None else f"; of wrong labels at the end {extreme(last_of(learned), least=True)}"
            caption = (
                f"Fewer wrong labels learned and more true labels found are better: {ALONG}{told}. {title} of"
                f" {100 * rate:g} %: altered training images along training."
            )
            pictures.append(draw.of_networks(plots.along_epochs, curves, caption=caption))
    return pictures


def quantization(data: Frame, draw: Plotter) -> list[Any]:
    """For each task and quantizer, accuracy by bit width."""
    content = []
    for title, _, part in parts(data):
        images = part[part["metric"] == "images"].groupby("network")["value"].first()
        for spec, rows in part.groupby("spec", sort=False):
            widths = list(rows["bits"].unique())
            rows = rows.assign(label=rows["bits"].map(width_label))
            made = tables.means(rows) | {(name, "images"): f"{images[name]:.0f}" for name in networks(rows)}
            text = (
                f"Accuracy in percent with the weights rounded after training, grid {spec}, on so many images. {SPREAD}"
            )
            content.append(page.Heading(f"{title}: {spec}"))
            content.append(listed(made, ["n", "images", *map(width_label, widths)], text, of(part, rows)))
            last = extreme(rows[rows["bits"] == widths[-1]])
            at = "full precision" if widths[-1] == "full" else f"{widths[-1]} bits"
            caption = (
                f"Higher is better, and bits fall to the right: at {at} {last}. {title}: accuracy"
                f" over the bits of a weight, {spec}; mean \u00b1 standard deviation."
            )
            content.append(draw.of_networks(plots.over_bits, {str(spec): rows}, caption=caption))
    return content


def search(folders: Sequence[Path], draw: Plotter) -> list[Any]:
    """What was tried in each search, by method; the chosen settings are marked."""
    content = []
    for folder in folders:
        record = read_json(folder / "search.json")
        found, best = ("n", "validation_accuracy", "std", "method"), record["best"] or {}
        for method in dict.fromkeys(row["method"] for row in record["grid"]):
            rows = [row for row in record["grid"] if row["method"] == method]
            used = [name for name in rows[0] if name not in found and any(row[name] is not None for row in rows)]
            lines = []
            for row in rows:
                is_best = all(row[name] == best.get(name) for name in (*used, "method"))
                std = float("nan") if row["std"] is None else row["std"]
                text = tables.cell(100 * row["validation_accuracy"], 100 * std) if row["n"] else "diverged"
                values = [tables.NOTHING if row[name] is None else str(row[name]) for name in used]
                lines.append([*values, str(row["n"]), text + (" (chosen)" if is_best else "")])
            text = f"Validation accuracy in percent of the runs that did not diverge. {SPREAD}"
            content.append(page.Heading(f"{folder}: {LABELS[method]}"))
            content.append(page.Table([*used, "n", "validation accuracy"], lines, text, left=0))
            varied = [name for name in used if len({row[name] for row in rows}) > 1]
            values = {
                tuple(row[name] for name in varied): 100 * row["validation_accuracy"] if row["n"] else float("nan")
                for row in rows
            }
            if len(varied) == 2 and len(values) == len(rows):
                first, second = varied
                top = max((value, pair) for pair, value in values.items() if value == value)
                caption = (
                    f"Brighter is better: {first} {top[1][0]:g} with {second} {top[1][1]:g} has {top[0]:.2f} %, and no"
                    f" other is higher. {folder}, {LABELS[method]}: validation accuracy in percent."
                )
                content.append(draw(plots.heat_map, values, (first, second, "validation accuracy, %"), caption=caption))
    return content


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
