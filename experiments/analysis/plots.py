"""The figures of comparisons and of curvature. Colours are those of a palette that colour-blind readers tell apart."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from experiments.config import LABELS, METHODS
from experiments.storage import runs

# Okabe and Ito, Color Universal Design, 2008; the two of NSO and MSAM, and those for what is not a method: Tol, Colour
# Schemes, SRON technical note, 2021, muted.
_STYLES = {
    "sgd": ("#000000", "o"),
    "noise": ("#CC79A7", "p"),
    "ema": ("#E69F00", "<"),
    "nso": ("#999933", "X"),
    "msam": ("#882255", ">"),
    "sam": ("#56B4E9", "s"),
    "asam": ("#0072B2", "D"),
    "grad_l1": ("#009E73", "^"),
    "hero": ("#D55E00", "v"),
}
COLORS = {method: _STYLES[method][0] for method in METHODS}
MARKERS = {method: _STYLES[method][1] for method in METHODS}
_OTHERS = ("#332288", "#999999", "#44AA99", "#DDCC77")


def accuracy_over_bits(rows: Sequence[Any], spec: str, path: Path) -> None:
    """Accuracy against the bit width of the weights, mean and standard deviation over seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = ["full" if bits is None else str(bits) for bits in rows[0].accuracy]
    lines = [
        (LABELS[row.method], list(row.accuracy.values()), {"color": COLORS[row.method], "marker": MARKERS[row.method]})
        for row in rows
    ]
    _bits_panel(axes, names, lines)
    axes.set_xlabel(f"bits of a weight after training ({spec})")
    axes.set_title(f"mean \u00b1 standard deviation, n = {rows[0].n}", fontsize=10, loc="left")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


