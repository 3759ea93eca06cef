"""The figures of comparisons and of curvature. Colours are those of a palette that colour-blind readers tell apart.

Those of the table of runs take its rows: a value of each run, with its network, and the styles of networks by name,
which are the same in every figure of a report; default those of the networks in this one.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from experiments.analysis import tables
from experiments.analysis.tables import Frame
from experiments.config import LABELS, METHODS
from experiments.storage import files

# Okabe and Ito, Color Universal Design, 2008; the two of NSO and MSAM, and those for what is not a method: Tol, Colour
# Schemes, SRON technical note, 2021, muted.
_LOOKS = {
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
COLORS = {method: color for method, (color, _) in _LOOKS.items()}
_OTHERS = ("#332288", "#999999", "#44AA99", "#DDCC77")
Style = dict[str, str]
Styles = Mapping[str, Style]


def styles_of(networks: Iterable[str]) -> dict[str, Style]:
    """Color, marker and line by name: a method keeps its own, what is not a method takes one that nothing else has."""
    networks = list(dict.fromkeys(networks))
    named = {LABELS[m]: {"color": color, "marker": mark, "linestyle": "-"} for m, (color, mark) in _LOOKS.items()}
    colors = [*_OTHERS, *(COLORS[method] for method in METHODS if LABELS[method] not in networks)]
    kinds = zip("P*Xh", ("-", "--", ":", "-."), strict=True)
    others = itertools.cycle([{"color": c, "marker": mark, "linestyle": line} for mark, line in kinds for c in colors])
    return {name: named.get(name) or next(others) for name in networks}


@contextlib.contextmanager
def _drawn(
    path: Path, width: float, height: float, panels: int = 1, columns: int = 1, *, grid: str = "both", **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure in inches and its panels, row by row, saved at the end; `grid`: along which axes, none where empty."""
    common: dict[Any, Any] = {"axes.titlelocation": "left", "axes.titlesize": 10, "errorbar.capsize": 2}
    common |= {"axes.grid": bool(grid), "axes.grid.axis": grid or "both", "grid.alpha": 0.3, "legend.frameon": False}
    with matplotlib.rc_context(common):
        figure = Figure(figsize=(width, height), layout=options.pop("layout", "constrained"))
        drawn = list(figure.subplots(-(-panels // columns), columns, squeeze=False, **options).flat)
        for axes in drawn[panels:]:
            axes.set_visible(False)
        yield figure, drawn[:panels]
        with files.atomic(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150)


def over_bits(panels: Mapping[str, Frame], path: Path, styles: Styles | None = None) -> None:
    """Accuracy against the bit width (`bits`) of the weights, mean and standard deviation; four panels in a row."""
    every: Frame = pd.concat(panels.values())
    networks, widths = (list(dict.fromkeys(every[name])) for name in ("network", "bits"))
    columns = min(4, len(panels))
    size = (7, 4.2) if len(panels) == 1 else (1.0 + 3.8 * columns, 0.6 + 3.0 * -(-len(panels) // columns))
    counts = {n for frame in panels.values() for n in frame.groupby(["network", "bits"]).size()}
    with _drawn(path, *size, len(panels), columns, sharey=True) as (figure, drawn):
        for axes, (title, frame) in zip(drawn, panels.items(), strict=True):
            _means(axes, frame.assign(bits=frame["bits"].map(widths.index)), "bits", networks, styles)
            axes.set_xticks(range(len(widths)), widths)
            axes.set(xlabel="bits of a weight after training", ylabel="accuracy, %", title=title)
        told = " or ".join(map(str, sorted(counts)))
        figure.suptitle(f"mean \u00b1 standard deviation over seeds, n = {told}", fontsize=9)
        _legend_below(figure)


def over_noise(frame: Frame, label: str, path: Path, *, styles: Styles | None = None) -> None:
    """Mean and standard deviation over seeds by network and rate of label `noise`."""
    with _drawn(path, 5.6, 3.6) as (figure, (axes,)):
        _means(axes, frame.assign(noise=100 * frame["noise"]), "noise", frame["network"].unique(), styles, 10)
        axes.set(xlabel="training labels altered, %", ylabel=label)
        _legend_below(figure)


def _means(axes: Any, frame: Frame, by: str, networks: Sequence[str], styles: Styles | None, unit: float = 1) -> None:
    """Mean and deviation of every network over x = `by`, set aside so that bars of networks that tie can be told apart.

    The points of a place are within 0.4 units in all.
    """
    found, styles = tables.spreads(frame, ("network", by)), styles or styles_of(networks)
    for i, name in enumerate(networks):
        points = found.loc[name].sort_index()
        x = points.index.to_numpy() + unit * min(0.06, 0.4 / len(networks)) * (i - (len(networks) - 1) / 2)
        axes.errorbar(x, points["mean"], points["error"], label=name, markersize=5, **styles[name])


def sensitivity(rows: Sequence[Mapping[str, Any]], correlation: Mapping[str, float], path: Path) -> None:
    """Measured against predicted increase of the loss, a mark for each layer quantized alone."""
    both = np.array([[row["by_trace"], row["increase"]] for row in rows])
    sizes = np.abs(both[both != 0])
    threshold, ends = sizes.min() if len(sizes) else 1.0, [min(0, both.min()), both.max()]
    with _drawn(path, 5.2, 4.4) as (_, (axes,)):
        axes.plot(*both.T, "o", color=COLORS["hero"], markersize=5)
        for row in sorted(rows, key=lambda row: -abs(row["increase"]))[:4]:
            where = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7, "color": "#555555"}
            axes.annotate(row["layer"].removesuffix("/kernel"), (row["by_trace"], row["increase"]), **where)
        axes.set_xscale("symlog", linthresh=threshold)
        axes.set_yscale("symlog", linthresh=threshold)
        axes.plot(ends, ends, color="#999999", linewidth=0.8, linestyle=":")
        title = f"Spearman {correlation['spearman']:.2f}, Pearson {correlation['pearson']:.2f}, {len(rows)} layers"
        xlabel = f"predicted by the layer's trace, {rows[0]['bits']} bits"
        axes.set(xlabel=xlabel, ylabel="measured increase of the loss", title=title)


def spectral_density(measured: Mapping[str, Any], path: Path) -> None:
    """Density of eigenvalues on a logarithmic axis, two standard errors around it, the top eigenvalues marked."""
    density = {name: np.array(value) for name, value in measured["density"].items()}
    mean, sem, bandwidth = density["density"], density["sem"], float(density["bandwidth"])
    # One eigenvalue in so many parameters would stand this high: below it the curve is the tails of its Gaussians.
    floor = 1 / (sum(layer["size"] for layer in measured["layer_traces"]) * bandwidth * np.sqrt(2 * np.pi))
    with _drawn(path, 7, 3.8) as (_, (axes,)):
        low = np.maximum(mean - 2 * sem, floor / 10)
        _band(axes, density["grid"], mean, low, mean + 2 * sem, {"color": COLORS["hero"]}, alpha=0.25)
        axes.set(yscale="log", ylim=(floor / 10, 3 * np.nanmax(mean)), ylabel="density")
        axes.axhline(floor, color="#999999", linewidth=0.8, linestyle=":")
        right = axes.get_yaxis_transform()
        axes.text(1.01, floor, "one\neigenvalue", transform=right, va="center", fontsize=8, color="#666666")
        for value, converged in zip(measured["eigenvalues"], measured["converged"], strict=True):
            axes.axvline(value, ymax=0.06, color="#000000" if converged else "#999999", linewidth=1)
        probes, steps = density["nodes"].shape
        title = f"{probes} probes of {steps} Lanczos steps, bandwidth {bandwidth:.2g}, band \u00b1 2 sem"
        axes.set(xlabel="Hessian eigenvalue (ticks: the largest in magnitude)", title=title)


def layer_traces(measured: Mapping[str, Any], path: Path) -> None:
    """Trace of every layer's block of the Hessian, with its standard error, in the order of the parameters."""
    rows = pd.DataFrame(measured["layer_traces"])
    with _drawn(path, 7, 1.2 + 0.2 * len(rows), grid="x") as (_, (axes,)):
        axes.barh(rows.index, rows["mean"], color=COLORS["sam"], height=0.7)
        axes.errorbar(rows["mean"], rows.index, xerr=rows["sem"], fmt="none", ecolor="#000000", linewidth=1)
        axes.set_yticks(rows.index, rows["layer"], fontsize=7 if len(rows) > 12 else 9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axvline(0, color="#000000", linewidth=0.8)
        axes.set_xlabel(f"trace \u00b1 standard error ({measured['trace']['probes']} probes)")


def curvature_along_training(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Top Hessian eigenvalue and norm along one run; the bars are residual and standard error."""
    rows = pd.DataFrame([row for row in history if "eigenvalue" in row])
    epoch, size, norm = rows["epoch"], rows["eigenvalue"].abs(), rows["hessian_norm"]
    of_norm, of_eigenvalue = styles_of([LABELS["sam"], LABELS["hero"]]).values()
    with _drawn(path, 7, 3.6) as (_, (axes,)):
        axes.errorbar(epoch, norm, rows["hessian_norm_sem"], label="Frobenius norm", **of_norm)
        axes.errorbar(epoch, size, size * rows["eigenvalue_residual"], label="|top eigenvalue|", **of_eigenvalue)
        title = "bars: residual of the eigenvalue, standard error of the norm"
        axes.set(xlabel="epoch", yscale="log", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()


def each_run(frame: Frame, label: str, path: Path, *, log: bool = False, styles: Styles | None = None) -> None:
    """A line for each network, a mark for each of its runs, a bar at their mean."""
    runs_of = {name: group.to_numpy() for name, group in frame.groupby("network", sort=False)["value"]}
    styles = styles or styles_of(runs_of)
    with _drawn(path, 5.6, max(2.8, 1.1 + 0.3 * len(runs_of)), grid="x") as (_, (axes,)):
        for i, (name, values) in enumerate(runs_of.items()):
            apart = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(values, i + apart, **styles[name] | {"linestyle": ""}, markersize=4.5, alpha=0.7)
            axes.vlines(float(np.mean(values)), i - 0.32, i + 0.32, color=styles[name]["color"], linewidth=2)
        axes.set_yticks(range(len(runs_of)), list(runs_of), fontsize=9)
        axes.set(ylim=(len(runs_of) - 0.5, -0.5), xscale="log" if log else "linear", xlabel=label)


def along_epochs(
    panels: Mapping[str, Frame], path: Path, *, log: Collection[str] = (), styles: Styles | None = None
) -> None:
    """Curves along training, a panel below the other: mean over seeds, the band is the range over seeds.

    `panels`: by label of the axis, values of each run by `epoch`; NaN is left out. `log`: the labels whose axis is
    logarithmic. Where one network was trained for more than twice the epochs of another that of epochs is logarithmic
    too, so that the short curves keep their width.
    """
    every: Frame = pd.concat(panels.values())
    ends = every.groupby("network")["epoch"].max()
    are_unlike = ends.max() > 2 * ends.min()
    styles = styles or styles_of(every["network"])
    with _drawn(path, 5.6, 0.8 + 2.5 * len(panels), len(panels)) as (figure, drawn):
        for axes, (label, frame) in zip(drawn, panels.items(), strict=True):
            found = frame.dropna(subset="value").groupby(["network", "epoch"], sort=False)["value"]
            for name, curve in found.agg(["mean", "min", "max"]).groupby("network", sort=False):
                curve = curve.droplevel("network").sort_index()
                style = styles[name] | ({} if len(curve) <= 12 else {"marker": ""})
                _band(axes, curve.index, curve["mean"], curve["min"], curve["max"], style, label=name, markersize=4)
            axes.set(yscale="log" if label in log else "linear", ylabel=label)
            if are_unlike:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(ScalarFormatter())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[-1].set_xlabel("epoch (logarithmic)" if are_unlike else "epoch")
        _legend_below(figure)


def heat_map(values: Mapping[tuple[Any, Any], float], labels: tuple[str, str, str], path: Path) -> None:
    """A number for each (row, column), on a color of its own; `labels` are those of rows, columns and numbers."""
    table = pd.Series(values).unstack()
    middle, (height, width) = (table.min().min() + table.max().max()) / 2, table.shape
    with _drawn(path, 1.6 + 0.7 * width, 1.1 + 0.45 * height, grid="") as (figure, (axes,)):
        image = axes.imshow(table, cmap="cividis", aspect="auto")
        for i, j in np.argwhere(np.isfinite(table.to_numpy())):
            value = table.iat[i, j]
            color = "#000000" if value > middle else "#FFFFFF"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_yticks(range(height), [f"{row:g}" for row in table.index])
        axes.set_xticks(range(width), [f"{column:g}" for column in table.columns])
        axes.set(ylabel=labels[0], xlabel=labels[1])
        figure.colorbar(image, label=labels[2])


def _band(axes: Any, x: Any, mean: Any, low: Any, high: Any, style: Style, alpha: float = 0.12, **options: Any) -> None:
    """A line with a band around it."""
    axes.plot(x, mean, **style, linewidth=1.5, **options)
    axes.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, below them."""
    drawn = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, drawn))
    columns = 1 if longest > 36 else 2 if longest > 16 else 4
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(drawn) // columns))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def landscape_lines(surfaces: Mapping[str, Mapping[str, Any]], methods: Mapping[str, str], path: Path) -> None:
    """Loss along random lines: mean over the directions of each run, the band is their standard deviation."""
    styles = _run_styles(methods)
    with _drawn(path, 5.6, 4.2) as (figure, (axes,)):
        for name, found in surfaces.items():
            steps, lines = found["steps"], np.array(found["lines"])
            # Infinite losses have no deviation.
            with np.errstate(invalid="ignore"):
                mean, deviation = lines.mean(0), lines.std(0, ddof=1)
            # On a logarithmic axis a band must not reach 0.
            low, mark = np.maximum(mean - deviation, lines.min(0)), {"markevery": len(steps) - 1, "markersize": 5}
            _band(axes, steps, mean, low, mean + deviation, styles[name], label=name, **mark)
        _log_if_wide(axes, [found["lines"] for found in surfaces.values()])
        number = len(next(iter(surfaces.values()))["lines"])
        title = f"mean \u00b1 standard deviation over {number} random directions"
        axes.set(xlabel="step, in units of the norm of each filter", ylabel="training loss", title=title)
        _legend_below(figure)


def landscape_planes(surfaces: Mapping[str, Mapping[str, Any]], levels: Sequence[float], path: Path) -> None:
    """Contours of the loss at the same levels on the same plane around each run; grey where it is not finite."""
    columns = min(4, len(surfaces))
    size = 1.7 + 2.7 * columns, 0.6 + 2.7 * -(-len(surfaces) // columns)
    colors = ScalarMappable(BoundaryNorm([0, *levels], 256, extend="max"), "cividis")
    shared = {"sharex": True, "sharey": True, "layout": "compressed"}
    with _drawn(path, *size, len(surfaces), columns, grid="", **shared) as (figure, panels):
        for axes, (name, found) in zip(panels, surfaces.items(), strict=True):
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
            ticks = np.linspace(steps[0], steps[-1], 5)
            axes.set(aspect="equal", xticks=ticks, yticks=ticks)
            axes.set_title(f"{name}: basin {100 * found['basin']['plane']:.1f} %", fontsize=9)
        figure.supxlabel("step along the first random direction", fontsize=9)
        figure.supylabel("step along the second", fontsize=9)
        figure.colorbar(colors, ax=figure.axes, label="training loss", shrink=0.9, aspect=25)


def landscape_between(
    first: str, segments: Mapping[str, Mapping[str, Any]], methods: Mapping[str, str], path: Path
) -> None:
    """Loss and accuracy along the straight lines from one run to others, which are at 0 and at 1."""
    styles = _run_styles(methods)
    with _drawn(path, 9, 4.0, 2, 2) as (figure, panels):
        shown = (("loss", 1, "loss"), ("accuracy", 100, "accuracy, %"))
        for axes, (metric, unit, ylabel) in zip(panels, shown, strict=True):
            for (name, found), (split, dashes) in itertools.product(segments.items(), (("train", "-"), ("test", "--"))):
                style = {"color": styles[name]["color"], "linestyle": dashes, "label": f"{name}, {split}"}
                axes.plot(found["steps"], unit * np.array(found[split][metric]), linewidth=1.5, **style)
            for end in (0, 1):
                axes.axvline(end, color="#999999", linewidth=0.8, linestyle=":")
            axes.set(xlabel=f"t: {first} is at 0, the other run at 1", ylabel=ylabel)
        _log_if_wide(panels[0], [found[split]["loss"] for found in segments.values() for split in ("train", "test")])
        _legend_below(figure)


def _log_if_wide(axes: Any, losses: Sequence[Any]) -> None:
    """A logarithmic axis where the losses differ by more than a factor of 10: on less it would have hardly a tick."""
    values = np.concatenate([np.ravel(x) for x in losses])
    values = values[np.isfinite(values)]
    if values.size and values.max() > 10 * values.min():
        axes.set_yscale("log")


def _run_styles(methods: Mapping[str, str]) -> dict[str, Style]:
    """Those of runs by name: those of their method, where no other run has that method."""
    counts = Counter(methods.values())
    labels = {name: LABELS[method] if counts[method] == 1 else name for name, method in methods.items()}
    styles = styles_of(labels.values())
    return {name: styles[label] for name, label in labels.items()}
