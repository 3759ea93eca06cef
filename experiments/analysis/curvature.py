"""The sections on curvature: the Hessian, the size of the penalty's term, and the loss around and between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import page, plots, sections, tables
from experiments.analysis.tables import Frame
from experiments.analysis.tidy import machine, read_record
from experiments.measure.landscape import LandscapeRecord
from experiments.storage.records import numbers

# Columns beside the means: label, and text of the values of a network.
BESIDES = {
    "curvature_images": ("images", lambda values: f"{values.iloc[0]:.0f}"),
    "eigenvalue_residual": ("largest residual", lambda values: f"{max(values):.1e}"),
    "hessian_norm_sem": ("sem of a norm", lambda values: f"{sum(values) / len(values):.2g}"),
}


def hessian(data: Frame, draw: sections.Plotter) -> sections.Parts:
    """Top Hessian eigenvalue and norm at the end and along training."""
    labels = {"eigenvalue": "top eigenvalue", "hessian_norm": "norm"}
    for title, _, part in sections.parts(data):
        end = sections.at_end(part, labels)
        if end.empty:
            continue
        made = tables.starred(tables.means(end), "top eigenvalue", part)
        for metric, (label, tell) in BESIDES.items():
            for name, values in sections.at_end(part, {metric: label}).groupby("network")["value"]:
                made[name, label] = tell(values)
        shown = ["n", "images", "top eigenvalue", "largest residual", "norm", "sem of a norm"]
        text = (
            f"Hessian of the mean training loss over so many images, at the end of training. {sections.SPREAD}"
            " The eigenvalue is the largest in magnitude; a star marks networks of which some run did not reach its"
            " relative residual. The norm is that of Frobenius, estimated by random probes; sem is the mean standard"
            " error of one."
        )
        yield page.Heading(title)
        yield sections.listed(made, shown, text, sections.of(part, end))
        in_size = part.assign(value=part["value"].abs())
        sizes = sections.at_end(in_size, {"eigenvalue": ""})
        caption = (
            f"Further left is flatter: {sections.extreme(sizes, '', '.3g', least=True)}. {title}: top eigenvalue at the"
            " end; a mark is a run, the bar the mean."
        )
        yield draw.of_networks(plots.each_run, sizes, "|top Hessian eigenvalue|", caption=caption, log=True)
        curves = {"|top eigenvalue|": "eigenvalue", "Frobenius norm": "hessian_norm"}
        panels = {label: sections.along(in_size, metric, least=2) for label, metric in curves.items()}
        caption = f"Lower is flatter: {sections.ALONG}. {title}: curvature along training."
        yield from draw.along(panels, caption, log=True)


def penalty(data: Frame, draw: sections.Plotter) -> sections.Parts:
    """The norm of what the penalty adds to a step over that of the gradient it is added to."""
    for title, _, part in sections.parts(data):
        there = part[part["metric"] == "penalty_share"].dropna(subset="value")
        if there.empty:
            continue
        of_runs = there.groupby(["network", "run"], sort=False)["value"]
        found = of_runs.agg(least="min", median="median", most="max", last="last")
        made = tables.means(found.melt(var_name="label", ignore_index=False).reset_index())
        for name, number in of_runs.size().groupby("network"):
            made[name, "evaluations"] = "-".join(map(str, sorted({number.min(), number.max()})))
        text = (
            "Norm of the penalty's term, gamma included, over the norm of the gradient it is added to, at the last step"
            " before each evaluation. Evaluations after a step without the penalty, or where it was zero, are left out,"
            f" and so are the runs that have no other. {sections.SPREAD}"
        )
        yield page.Heading(title)
        yield sections.listed(made, ["n", "evaluations", *found], text, sections.of(part, there))
        if sections.is_curve(there):
            last = sections.extreme(sections.last_of(there), "", ".3g")
            caption = (
                f"At 1 the penalty is as large as the gradient: {sections.ALONG}, and of the last values {last}."
                f" {title}: size of the penalty's term along training."
            )
            yield from draw.along({"penalty term / gradient": there}, caption, log=True)


# What the pictures of a landscape show.
PICTURES = {
    "lines": "Lower and flatter around 0 is a wider basin: the mean loss along random lines through a run, the band the"
    " deviation.",
    "plane": "A larger dark area is a wider basin: the color is the loss on a plane around each run, at the cross.",
    "between": "A hump between 0 and 1 is a barrier: loss and accuracy on the straight line between two runs.",
}


def landscapes(folders: Sequence[Path], draw: sections.Plotter) -> sections.Parts:
    """The pictures of each landscape, with the numbers of its record."""
    for folder in folders:
        record = read_record(folder / "landscape.json", LandscapeRecord)
        images = " or ".join(f"{size:,}" for size in sorted(set(record.get("images", {}).values())))
        yield page.Heading(str(folder))
        surfaces, between = record.get("runs", {}), record.get("between", {})
        if surfaces:
            config, origin = record["config"], record["environment"]
            text = (
                f"Mean training loss and accuracy in percent, over {images} images, at the weights of one run each."
                f" Basin: percent of the steps up to {config['radius']:g} along {config['directions']} random"
                " filter-normalized lines (mean \u00b1 standard deviation over the lines), and of the disk of that"
                f" radius in the plane of two of them, where the loss is less than {config['rise']:g} above that of the"
                f" run. Commit: {origin.get('commit', 'unknown')}. Hardware: {machine(origin)}."
            )
            yield page.Table(*basins(surfaces), text)
        if between.get("to"):
            text = (
                f"Barriers on the straight line from {between['first']}: most by which loss, or error in"
                f" percent, rises above the line through the two runs, over {images} images of each split; one"
                " pair of runs a row, so without deviation."
            )
            yield page.Table(*barriers(between["to"]), text)
        for image in filter(Path.is_file, sorted(folder.glob("*.png"))):
            yield draw.copied(image, f"{PICTURES.get(image.stem, '')} {folder}: {image.stem}".strip())


def basins(surfaces: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the loss and the basin of each run of a landscape."""
    lines = []
    for name, found in surfaces.items():
        center, basin = numbers(found["center"]), found["basin"]
        line = tables.cell(100 * basin["line"]["mean"], 100 * basin["line"]["std"], (".1f", ".1f"))
        at_center = f"{center['loss']:.4f}", f"{100 * center['accuracy']:.2f}"
        lines.append([name, *at_center, line, f"{100 * basin['plane']:.1f}"])
    return ["run", "train loss", "train accuracy", "basin, line", "basin, plane"], lines


def barriers(segments: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the barriers to each run on the straight line from the first."""
    lines = []
    for name, found in segments.items():
        train, test = (numbers(found["barriers"][split]) for split in ("train", "test"))
        errors = f"{100 * train['error']:.2f}", f"{100 * test['error']:.2f}"
        lines.append([name, f"{train['loss']:.3f}", errors[0], f"{test['loss']:.3f}", errors[1]])
    return ["to", "train loss", "train error", "test loss", "test error"], lines
