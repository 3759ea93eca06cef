"""Reports saved runs: `python -m experiments.report runs`.

Finds every run folder below the folders it is given, and leaves report.html, one file that needs nothing else, and
report.md with the same tables beside the plots. A mean has its n and, over two runs or more, its standard deviation.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from experiments import cli
from experiments.analysis import cost, curvature, deployment, page, sections, summary, tables, tidy
from experiments.analysis.tables import Frame
from experiments.storage import files

# Those of `main`, and what an end of the process left unfinished of them.
OURS = re.compile(rf"(report\.(html|md)|plot-[\w.-]+\.(png|svg))({files.UNFINISHED})?")


def what_was_run(runs: Frame) -> sections.Parts:
    """How many runs, by status; those that are not done, with their messages."""
    counts = sorted(Counter(runs["status"]).items(), key=lambda pair: (-pair[1], pair[0]))
    yield f"{len(runs)} runs: {', '.join(f'{count} {status}' for status, count in counts)}."
    left = runs[runs["status"] != "done"]
    if len(left):
        yield "The following runs are not done and are left out of every number below."
        lines = [[str(run.path), run.status, run.message or tables.NOTHING] for run in left.itertuples()]
        yield page.Table(["run", "status", "message"], lines, left=3)


def where_from(found: tidy.Found) -> sections.Parts:
    """Commits, hardware, versions, settings and commands."""
    runs = found.runs
    kinds = Counter(zip(runs["commit"], runs["hardware"], runs["versions"], strict=True))
    lines = [[*kind, str(number)] for kind, number in kinds.most_common()]
    yield page.Table(["commit", "hardware", "versions", "runs"], lines, left=3)
    rows = found.table.groupby(["section", "title", "split", "network"], sort=False)["run"].agg(["first", "nunique"])
    if len(rows):
        settings: Frame = pd.DataFrame(list(runs.loc[rows["first"], "network"]), dtype=object)
        settings = settings.drop(columns=["seed", "method", *tidy.TASK])
        is_varied = settings.nunique(dropna=False) > 1
        same = ", ".join(f"{name} {value}" for name, value in settings.loc[0, ~is_varied].items())
        own = settings.loc[:, is_varied].map(lambda value: tables.NOTHING if value is None else str(value))
        lines = [
            [title, name, str(n), *texts]
            for (_, title, _, name), n, texts in zip(rows.index, rows["nunique"], own.to_numpy(), strict=True)
        ]
        yield page.Heading("Settings of every row")
        yield page.Table(["task", "network", "n", *own], lines, f"In all: {same}.", left=2)
    lines = [[str(run.path), run.status, run.commit, run.command] for run in runs.itertuples()]
    yield page.Table(["run", "status", "commit", "command"], lines, "", 4, folded="Every run and its command")


def claim(out: Path) -> None:
    """Makes the folder of a report, or empties that of an earlier one; raises FileExistsError where there is more."""
    with files.on_disk(out):
        files.refuse_links(out)
        there = list(out.iterdir()) if out.is_dir() else []
        is_other = any(not (OURS.fullmatch(file.name) and file.is_file()) for file in there)
        if is_other or (out.exists() and not out.is_dir()):
            raise FileExistsError(
                f"`out` must be a new or empty folder, or that of a report; {out} holds something else."
            )
        for file in there:
            file.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)


def main(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None, against: tuple[str, ...] = ()
) -> None:
    """Reports saved runs: cost, accuracy, noise, low bits, curvature, penalty, ablations, searches, where all is from.

    Args:
        folders: Folders to look below for runs, landscape* folders and search.json files.
        out: Folder for report.html, report.md and the plots: new, empty, or of an earlier report, which is replaced;
            default report in the first of `folders`.
        against: Networks, by their names in the report, whose differences to all others are shown.
    """
    found = tidy.read(folders)
    out = out or folders[0] / "report"
    data, runs = found.table, found.runs
    tasks, of_settings, at_equal_cost = (data[data["section"] == name] for name in ("main", "ablations", "cost"))
    every = data[data["section"] != "cost"]
    compared = list(summary.differences(tasks, against))  # refused before anything is written
    claim(out)
    draw = sections.Plotter(out, data["network"])
    written = {
        "What was run": what_was_run(runs),
        "Summary": summary.summary(tasks),
        "Differences": compared,
        "Accuracy": sections.accuracy(tasks[tasks["noise"] == 0], draw),
        "Label noise": sections.label_noise(tasks, draw),
        "Quantization": sections.quantization(every, draw),
        "Deployment": deployment.section(found.exports),
        "Curvature": curvature.hessian(every, draw),
        "Size of the penalty": curvature.penalty(every, draw),
        "Landscapes": curvature.landscapes(found.landscapes, draw),
        "Cost": cost.cost(tasks, at_equal_cost),
        "Ablations": sections.accuracy(of_settings, draw),
        "Search": sections.search(found.searches, draw),
        "Where every number comes from": where_from(found),
    }
    shown = [page.Section(title, list(parts)) for title, parts in written.items()]
    content = [section for section in shown if section.parts]
    done = (runs["status"] == "done").sum()
    counted = f"{done} finished runs" if done != 1 else "1 finished run"
    title, introduction = "Report of training runs", f"{counted} below {', '.join(map(str, folders))}."
    files.write(out / "report.md", page.to_markdown(title, introduction, content))
    files.write(out / "report.html", page.to_html(title, introduction, content, out))
    cli.console.print(f"{introduction} The report is {out / 'report.html'}.")


if __name__ == "__main__":
    cli.run(main)
