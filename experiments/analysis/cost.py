"""What a network costs, in gradients and in time, and what each method reaches when all may spend the same."""

from __future__ import annotations

from experiments.analysis import page, sections, tables
from experiments.analysis.tables import Frame

HEADER = {
    "gradients": "gradients per step",
    "ms_per_step": "ms per step",
    "epochs": "epochs",
    "gradients_in_all": "gradients in all",
}
# Those that are the same in all runs of a network, with their formats.
COUNTS = {"gradients": ".4g", "epochs": ".0f", "gradients_in_all": ",.0f"}
COUNTED = (
    "Gradients per step are counted from the formulas, a gradient of the whole batch being one; milliseconds per step"
    " are measured in training, and comparable between runs of one machine alone; where a method changes along training"
    " the compilation of what comes later is in them."
)


def cost(main: Frame, at_equal_cost: Frame) -> sections.Parts:
    """The cost of every network on clean labels; then accuracies at equal cost, by noise."""
    for title, split, part in sections.parts(main, "clean"):
        clean = part[part["noise"] == 0]
        if len(clean):
            text = f"Accuracy in percent on the {split} images, clean labels. {COUNTED}"
            end = sections.at_end(clean, {"accuracy": "last epoch"})
            yield page.Heading(f"Cost: {title}")
            yield _table(clean, end, ["last epoch"], text, part)
    for title, split, part in sections.parts(at_equal_cost, "clean"):
        labels = list(part.sort_values(["noise", "kind"])["altered"].unique())
        for metric, what in sections.ACCURACIES.items():
            end = sections.at_end(part, {metric: what})
            end["label"] = end["altered"]
            if len(end):
                text = (
                    f"Accuracy in percent on the {split} images, {what}: every network has spent the same number of"
                    " gradients, to a whole epoch; a method that was searched on noisy labels too has a row for each of"
                    f" its settings. {COUNTED}"
                )
                yield page.Heading(f"At equal cost, {what}: {title}")
                yield _table(part, end, labels, text, part)


def _table(part: Frame, accuracies: Frame, labels: list[str], text: str, behind: Frame) -> page.Table:
    """The cost of each network, that of the runs of its first label noise, and accuracies."""
    first = part["altered"] == part.groupby("network")["altered"].transform("first")
    own = sections.at_end(part[first], HEADER)
    made = tables.means(own[own["metric"] == "ms_per_step"])
    for (name, metric), value in own.groupby(["network", "metric"])["value"].first().items():
        if metric in COUNTS:
            made[name, HEADER[metric]] = f"{value:{COUNTS[metric]}}"
    made |= tables.means(accuracies)
    text = f"{text} {sections.SPREAD}"
    return sections.listed(made, ["n", *HEADER.values(), *labels], text, part, behind.sort_values("run"))
