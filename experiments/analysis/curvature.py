"""The sections on curvature: the Hessian, the size of the penalty's term, and the loss around and between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import page, plots, sections, tables
from experiments.analysis.table import machine, read_json
from experiments.analysis.tables import Frame


def hessian(data: Frame, draw: sections.Plotter) -> list[Any]:
    """For each task, top Hessian eigenvalue and norm at the end and along training."""
    content = []
    labels = {"eigenvalue": "top eigenvalue", "hessian_norm": "norm"}
    formats = dict.fromkeys(labels.values(), tables.SCIENTIFIC)
    for title, _, part in sections.parts(data):
        end = sections.at_end(part, labels)
        if end.empty:
            continue
        made = tables.means(end, formats=formats)
        made = tables.starred(made, "top eigenvalue", part)
        others = {"curvature_images": "images", "eigenvalue_residual": "residual", "hessian_norm_sem": "sem"}
        for name, rows in sections.at_end(part, others).groupby("network"):
            images, residual, sem = (rows["value"][rows["label"] == label] for label in others.values())
            told = {"images": f"{images.iloc[0]:.0f}", "largest residual": f"{max(residual):.1e}"}
            made |= {(name, label): text for label, text in told.items()}
            made[name, "sem of a norm"] = f"{sum(sem) / len(sem):.2g}"
        shown = ["n", "images", "top eigenvalue", "largest residual", "norm", "sem of a norm"]
        text = (
            f"Hessian of the mean training loss over so many images, at the end of training. {sections.SPREAD}"
            " The eigenvalue is the largest in magnitude; a star marks networks of which some run did not reach its"
            " relative residual."
            " The norm is that of Frobenius, estimated by random probes; sem is the mean standard error of one."
        )
        content += [page.Heading(title), sections.listed(made, shown, text, sections.of(part, end))]
        sizes = end[end["label"] == "top eigenvalue"]
        sizes = sizes.assign(value=sizes["value"].abs())
        caption = (
            f"Further left is flatter: {sections.extreme(sizes, '', '.3g', least=True)}. {title}: top eigenvalue at the"
            " end; a mark is a run, the bar the mean."
        )
        where = "|top Hessian eigenvalue|"
        content.append(draw.of_networks(plots.each_run, sizes, where, caption=caption, log=True))
        content += _along_training(part, title, draw)
    return content


def _along_training(part: Frame, title: str, draw: sections.Plotter) -> list[page.Picture]:
    curves = {"|top eigenvalue|": "eigenvalue", "Frobenius norm": "hessian_norm"}
    panels = {label: sections.along(part, metric, least=2) for label, metric in curves.items()}
    panels = {label: rows.assign(value=rows["value"].abs()) for label, rows in panels.items() if len(rows)}
    caption = f"Lower is flatter: {sections.ALONG}. {title}: curvature along training."
    return [draw.of_networks(plots.along_epochs, panels, caption=caption, log=panels)] if panels else []


def penalty(data: Frame, draw: sections.Plotter) -> list[Any]:
    """For each task, the norm of what the penalty adds to a step over that of the gradient it is added to."""
    content = []
    for title, _, part in sections.parts(data):
        sizes = part[part["metric"] == "penalty_share"]
        there = sizes.dropna(subset="value")
        if there.empty:
            continue
        by_run = there.groupby(["network", "run"], sort=False)["value"].agg(["min", "median", "max", "last", "size"])
        picks = {"min": "least", "median": "median", "max": "most", "last": "last"}
        found = by_run.melt(value_vars=list(picks), var_name="pick", ignore_index=False).reset_index()
        formats = dict.fromkeys(picks.values(), tables.SCIENTIFIC)
        made = tables.means(found.assign(label=found["pick"].map(picks)), formats=formats)
        for name, number in by_run["size"].groupby("network"):
            made[name, "evaluations"] = "-".join(map(str, sorted({number.min(), number.max()})))
        text = (
            "Norm of the penalty's term, gamma included, over the norm of the gradient it is added to, at the last step"
            " before each evaluation. Evaluations after a step without the penalty, or where it was zero, are left out,"
            f" and so are the runs that have no other. {sections.SPREAD}"
        )
        shown = ["n", "evaluations", *formats]
        content += [page.Heading(title), sections.listed(made, shown, text, sections.of(part, there))]
        if sections.is_curve(sizes):
            last = sections.extreme(sections.last_of(there), "", ".3g")
            caption = (
                f"At 1 the penalty is as large as the gradient: {sections.ALONG}, and of the last values {last}."
                f" {title}: size of the penalty's term along training."
            )
            where = "penalty term / gradient"
            content.append(draw.of_networks(plots.along_epochs, {where: there}, caption=caption, log=[where]))
    return content


# What the pictures of a landscape show.
PICTURES = {
    "lines": "Lower and flatter around 0 is a wider basin: the mean loss along random lines through a run, the band the"
    " deviation.",
    "plane": "A larger dark area is a wider basin: the color is the loss on a plane around each run, at the cross.",
    "between": "A hump between 0 and 1 is a barrier: loss and accuracy on the straight line between two runs.",
}


def landscapes(folders: Sequence[Path], draw: sections.Plotter) -> list[Any]:
    """The pictures of each landscape, with the numbers of its record."""
    content = []
    for folder in folders:
        record = read_json(folder / "landscape.json")
        images = " or ".join(f"{size:,}" for size in sorted(set(record.get("images", {}).values())))
        content.append(page.Heading(str(folder)))
        lines = [[name, *_basin(**found)] for name, found in record.get("runs", {}).items()]
        if lines:
            config = record["config"]
            text = (
                f"Mean training loss and accuracy in percent, over {images} images, at the weights of one run"
                " each. Basin: percent of the steps"
                f" up to {config['radius']:g} along {config['directions']} random filter-normalized lines (mean \u00b1"
                " standard deviation over the lines), and of the disk of that radius in the plane of two of them,"
                f" where the loss is less than {config['rise']:g} above that of the run."
                f" Commit: {record['environment']['commit']}. Hardware: {machine(record['environment'])}."
            )
            header = ["run", "train loss", "train accuracy", "basin, line", "basin, plane"]
            content.append(page.Table(header, lines, text))
        joined = record.get("between", {}).get("to", {})
        if joined:
            lines = []
            for name, found in joined.items():
                barriers = (found["barriers"][split] for split in ("train", "test"))
                numbers = ((f"{part['loss']:.3f}", f"{100 * part['error']:.2f}") for part in barriers)
                lines.append([name, *(number for pair in numbers for number in pair)])
            text = (
                f"Barriers on the straight line from {record['between']['first']}: most by which loss, or error in"
                f" percent, rises above the line through the two runs, over {images} images of each split; one"
                " pair of runs a row, so without deviation."
            )
            content.append(page.Table(["to", "train loss", "train error", "test loss", "test error"], lines, text))
        for image in sorted(folder.glob("*.png")):
            content.append(draw.copied(image, f"{PICTURES.get(image.stem, '')} {folder}: {image.stem}".strip()))
    return content


def _basin(center: Mapping[str, float], basin: Mapping[str, Any], **_: Any) -> list[str]:
    line = tables.cell(100 * basin["line"]["mean"], 100 * basin["line"]["std"], (".1f", ".1f"))
    return [f"{center['loss']:.4f}", f"{100 * center['accuracy']:.2f}", line, f"{100 * basin['plane']:.1f}"]
