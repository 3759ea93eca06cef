"""The sections on curvature: the Hessian, the size of the penalty's term, and the loss around and between runs."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import page, plots, saved, sections, tables


def hessian(made: Sequence[sections.Part], draw: sections.Plotter) -> list[Any]:
    """For each task, top Hessian eigenvalue and norm at the end and along training."""
    content = []
    for part in made:
        cells = {cell.name: [run.curvature for run in cell.runs if run.curvature] for cell in part.cells}
        cells = {name: found for name, found in cells.items() if found}
        if not cells:
            continue
        lines = []
        for name, found in cells.items():
            value, residual, norm, sem = (
                [record[field] for record in found]
                for field in ("eigenvalue", "eigenvalue_residual", "hessian_norm", "hessian_norm_sem")
            )
            star = "" if all(record["eigenvalue_converged"] for record in found) else "*"
            norms = tables.spread(norm, len(found), sections.SCIENTIFIC)
            eigenvalues = tables.spread(value, len(found), sections.SCIENTIFIC) + star
            errors = [f"{max(residual):.1e}", norms, f"{sum(sem) / len(sem):.2g}"]
            lines.append([name, str(len(found)), str(found[0]["images"]), eigenvalues, *errors])
        header = ["network", "n", "images", "top eigenvalue", "largest residual", "norm", "sem of a norm"]
        text = (
            f"Hessian of the mean training loss over so many images, at the end of training. {sections.SPREAD}"
            " The eigenvalue is the largest in magnitude; a star marks networks of which some run did not reach its"
            " relative residual."
            " The norm is that of Frobenius, estimated by random probes; sem is the mean standard error of one."
        )
        text += f" {sections.origin([cell for cell in part.cells if cell.name in cells])}"
        content += [page.Heading(part.title), page.Table(header, lines, text)]
        values = {name: [abs(record["eigenvalue"]) for record in found] for name, found in cells.items()}
        caption = f"{part.title}: top eigenvalue at the end; a mark is a run, the bar the mean."
        content.append(draw(plots.each_run, values, "|top Hessian eigenvalue|", caption=caption, log=True))
        content += _curvature_along_training(part, draw)
    return content


def _curvature_along_training(part: sections.Part, draw: sections.Plotter) -> list[page.Picture]:
    panels: dict[str, dict[str, list[Any]]] = {}
    for field, label in (("eigenvalue", "|top eigenvalue|"), ("hessian_norm", "Frobenius norm")):
        for cell in part.cells:
            curves = [[(epoch, abs(value)) for epoch, value in sections.curve(run, field)] for run in cell.runs]
            if min(map(len, curves)) > 1:
                panels.setdefault(label, {})[cell.name] = curves
    caption = f"{part.title}: curvature along training; mean, and range over seeds."
    return [draw(plots.along_epochs, panels, caption=caption, log=True)] if panels else []


def penalty(made: Sequence[sections.Part], draw: sections.Plotter) -> list[Any]:
    """For each task, the norm of what the penalty adds to a step over that of the gradient it is added to."""
    content = []
    for part in made:
        sizes = {cell.name: [_penalty_sizes(run) for run in cell.runs] for cell in part.cells}
        lines = []
        for name, seeds in sizes.items():
            values = [found for seed in seeds if (found := [x for _, x in seed if not math.isnan(x)])]
            if values:
                picks = (min, statistics.median, max, operator.itemgetter(-1))
                columns = [tables.spread([pick(v) for v in values], len(values), sections.SCIENTIFIC) for pick in picks]
                counts = sorted({len(v) for v in values})
                lines.append([name, str(len(values)), "-".join(map(str, counts[:1] + counts[1:][-1:])), *columns])
        if not lines:
            continue
        text = (
            "Norm of the penalty's term, gamma included, over the norm of the gradient it is added to, at the last step"
            " before each evaluation. Evaluations after a step without the penalty, or where it was zero, are left out,"
            f" and so are the runs that have no other. {sections.SPREAD}"
            f" {sections.origin([cell for cell in part.cells if cell.name in {line[0] for line in lines}])}"
        )
        header = ["network", "n", "evaluations", "least", "median", "most", "last"]
        content += [page.Heading(part.title), page.Table(header, lines, text)]
        curves = {line[0]: sizes[line[0]] for line in lines}
        if max(len(seed) for seeds in curves.values() for seed in seeds) > 1:
            caption = f"{part.title}: size of the penalty's term along training; mean, and range over seeds."
            panels = {"penalty term / gradient": curves}
            content.append(draw(plots.along_epochs, panels, caption=caption, log=True))
    return content


def _penalty_sizes(run: saved.Run) -> list[tuple[float, float]]:
    """(epoch, norm of the penalty's term over that of the perturbed gradient) of each evaluation; NaN without one."""
    return [
        (row["epoch"], row["penalty_grad_norm"] / row["perturbed_grad_norm"])
        if row.get("penalty_grad_norm") and row["perturbed_grad_norm"]
        else (row["epoch"], math.nan)
        for row in run.rows
    ]


def landscapes(folders: Sequence[Path], draw: sections.Plotter) -> list[Any]:
    """The pictures of each landscape, with the numbers of its record."""
    content = []
    for folder in folders:
        record = saved.read_json(folder / "landscape.json")
        lines = []
        for name, found in record.get("runs", {}).items():
            center, basin = found["center"], found["basin"]
            mean, std = (100 * basin["line"][x] for x in ("mean", "std"))
            figures = [
                f"{center['loss']:.4f}",
                f"{100 * center['accuracy']:.2f}",
                tables.cell(mean, std, (".1f", ".1f")),
            ]
            lines.append([name, *figures, f"{100 * basin['plane']:.1f}"])
        content.append(page.Heading(str(folder)))
        if lines:
            config = record["config"]
            text = (
                f"Mean training loss and accuracy in percent, over {_images(record)} images, at the weights of one run"
                " each. Basin: percent of the steps"
                f" up to {config['radius']:g} along {config['directions']} random filter-normalized lines (mean \u00b1"
                " standard deviation over the lines), and of the disk of that radius in the plane of two of them,"
                f" where the loss is less than {config['rise']:g} above that of the run."
            )
            text += f" Commit: {record['environment']['commit']}. Hardware: {sections.machine(record['environment'])}."
            header = ["run", "train loss", "train accuracy", "basin, line", "basin, plane"]
            content.append(page.Table(header, lines, text))
        joined = record.get("between", {}).get("to", {})
        if joined:
            lines = []
            for name, found in joined.items():
                barriers = [found["barriers"][split] for split in ("train", "test")]
                numbers = ((f"{part['loss']:.3f}", f"{100 * part['error']:.2f}") for part in barriers)
                lines.append([name, *(number for pair in numbers for number in pair)])
            text = (
                f"Barriers on the straight line from {record['between']['first']}: most by which loss, or error in"
                f" percent, rises above the line through the two runs, over {_images(record)} images of each split; one"
                " pair of runs a row, so without deviation."
            )
            content.append(page.Table(["to", "train loss", "train error", "test loss", "test error"], lines, text))
        content += [draw.copied(image, f"{folder}: {image.stem}") for image in sorted(folder.glob("*.png"))]
    return content


def _images(record: Mapping[str, Any]) -> str:
    """How many images the losses of a landscape are means over."""
    return " or ".join(f"{size:,}" for size in sorted(set(record["images"].values())))
