"""The figures of a comparison. Colours are those of a palette that colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    for i, row in enumerate(rows):
        mean, deviation = np.array(list(row.accuracy.values())).T
        # Set a little apart, so that the bars of methods that tie can be told from one another.
        x = np.arange(len(names)) + 0.06 * (i - (len(rows) - 1) / 2)
        style = {"color": COLORS[row.method], "marker": MARKERS[row.method], "markersize": 5, "capsize": 2}
        axes.errorbar(x, mean, deviation, label=LABELS[row.method], **style)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"bits of a weight after training ({spec})")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"mean \u00b1 standard deviation, n = {rows[0].n}", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
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
