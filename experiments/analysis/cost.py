"""What a network costs, in gradients and in time, and what each method reaches when all may spend the same."""

from __future__ import annotations

from typing import Any

from experiments.analysis import page, sections, summary, tables
from experiments.analysis.tables import Frame

METRICS = ("gradients", "ms_per_step", "epochs", "gradients_in_all")
HEADER = ("gradients per step", "ms per step", "epochs", "gradients in all")
# Those that are the same in all runs of a network, with their formats.
COUNTS = {"gradients per step": ".4g", "epochs": ".0f", "gradients in all": ",.0f"}
COUNTED = (
    "Gradients per step are counted from the formulas, a gradient of the whole batch being one; milliseconds per step"
    " are measured in training, and comparable between runs of one machine alone; where a method changes along training"
    " the compilation of what comes later is in them."
)


def cost(main: Frame, at_equal_cost: Frame) -> list[Any]:
    """For each task the cost of every network on clean labels; then accuracies at equal cost, by noise."""
    content = []
    for title, split, part in sections.parts(main, "clean"):
        clean = part[part["noise"] == 0]
        if len(clean):
            text = f"Accuracy in percent on the {split} images, clean labels. {COUNTED}"
            end = sections.at_end(clean, {"accuracy": "last epoch"})
            content += [page.Heading(f"Cost: {title}"), _table(clean, end, ["last epoch"], text, part)]
    for title, split, part in sections.parts(at_equal_cost, "clean"):
        kinds = sorted(set(zip(part["noise"], part["kind"], strict=True)))
        labels = {of: summary.noise_label(of[1], of[0]) if of[0] else "clean labels" for of in kinds}
        for metric, what in (("accuracy", "last epoch"), ("at_best_validation", "at best validation")):
            end = sections.at_end(part, {metric: what})
            end["label"] = [labels[of] for of in zip(end["noise"], end["kind"], strict=True)]
            if len(end):
                text = (
                    f"Accuracy in percent on the {split} images, {what}: every network has spent the same number of"
                    " gradients, to a whole epoch; a method that was searched on noisy labels too has a row for each of"
                    f" its settings. {COUNTED}"
                )
                content.append(page.Heading(f"At equal cost, {what}: {title}"))
                content.append(_table(part, end, list(labels.values()), text, part))
    return content


def _table(part: Frame, accuracies: Frame, labels: list[str], text: str, behind: Frame) -> page.Table:
    """The cost of each network, that of the runs of its first label noise, and accuracies."""
    kinds = part[["noise", "kind"]]
    first = (kinds == kinds.groupby(part["network"]).transform("first")).all(axis=1)
    own = sections.at_end(part[first], dict(zip(METRICS, HEADER, strict=True)))
    counts = part.groupby(["network", "noise", "kind"])["run"].nunique().groupby("network").max().to_dict()
    made = tables.means(own[own["metric"] == "ms_per_step"], formats={"ms per step": tables.SCIENTIFIC})
    for (name, label), value in own.groupby(["network", "label"])["value"].first().items():
        if label in COUNTS:
            made[name, label] = f"{value:{COUNTS[label]}}"
    made |= tables.means(accuracies, counts)
    return sections.listed(made, ["n", *HEADER, *labels], f"{text} {sections.SPREAD}", part, behind.sort_values("run"))
