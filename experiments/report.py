"""Reports saved runs: `python -m experiments.report runs`.

Finds every run folder below the folders it is given, and leaves report.html, one file that needs nothing else, and
report.md with the same tables beside the plots. A mean has its n and, over two runs or more, its standard deviation.

saved       runs and what was measured of them, read back and checked, in cells
sections    the sections: tables and plots of cells
summary     that of every claim, a row a network
differences those of every claim to chosen networks
cost        gradients and time of every network, and accuracy at equal cost
curvature   those on the Hessian, the size of the penalty and landscapes
page        a page of sections as HTML and as Markdown
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import cli
from experiments.analysis import cost, curvature, differences, networks, page, saved, sections, summary, tables
from experiments.analysis.saved import Run
from experiments.analysis.sections import Part, Setup
from experiments.config import LABELS

OURS = re.compile(r"report\.(html|md)|plot-[\w.-]+\.(png|svg)")


def parts(runs: Sequence[Run]) -> list[Part]:
    """The cells of each task."""
    by_setup: dict[Setup, list[Run]] = {}
    for run in runs:
        by_setup.setdefault(Setup.of(run), []).append(run)
    named = sections.names(runs)
    made = {setup: saved.cells(of_setup, named) for setup, of_setup in by_setup.items()}
    # None has no order among numbers: first.
    ordered = sorted(made, key=lambda setup: [(value is not None, value) for value in setup])
    return [Part(str(setup), setup, made[setup], saved.plain_cell(made[setup], "sgd")) for setup in ordered]


def ablations(runs: Sequence[Run], others: Sequence[Part]) -> list[Part]:
    """The cells of each task and method below folders named ablations, and beside them those of it found elsewhere."""
    elsewhere = [(part.setup, cell) for part in others for cell in part.cells]
    made = []
    for setup, method in dict.fromkeys((Setup.of(run), run.config.method) for run in runs):
        chosen = [run for run in runs if (Setup.of(run), run.config.method) == (setup, method)]
        taken = {networks.network(run.config) for run in chosen}
        for other, cell in elsewhere:
            if (other, cell.network.method) == (setup, method) and cell.network not in taken:
                chosen += cell.runs
        cells = saved.cells(chosen)
        base = next((cell for cell in cells if cell.name == LABELS[method]), None)
        made.append(Part(f"{LABELS[method]} by setting: {setup}", setup, cells, base))
    return made


def what_was_run(runs: Sequence[Run]) -> page.Section:
    """How many runs, by status; those that are not done, with their messages."""
    counts = sorted(Counter(run.status for run in runs).items(), key=lambda pair: (-pair[1], pair[0]))
    listed = ", ".join(f"{count} {status}" for status, count in counts)
    content: list[Any] = [f"{len(runs)} runs: {listed}."]
    left = [run for run in runs if run.status != "done"]
    if left:
        content.append("The following runs are not done and are left out of every number below.")
        lines = [[str(run.path), run.status, run.message or tables.NOTHING] for run in left]
        content.append(page.Table(["run", "status", "message"], lines, left=3))
    return page.Section("What was run", content)


def where_from(runs: Sequence[Run], made: Sequence[Part]) -> page.Section:
    """Commits, hardware, versions, settings and commands."""
    count = Counter(
        (sections.commit(run), sections.hardware(run), "; ".join(dict.fromkeys(map(_versions, run.parts))) or "unknown")
        for run in runs
    )
    lines = [[*kind, str(number)] for kind, number in count.most_common()]
    content: list[Any] = [page.Table(["commit", "hardware", "versions", "runs"], lines, left=3)]
    named = [(part, cell) for part in made for cell in part.cells]
    settings = [dataclasses.asdict(cell.network) for _, cell in named]
    fields = [name for name in settings[0] if name not in ("seed", "method", *Setup._fields)] if settings else []
    varied = [name for name in fields if len({row[name] for row in settings}) > 1]
    same = ", ".join(f"{name} {settings[0][name]}" for name in fields if name not in varied)
    if settings:
        lines = [
            [part.title, cell.name, str(len(cell.runs)), *(_setting(row[name]) for name in varied)]
            for (part, cell), row in zip(named, settings, strict=True)
        ]
        content.append(page.Heading("Settings of every row"))
        content.append(page.Table(["task", "network", "n", *varied], lines, f"In all: {same}.", left=2))
    lines = [
        [
            str(run.path),
            run.status,
            sections.commit(run),
            " then ".join(dict.fromkeys(" ".join(p.get("command", ["unknown"])) for p in run.parts)) or "unknown",
        ]
        for run in runs
    ]
    content.append(page.Table(["run", "status", "commit", "command"], lines, "", 4, folded="Every run and its command"))
    return page.Section("Where every number comes from", content)


def _setting(value: Any) -> str:
    return tables.NOTHING if value is None else str(value)


def _versions(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in part.get("versions", {}).items())


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
    found = saved.find(folders)
    out = out or folders[0] / "report"
    of_tasks = parts(found.main)
    of_settings = ablations(found.ablations, of_tasks)
    every = [*of_tasks, *of_settings]
    compared = differences.differences(of_tasks, against)
    claim(out)
    draw = sections.Plotter(out)
    written = {
        "Summary": summary.summary(found.main),
        "Differences": compared,
        "Accuracy": sections.accuracy([part for part in of_tasks if not part.setup.label_noise], draw),
        "Label noise": sections.label_noise(found.main, draw),
        "Quantization": sections.quantization(every, draw),
        "Curvature": curvature.hessian(every, draw),
        "Size of the penalty": curvature.penalty(every, draw),
        "Landscapes": curvature.landscapes(found.landscapes, draw),
        "Cost": cost.cost(found.main, found.at_equal_cost),
        "Ablations": sections.accuracy(of_settings, draw),
        "Search": sections.search(found.searches, draw),
    }
    content = [
        what_was_run(found.runs),
        *(page.Section(title, parts_of) for title, parts_of in written.items() if parts_of),
        where_from(found.runs, [*every, *parts(found.at_equal_cost)]),
    ]
    done = sum(run.is_done for run in found.runs)
    counted = f"{done} finished runs" if done != 1 else "1 finished run"
    title, introduction = "Report of training runs", f"{counted} below {', '.join(map(str, folders))}."
    (out / "report.md").write_text(page.to_markdown(title, introduction, content))
    (out / "report.html").write_text(page.to_html(title, introduction, content, out))
    cli.console.print(f"{introduction} The report is {out / 'report.html'}.")


if __name__ == "__main__":
    cli.run(main)
