"""The figures of comparisons and of curvature. Colours are those of a palette that colour-blind readers tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import runs
from experiments.config import LABELS, METHODS

if TYPE_CHECKING:
    from experiments.compare import Measured, Row

# Okabe and Ito, Color Universal Design, 2008.
COLORS = dict(zip(METHODS, ("#000000", "#56B4E9", "#0072B2", "#009E73", "#D55E00"), strict=True))
MARKERS = dict(zip(METHODS, ("o", "s", "D", "^", "v"), strict=True))


def accuracy_over_bits(rows: Sequence[Row], spec: str, path: Path) -> None:
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
    # A method keeps its colour and marker; what is not a method takes a pair that nothing else here has.
    styles = {LABELS[method]: (COLORS[method], MARKERS[method]) for method in METHODS}
    colors = ("#CC79A7", "#999999", "#E69F00", *COLORS.values())
    pairs = itertools.cycle((color, marker) for marker in "P*Xh" for color in colors)
    styles |= {name: next(pairs) for name in networks if name not in styles}
    for axes in panels.flat:
        axes.set_visible(False)
    for (i, spec), (j, step) in itertools.product(enumerate(specs), enumerate(steps)):
        axes = panels[i * rows + j // columns, j % columns]
        axes.set_visible(True)
        drawn = [
            (name, lines[spec, step, name], {"color": styles[name][0], "marker": styles[name][1]}) for name in networks
        ]
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
        # Set a little apart, so that the bars of methods that tie can be told from one another.
        x = np.arange(len(names)) + 0.06 * (i - (len(lines) - 1) / 2)
        axes.errorbar(x, mean, deviation, label=label, markersize=5, capsize=2, **style)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)


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


def eigenvalues(results: Sequence[Measured], path: Path) -> None:
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
