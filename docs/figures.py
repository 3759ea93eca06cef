"""The figures of the pages, each drawn from a table: `python docs/figures.py`.

The tests bind the tables to their records, and a figure keeps the table that it was drawn from.
"""

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
# The cells of a table, its header first.
Table = list[list[str]]
# Okabe and Ito, Color Universal Design, 2008: by gradients per step, and by network.
PRICES = {"1": ("#000000", "o"), "2": ("#0072B2", "s"), "3": ("#009E73", "^"), "4": ("#D55E00", "v")}
NETWORKS = (("#000000", "o"), ("#0072B2", "s"), ("#009E73", "D"), ("#D55E00", "^"), ("#CC79A7", "v"))
LINES = {"nearest": ":", "optimised": "-"}


def shown(name: str) -> Table:
    """The table that a figure is drawn from."""
    _, page, header = DRAWN[name]
    lines = [*(ROOT / page).read_text().splitlines(), ""]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return [cells[0], *cells[2:]]


def lines(looks: dict[str, tuple[str, str]]) -> list[Line2D]:
    """What a legend shows of each name."""
    return [Line2D([], [], color=color, marker=mark, label=name) for name, (color, mark) in looks.items()]


def legend(figure: Figure, told: list[Line2D], title: str | None = None) -> None:
    """Right of all panels."""
    figure.legend(handles=told, title=title, loc="outside right center", frameon=False)


def choices(table: Table) -> Figure:
    """A row of points for each method, a panel for each question; a line where SGD is."""
    header, *rows = table
    panels = [i for i, name in enumerate(header) if name not in ("method", "gradients", "n", "chosen epoch")]
    figure = Figure(figsize=(9.6, 0.9 + 0.27 * len(rows)), layout="constrained")
    drawn = figure.subplots(1, len(panels), sharey=True)
    for axes, column in zip(drawn, panels, strict=True):
        for place, row in enumerate(rows):
            mean, deviation = map(float, row[column].split(" ± "))
            color, marker = PRICES[row[1]]
            axes.errorbar(mean, place, xerr=deviation, color=color, marker=marker, markersize=5)
        axes.axvline(float(rows[0][column].split(" ± ")[0]), color="0.6", linewidth=0.8, zorder=0)
        axes.set_title(header[column])
    drawn[0].set_yticks(range(len(rows)), [row[0] for row in rows])
    drawn[0].invert_yaxis()
    figure.supxlabel("accuracy on test images in percent, mean ± standard deviation over seeds", fontsize=9)
    points = [Line2D([], [], color=color, marker=mark, label=n, linestyle="") for n, (color, mark) in PRICES.items()]
    legend(figure, points, "gradients\nper step")
    return figure


def cost(table: Table) -> Figure:
    """Bars of kernels and memory for each method on one device, in those of SGD."""
    header, *rows = table
    rows = [row for row in rows if row[0] == "one device"]
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    drawn = figure.subplots(1, 2, sharey=True)
    for axes, title, of in zip(drawn, ("kernels", "temporary memory"), ("kernels", "MiB"), strict=True):
        column = header.index("x SGD", header.index(of))
        bars = axes.barh(range(len(rows)), [float(row[column]) for row in rows], color=PRICES["2"][0], height=0.6)
        axes.bar_label(bars, [row[column] for row in rows], padding=3, fontsize=8)
        axes.set(title=title, xlabel="times that of SGD", xlim=(0, 3.5))
    drawn[0].set_yticks(range(len(rows)), [row[1].upper().replace("_", " ") for row in rows])
    drawn[0].invert_yaxis()
    return figure


def deployment(table: Table) -> Figure:
    """Accuracy against the size of the file, a line for each network, a panel for each data set."""
    header, *rows = table
    size, accuracy = header.index("KiB"), header.index("accuracy")
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row[header.index("layers")] == "floating point":
            data, _, network = row[0].partition("-")
            point = (float(row[size].replace(",", "")), float(row[accuracy]))
            points.setdefault((data, network), []).append(point)
    looks = dict(zip(dict.fromkeys(network for _, network in points), NETWORKS, strict=True))
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = {"digits": "digits", "cifar10": "CIFAR-10, a part of it"}
    for axes, (data, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for network, (color, marker) in looks.items():
            if line := points.get((data, network)):
                axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=5)
        axes.set(xscale="log", xlabel="size of the file in KiB", title=title, ylim=(0, 102))
    figure.axes[0].set_ylabel("accuracy in percent")
    legend(figure, lines(looks))
    return figure


def language_model(table: Table) -> Figure:
    """Loss against the bit width for each method, a panel for each grid; solid where rounding is optimised."""
    header, *rows = table
    widths = header[header.index("full") :]
    looks = dict(zip(dict.fromkeys(row[2] for row in rows), NETWORKS, strict=False))
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    grids = list(dict.fromkeys(row[0] for row in rows))
    for axes, grid in zip(figure.subplots(1, len(grids), sharey=True), grids, strict=True):
        for _, how, method, _, *cells in [row for row in rows if row[0] == grid]:
            mean, deviation = zip(*[map(float, cell.split(" ± ")) for cell in cells], strict=True)
            shift = 0.06 * (list(looks).index(method) - (len(looks) - 1) / 2)
            color, marker = looks[method]
            line = {"color": color, "marker": marker, "markersize": 4, "linestyle": LINES[how]}
            axes.errorbar([i + shift for i in range(len(widths))], mean, yerr=deviation, **line)
        axes.set_xticks(range(len(widths)), widths)
        axes.set(title=grid)
    figure.axes[0].set_ylabel("nats per character,\nmean ± standard deviation")
    rounding = [Line2D([], [], color="0.4", linestyle=line, label=name) for name, line in LINES.items()]
    legend(figure, lines(looks) + rounding)
    return figure


# By name: what draws it, the page of its table, and the first columns of that.
DRAWN = {
    "choices-digits": (choices, "docs/which-method.md", "method | gradients | n | clean labels | 2 bit"),
    "choices-cifar10": (choices, "docs/which-method.md", "method | gradients | n | clean labels | 40 % altered"),
    "cost": (cost, "docs/cost.md", "layout | method | kernels"),
    "language-model": (language_model, "docs/language-model.md", "grid | rounding | method"),
    "deployment": (deployment, "results/deployment/README.md", "network | layers | bits"),
}
STYLE = {"axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True}
STYLE |= {"grid.alpha": 0.3, "errorbar.capsize": 2}


def main() -> None:
    for name, (draw, _, _) in DRAWN.items():
        table = shown(name)
        with matplotlib.rc_context(STYLE):
            figure = draw(table)
        figure.savefig(FIGURES / f"{name}.png", dpi=150, metadata={"Description": json.dumps(table)})


if __name__ == "__main__":
    main()
