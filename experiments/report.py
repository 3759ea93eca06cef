"""Reports saved runs: `python -m experiments.report runs`.

Finds every run folder below the folders it is given, and leaves report.html, one file that needs nothing else, and
report.md with the same tables beside the plots. A mean has its n and, over two runs or more, its standard deviation.
In `experiments.analysis`:

table       every measured number of every run, read back and checked
tables      means, spreads and paired differences of its rows, and tables of them
sections    tables and plots of accuracy, label noise, low bits and searches
summary     those of every claim, a row a network, and their differences to chosen networks
cost        gradients and time of every network, and accuracy at equal cost
curvature   the Hessian, the size of the penalty and landscapes
page        a page of sections as HTML and as Markdown
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from experiments import cli
from experiments.analysis import cost, curvature, page, sections, summary, table, tables
from experiments.analysis.tables import Frame

OURS = re.compile(r"report\.(html|md)|plot-[\w.-]+\.(png|svg)")


def what_was_run(runs: Frame) -> page.Section:
    """How many runs, by status; those that are not done, with their messages."""
    counts = sorted(Counter(runs["status"]).items(), key=lambda pair: (-pair[1], pair[0]))
    content: list[Any] = [f"{len(runs)} runs: {', '.join(f'{count} {status}' for status, count in counts)}."]
    left = runs[runs["status"] != "done"]
    if len(left):
        content.append("The following runs are not done and are left out of every number below.")
        lines = [[str(run.path), run.status, run.message or tables.NOTHING] for run in left.itertuples()]
        content.append(page.Table(["run", "status", "message"], lines, left=3))
    return page.Section("What was run", content)


def where_from(found: table.Found) -> page.Section:
    """Commits, hardware, versions, settings and commands."""
    runs = found.runs
    kinds = Counter(zip(runs["commit"], runs["hardware"], runs["versions"], strict=True)).most_common()
    lines = [[*kind, str(number)] for kind, number in kinds]
    content: list[Any] = [page.Table(["commit", "hardware", "versions", "runs"], lines, left=3)]
    rows = found.table.groupby(["section", "title", "split", "network"], sort=False)["run"].agg(["first", "nunique"])
    if len(rows):
        settings: Frame = pd.DataFrame(list(runs.loc[rows["first"], "network"]), dtype=object)
        settings = settings.drop(columns=["seed", "method", *table.TASK])
        varied = [name for name in settings if settings[name].nunique(dropna=False) > 1]
        same = ", ".join(f"{name} {settings[name][0]}" for name in settings if name not in varied)
        named = [[title, name, str(n)] for (_, title, _, name), n in rows["nunique"].items()]
        own = settings[varied].map(lambda value: tables.NOTHING if value is None else str(value)).to_numpy().tolist()
        lines = [[*of, *texts] for of, texts in zip(named, own, strict=True)]
        content.append(page.Heading("Settings of every row"))
        content.append(page.Table(["task", "network", "n", *varied], lines, f"In all: {same}.", left=2))
    lines = [[str(run.path), run.status, run.commit, run.command] for run in runs.itertuples()]
    content.append(page.Table(["run", "status", "commit", "command"], lines, "", 4, folded="Every run and its command"))
    return page.Section("Where every number comes from", content)


def claim(out: Path) -> None:
    """Makes the folder of a report, or empties that of an earlier one; raises FileExistsError where there is more."""
    there = list(out.iterdir()) if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or any(not OURS.fullmatch(file.name) for file in there):
        raise FileExistsError(f"`out` must be a new or empty folder, or that of a report; {out} holds something else.")
    for file in there:
        file.unlink()
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
    found = table.read(folders)
    out = out or folders[0] / "report"
    data, runs = found.table, found.runs
    tasks, of_settings, at_equal_cost = (data[data["section"] == name] for name in ("main", "ablations", "cost"))
    every = data[data["section"] != "cost"]
    compared = summary.differences(tasks, against)
    claim(out)
    draw = sections.Plotter(out, data["network"])
    written = {
        "Summary": summary.summary(tasks),
        "Differences": compared,
        "Accuracy": sections.accuracy(tasks[tasks["noise"] == 0], draw),
        "Label noise": sections.label_noise(tasks, draw),
        "Quantization": sections.quantization(every, draw),
        "Curvature": curvature.hessian(every, draw),
        "Size of the penalty": curvature.penalty(every, draw),
        "Landscapes": curvature.landscapes(found.landscapes, draw),
        "Cost": cost.cost(tasks, at_equal_cost),
        "Ablations": sections.accuracy(of_settings, draw),
        "Search": sections.search(found.searches, draw),
    }
    shown = [page.Section(title, parts) for title, parts in written.items() if parts]
    content = [what_was_run(runs), *shown, where_from(found)]
    done = runs["is_done"].sum()
    counted = f"{done} finished runs" if done != 1 else "1 finished run"
    title, introduction = "Report of training runs", f"{counted} below {', '.join(map(str, folders))}."
    (out / "report.md").write_text(page.to_markdown(title, introduction, content))
    (out / "report.html").write_text(page.to_html(title, introduction, content, out))
    cli.console.print(f"{introduction} The report is {out / 'report.html'}.")


if __name__ == "__main__":
    cli.run(main)