def quantization(
    lines: Mapping[tuple[str, str, str], Sequence[tuple[float, float]]], names: Sequence[str], path: Path
) -> None:
    """Accuracy against the bit width: a panel for each step, four in a row, and new rows for each specification.

    `lines`: by (specification, step, network), (mean, standard deviation) in percent at each of `names`.
    """
    specs, steps, networks = (list(dict.fromkeys(keys)) for keys in zip(*lines, strict=True))
    columns = min(4, len(steps))
    rows = -(-len(steps) // columns)
    figure = Figure(figsize=(1.0 + 3.8 * columns, 0.6 + 3.0 * rows * len(specs)), layout="constrained")
    panels = figure.subplots(rows * len(specs), columns, sharey=True, squeeze=False)
    styles = _styles(networks)
    for axes in panels.flat:
        axes.set_visible(False)
    for (i, spec), (j, step) in itertools.product(enumerate(specs), enumerate(steps)):
        axes = panels[i * rows + j // columns, j % columns]
        axes.set_visible(True)
        drawn = [(name, lines[spec, step, name], styles[name]) for name in networks]
        _bits_panel(axes, names, drawn)
        axes.set_title(f"{spec}, {step}", fontsize=9, loc="left")
        axes.set_xlabel("bits of a weight" if i * rows + j // columns + 1 == len(panels) else "")
        axes.set_ylabel("accuracy, %" if j % columns == 0 else "")
    panels[0, 0].legend(frameon=False, loc="lower left", fontsize=8)
    figure.suptitle("over each panel: quantizer, step; mean \u00b1 standard deviation over seeds", fontsize=9)
    figure.savefig(path, dpi=150)


def _bits_panel(axes: Any, names: Sequence[str], lines: Sequence[tuple[str, Any, dict[str, Any]]]) -> None:
    for i, (label, points, style) in enumerate(lines):
        mean, deviation = np.array(points).T
        x = np.arange(len(names)) + _apart(i, len(lines))
        axes.errorbar(x, mean, deviation, label=label, markersize=5, capsize=2, **style)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)


def _apart(i: int, n: int) -> float:
    """How far line i of n is set aside, so that the bars of networks that tie can be told apart; 0.4 at most in all."""
    return min(0.06, 0.4 / n) * (i - (n - 1) / 2)


def sensitivity(rows: Sequence[Mapping[str, Any]], correlation: Mapping[str, float], path: Path) -> None:
    """Measured against predicted increase of the loss, a mark for each layer quantized alone."""
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    predicted, measured = (np.array([row[name] for row in rows]) for name in ("by_trace", "increase"))
    axes.plot(predicted, measured, "o", color=COLORS["hero"], markersize=5)
    for row in sorted(rows, key=lambda row: -abs(row["increase"]))[:4]:
        where = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7, "color": "#555555"}
        axes.annotate(row["layer"].removesuffix("/kernel"), (row["by_trace"], row["increase"]), **where)
    positive = np.concatenate([np.abs(x[x != 0]) for x in (predicted, measured)])
    threshold = positive.min() if len(positive) else 1.0
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("symlog", linthresh=threshold)
    ends = np.array([min(0, *predicted, *measured), max(*predicted, *measured)])
    axes.plot(ends, ends, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"predicted by the layer's trace, {rows[0]['bits']} bits")
    axes.set_ylabel("measured increase of the loss")
    axes.set_title(
        f"Spearman {correlation['spearman']:.2f}, Pearson {correlation['pearson']:.2f}, {len(rows)} layers",
        fontsize=10,
        loc="left",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def eigenvalues(results: Sequence[Any], path: Path) -> None:
    """Top Hessian eigenvalue of every run, on a logarithmic axis; the bar is the mean of the method."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(result.method for result in results))
    for i, method in enumerate(methods):
        values = np.array([abs(r.eigenvalue) for r in results if r.method == method])
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(i + spread, values, MARKERS[method], color=COLORS[method], markersize=5)
        axes.hlines(values.mean(), i - 0.3, i + 0.3, color=COLORS[method])
    axes.set_yscale("log")
    axes.set_xticks(range(len(methods)), [LABELS[method] for method in methods])
    axes.set_ylabel("|top Hessian eigenvalue|")
    axes.set_title("each mark is a run, the bar is the mean", fontsize=10, loc="left")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)


def training(folders: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Training loss and accuracy along the epochs, mean over seeds; the band is the range over seeds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for method, paths in folders.items():
        histories = [runs.read_metrics(folder) for folder in paths]
        epochs = [row["epoch"] for row in histories[0]]
        for axes, name, unit in zip(panels, ("train_loss", "accuracy"), (1, 100), strict=True):
            values = unit * np.array([[row[name] for row in history] for history in histories])
            axes.plot(epochs, values.mean(0), color=COLORS[method], label=LABELS[method], linewidth=1.5)
            axes.fill_between(epochs, values.min(0), values.max(0), color=COLORS[method], alpha=0.12, linewidth=0)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("training loss (at the unperturbed weights)")
    panels[1].set_ylabel("accuracy, %")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def spectral_density(measured: Mapping[str, Any], path: Path) -> None:
    """Density of eigenvalues on a logarithmic axis, two standard errors around it, the top eigenvalues marked."""
    density = {name: np.array(value) for name, value in measured["density"].items()}
    grid, mean, sem = density["grid"], density["density"], density["sem"]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    # One eigenvalue in so many parameters would stand this high: below it the curve is the tails of its Gaussians.
    number = sum(layer["size"] for layer in measured["layer_traces"])
    floor = 1 / (number * float(density["bandwidth"]) * np.sqrt(2 * np.pi))
    color = COLORS["hero"]
    axes.plot(grid, mean, color=color, linewidth=1.5)
    low = np.maximum(mean - 2 * sem, floor / 10)
    axes.fill_between(grid, low, mean + 2 * sem, color=color, alpha=0.25, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(floor / 10, 3 * np.nanmax(mean))
    axes.axhline(floor, color="#999999", linewidth=0.8, linestyle=":")
    right = axes.get_yaxis_transform()
    axes.text(1.01, floor, "one\neigenvalue", transform=right, va="center", fontsize=8, color="#666666")
    for value, converged in zip(measured["eigenvalues"], measured["converged"], strict=True):
        axes.axvline(value, ymax=0.06, color="#000000" if converged else "#999999", linewidth=1)
    axes.set_xlabel("Hessian eigenvalue (ticks: the largest in magnitude)")
    axes.set_ylabel("density")
    probes, steps = density["nodes"].shape
    axes.set_title(
        f"{probes} probes of {steps} Lanczos steps, bandwidth {float(density['bandwidth']):.2g}, band \u00b1 2 sem",
        fontsize=10,
        loc="left",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def layer_traces(measured: Mapping[str, Any], path: Path) -> None:
    """Trace of every layer's block of the Hessian, with its standard error, in the order of the parameters."""
    rows = measured["layer_traces"]
    figure = Figure(figsize=(7, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    y = np.arange(len(rows))
    mean, sem = (np.array([row[name] for row in rows]) for name in ("mean", "sem"))
    axes.barh(y, mean, color=COLORS["sam"], height=0.7)
    axes.errorbar(mean, y, xerr=sem, fmt="none", ecolor="#000000", capsize=2, linewidth=1)
    axes.set_yticks(y, [row["layer"] for row in rows], fontsize=7 if len(rows) > 12 else 9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_xlabel(f"trace \u00b1 standard error ({measured['trace']['probes']} probes)")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)


def curvature_along_training(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Top Hessian eigenvalue and norm along one run; the bars are residual and standard error."""
    rows = [row for row in history if "eigenvalue" in row]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    epochs = [row["epoch"] for row in rows]
    value = np.abs([row["eigenvalue"] for row in rows])
    error = value * [row["eigenvalue_residual"] for row in rows]
    norm, sem = (np.array([row[name] for row in rows]) for name in ("hessian_norm", "hessian_norm_sem"))
    axes.errorbar(epochs, norm, sem, color=COLORS["sam"], marker="s", capsize=2, label="Frobenius norm")
    axes.errorbar(epochs, value, error, color=COLORS["hero"], marker="v", capsize=2, label="|top eigenvalue|")
    axes.set_yscale("log")
    axes.set_title("bars: residual of the eigenvalue, standard error of the norm", fontsize=10, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _styles(networks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Color and marker by name: a method keeps its own, what is not a method takes a pair that nothing else has."""
    styles = {LABELS[method]: {"color": COLORS[method], "marker": MARKERS[method]} for method in METHODS}
    colors = [*_OTHERS, *(COLORS[method] for method in METHODS if LABELS[method] not in networks)]
    pairs = itertools.cycle({"color": color, "marker": marker} for marker in "P*Xh" for color in colors)
    return {name: styles.get(name) or next(pairs) for name in networks}


def each_run(values: Mapping[str, Sequence[float]], label: str, path: Path, *, log: bool = False) -> None:
    """A line for each network, a mark for each of its runs, a bar at their mean."""
    figure = Figure(figsize=(5.6, 1.1 + 0.3 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    styles = _styles(list(values))
    for i, (name, runs_of) in enumerate(values.items()):
        apart = i + np.linspace(-0.15, 0.15, len(runs_of)) if len(runs_of) > 1 else [i]
        axes.plot(runs_of, apart, **styles[name], linestyle="", markersize=4.5, alpha=0.7)
        axes.vlines(float(np.mean(runs_of)), i - 0.32, i + 0.32, color=styles[name]["color"], linewidth=2)
    axes.set_yticks(range(len(values)), list(values), fontsize=9)
    axes.set_ylim(len(values) - 0.5, -0.5)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)


def along_epochs(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]], path: Path, *, log: bool = False
) -> None:
    """Curves along training, a panel below the other: mean over seeds, the band is the range over seeds.

    `panels`: by label of the axis and network, for each seed its (epoch, value)s; the seeds have the same epochs. Where
    a value is NaN it is left out. Where one network was trained for more than twice the epochs of another the axis of
    epochs is logarithmic, so that the short curves keep their width.
    """
    figure = Figure(figsize=(5.6, 0.8 + 2.5 * len(panels)), layout="constrained")
    ends = [seed[-1][0] for lines in panels.values() for seeds in lines.values() for seed in seeds]
    are_unlike = max(ends) > 2 * min(ends)
    networks = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    styles = _styles(networks)
    for axes, (label, lines) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        for name, seeds in lines.items():
            epochs, values = np.moveaxis(np.array(seeds), -1, 0)
            is_there = ~np.isnan(values).all(0)
            epochs, values = epochs[:, is_there], values[:, is_there]
            marker = styles[name]["marker"] if epochs.shape[1] <= 12 else ""
            style = styles[name] | {"marker": marker}
            axes.plot(epochs[0], np.nanmean(values, 0), **style, label=name, linewidth=1.5, markersize=4)
            low, high = np.nanmin(values, 0), np.nanmax(values, 0)
            axes.fill_between(epochs[0], low, high, color=style["color"], alpha=0.12, linewidth=0)
        if log:
            axes.set_yscale("log")
        axes.set_ylabel(label)
        if are_unlike:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("epoch (logarithmic)" if are_unlike else "epoch")
    _legend_below(figure)
    figure.savefig(path, dpi=150)


def over_noise(lines: Mapping[str, Mapping[float, tuple[float, float]]], label: str, path: Path) -> None:
    """Mean and standard deviation over seeds by network and rate of label noise."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    styles = _styles(list(lines))
    for i, (name, points) in enumerate(lines.items()):
        mean, deviation = np.array(list(points.values())).T
        x = 100 * np.array(list(points)) + 10 * _apart(i, len(lines))
        axes.errorbar(x, mean, deviation, label=name, markersize=5, capsize=2, **styles[name])
    axes.set_xlabel("training labels altered, %")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    _legend_below(figure)
    figure.savefig(path, dpi=150)


def heat_map(values: Mapping[tuple[Any, Any], float], labels: tuple[str, str, str], path: Path) -> None:
    """A number for each (row, column), on a color of its own; `labels` are those of rows, columns and numbers."""
    rows, columns = (sorted(set(keys)) for keys in zip(*values, strict=True))
    table = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
    figure = Figure(figsize=(1.6 + 0.7 * len(columns), 1.1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="cividis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for i, j in np.argwhere(np.isfinite(table)):
        color = "#000000" if table[i, j] > middle else "#FFFFFF"
        axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    figure.colorbar(image, label=labels[2])
    figure.savefig(path, dpi=150)


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, below them."""
    drawn = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, drawn))
    columns = 1 if longest > 36 else 2 if longest > 16 else 4
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(drawn) // columns))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def landscape_lines(surfaces: Mapping[str, Mapping[str, Any]], methods: Mapping[str, str], path: Path) -> None:
    """Loss along random lines: mean over the directions of each run, the band is their standard deviation."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = _run_styles(methods)
    for name, found in surfaces.items():
        steps, lines = found["steps"], np.array(found["lines"])
        # Infinite losses have no deviation.
        with np.errstate(invalid="ignore"):
            mean, deviation = lines.mean(0), lines.std(0, ddof=1)
        color, marker = styles[name]["color"], styles[name]["marker"]
        ends = len(steps) - 1
        axes.plot(steps, mean, color=color, marker=marker, markevery=ends, markersize=5, linewidth=1.5, label=name)
        # On a logarithmic axis a band must not reach 0.
        low = np.maximum(mean - deviation, lines.min(0))
        axes.fill_between(steps, low, mean + deviation, color=color, alpha=0.12, linewidth=0)
    _log_if_wide(axes, [found["lines"] for found in surfaces.values()])
    axes.set_xlabel("step, in units of the norm of each filter")
    axes.set_ylabel("training loss")
    number = len(next(iter(surfaces.values()))["lines"])
    axes.set_title(f"mean \u00b1 standard deviation over {number} random directions", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    _legend_below(figure)
    figure.savefig(path, dpi=150)


def landscape_planes(surfaces: Mapping[str, Mapping[str, Any]], levels: Sequence[float], path: Path) -> None:
    """Contours of the loss at the same levels on the same plane around each run; grey where it is not finite."""
    columns = min(4, len(surfaces))
    rows = -(-len(surfaces) // columns)
    figure = Figure(figsize=(1.7 + 2.7 * columns, 0.6 + 2.7 * rows), layout="compressed")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colors = ScalarMappable(BoundaryNorm([0, *levels], 256, extend="max"), "cividis")
    for axes in panels.flat[len(surfaces) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels.flat, surfaces.items(), strict=False):
        steps = found["steps"]
        # The first direction goes to the right: along the columns of what is drawn.
        losses = np.ma.masked_invalid(np.array(found["plane"]["loss"]).T)
        axes.set_facecolor("#CCCCCC")
        axes.contourf(steps, steps, losses, [0, *levels], norm=colors.norm, cmap=colors.cmap, extend="max")
        with warnings.catch_warnings():
            # A plane may reach none of the levels.
            warnings.filterwarnings("ignore", "No contour levels were found")
            axes.contour(steps, steps, losses, levels, colors="#000000", linewidths=0.5)
        axes.plot(0, 0, "+", color="#FFFFFF", markersize=7)
        # The basin is measured within it.
        axes.add_patch(Circle((0, 0), steps[-1], fill=False, color="#FFFFFF", linewidth=0.8, linestyle=":"))
        axes.set_aspect("equal")
        axes.set_xticks(np.linspace(steps[0], steps[-1], 5))
        axes.set_yticks(np.linspace(steps[0], steps[-1], 5))
        axes.set_title(f"{name}: basin {100 * found['basin']['plane']:.1f} %", fontsize=9, loc="left")
    figure.supxlabel("step along the first random direction", fontsize=9)
    figure.supylabel("step along the second", fontsize=9)
    figure.colorbar(colors, ax=panels, label="training loss", shrink=0.9, aspect=25)
    figure.savefig(path, dpi=150)


def landscape_between(
    first: str, segments: Mapping[str, Mapping[str, Any]], methods: Mapping[str, str], path: Path
) -> None:
    """Loss and accuracy along the straight lines from one run to others, which are at 0 and at 1."""
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    styles = _run_styles(methods)
    for axes, metric, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), strict=True):
        for name, found in segments.items():
            for split, dashes in (("train", "-"), ("test", "--")):
                values = unit * np.array(found[split][metric])
                label = f"{name}, {split}"
                color = styles[name]["color"]
                axes.plot(found["steps"], values, dashes, color=color, linewidth=1.5, label=label)
        for end in (0, 1):
            axes.axvline(end, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"t: {first} is at 0, the other run at 1")
        axes.grid(alpha=0.3)
        axes.set_ylabel("loss" if metric == "loss" else "accuracy, %")
    _log_if_wide(figure.axes[0], [found[split]["loss"] for found in segments.values() for split in ("train", "test")])
    _legend_below(figure)
    figure.savefig(path, dpi=150)


def _log_if_wide(axes: Any, losses: Sequence[Any]) -> None:
    """A logarithmic axis where the losses differ by more than a factor of 10: on less it would have hardly a tick."""
    values = np.concatenate([np.ravel(x) for x in losses])
    values = values[np.isfinite(values)]
    if values.size and values.max() > 10 * values.min():
        axes.set_yscale("log")


def _run_styles(methods: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Color and marker by name of a run: those of its method, where no other run has that method."""
    counts = Counter(methods.values())
    labels = {name: LABELS[method] if counts[method] == 1 else name for name, method in methods.items()}
    styles = _styles(list(labels.values()))
    return {name: styles[label] for name, label in labels.items()}
