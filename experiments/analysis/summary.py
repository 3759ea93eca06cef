"""The summary, a row a network and a column a claim, and differences of all claims to chosen networks, by task."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.analysis import page, sections, tables
from experiments.analysis.tables import Frame

# Rounding to more bits than this costs next to nothing, and has its place in the section on quantization.
MOST_BITS = 3
EIGENVALUE = "top eigenvalue"


def summary(data: Frame) -> sections.Parts:
    """Accuracy on clean labels, at low bits and after label noise, curvature and time of each network.

    Low bits, curvature and time are those of the runs on clean labels. A task of which accuracy alone is known is left
    out, since it has no more to tell than the section on accuracy.
    """
    for title, split, part in sections.parts(data, "clean"):
        clean = part[part["noise"] == 0]
        low = low_bits(clean)
        end = sections.at_end(part, {"accuracy": "", **low, "eigenvalue": EIGENVALUE, "seconds": "seconds"})
        of_accuracy = end["metric"] == "accuracy"
        end = end.assign(label=end["label"].where(~of_accuracy, end["altered"]))[of_accuracy | (end["noise"] == 0)]
        noisy = end[end["noise"] > 0].sort_values(["kind", "noise"])["label"].unique()
        columns = ["clean labels", *low, *noisy, EIGENVALUE, "seconds"]
        columns = [label for label in columns if label in set(end["label"])]
        if len(set(columns) - {"seconds"}) < 2:
            continue
        made = tables.starred(tables.means(end), EIGENVALUE, clean)
        text = (
            f"Accuracy in percent on the {split} images, whose labels are true where those of training were"
            " altered, after the last epoch. Low bits (weights rounded after training), the top Hessian eigenvalue (its"
            " residual is in the section on curvature; a star: some run did not reach it) and seconds in training steps"
            " (the first evaluated epoch at the speed of the second) are of the runs on clean labels."
            f" {sections.SPREAD}"
        )
        yield page.Heading(title)
        yield sections.listed(made, ["n", *columns], text, part, part.sort_values("run"))


def differences(data: Frame, against: Sequence[str]) -> sections.Parts:
    """For each network of `against`, what every other network has more: paired over the seeds of both.

    Raises ValueError where no task has a network of that name.
    """
    for name in against:
        if name not in sections.networks(data):
            listed = ", ".join(sections.networks(data))
            raise ValueError(f"`against` must name networks of these runs ({listed}); got {name!r}.")
    for title, split, part in sections.parts(data):
        labels = {**sections.ACCURACIES, **low_bits(part), "eigenvalue": EIGENVALUE}
        end = sections.at_end(part, labels)
        for base in dict.fromkeys(against):
            columns = [label for label in labels.values() if label in set(end["label"][end["network"] == base])]
            others = [name for name in sections.networks(part) if name != base]
            if not columns or not others:
                continue
            found = tables.differences(end, base)
            made = tables.texts(found, {name: found["n"].get((name, "last epoch"), 0) for name in others}, sign="+")
            text = (
                f"Points of accuracy on the {split} images (low bits: weights rounded after training), and top"
                f" Hessian eigenvalue, minus those of {base}: paired over the n seeds that both have, mean \u00b1"
                " standard error. At 95 % confidence one difference over three seeds is told from zero by 4.3 standard"
                " errors, over ten by 2.3; of twenty that are nothing one is to be expected beyond that."
                f" {sections.origin(part.iloc[(part['network'] != base).argsort(kind='stable')])}"
            )
            lines = tables.lines(made, others, ["n", *columns])
            yield page.Heading(f"{title}: minus {base}")
            yield page.Table(["network", "n", *columns], lines, text)


def low_bits(part: Frame) -> dict[str, str]:
    """What was measured of any of these at few bits: the metric is the label."""
    rounded = part[part["bits"].notna() & (part["bits"] != "full")]
    return {name: name for name in rounded["metric"][rounded["bits"].astype(int) <= MOST_BITS].unique()}
