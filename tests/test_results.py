"""Tables that are shown are those of the records that are kept beside them."""

import tarfile
from pathlib import Path

import pytest

from experiments.analysis import page, sections, summary, tables, tidy

ROOT = Path(__file__).parent.parent


# Networks to which the page of CIFAR-10 shows the differences, as docs/results.md asks for them.
AGAINST = ("SGD", "ASAM", "ASAM (rho 0.5)", "GRAD L1")


def archived(name, folder):
    """The rows of the table of the archived runs of a folder of results that are of no ablation."""
    with tarfile.open(ROOT / "results" / name / "runs.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    found = tidy.read([folder]).table
    return found[found["section"] == "main"]


def in_markdown(content):
    """The lines of each table of a section."""
    found = [made for made in content if isinstance(made, page.Table)]
    return [tables.markdown(made.header, made.lines, made.left).splitlines() for made in found]


def table_below(path, header):
    """The lines of the table with this header, the header first."""
    text = path.read_text().splitlines()
    start = text.index(header)
    end = next(i for i in range(start, len(text)) if not text[i].startswith("|"))
    return text[start:end]


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("cifar10-small", ("results/cifar10-small/README.md", "docs/results.md", "README.md")),
        ("digits-reproduce", ("results/digits-reproduce/README.md",)),
        ("digits-cheap", ("results/digits-cheap/README.md",)),
    ],
)
def test_shown_tables_are_those_of_the_records(name, pages, tmp_path):
    (lines,) = in_markdown(summary.summary(archived(name, tmp_path)))
    assert len(lines) > 5
    for shown in pages:
        assert table_below(ROOT / shown, lines[0]) == lines, shown


def test_shown_cheaper_methods_after_noise_are_those_of_the_records(tmp_path):
    names = {
        "SGD": "SGD",
        "MSAM": "MSAM",
        "SAM (suppress 0.5)": "SAM, suppression 0.5",
        "NSO": "NSO",
        "HERO (perturb_from 0.75)": "HERO late",
        "HERO (ascent_batch_size 16)": "HERO on a quarter",
        "HERO (product difference)": "HERO by differences",
    }
    rows = archived("cifar10-cheap", tmp_path)
    labels = {"accuracy": "last epoch", "at_best_validation": "chosen epoch", "memorized": "memorized"}
    columns, lines = ["n", *labels.values()], []
    for rate in (0.4, 0.8):
        end = sections.at_end(rows[rows["noise"] == rate], labels)
        for network, line in zip(names, tables.lines(tables.means(end), names, columns), strict=True):
            lines.append([f"{100 * rate:g} %", names[network], *line[1:]])
    made = tables.markdown(["labels altered", "method", *columns], lines, left=2).splitlines()
    assert [line[2] for line in lines] == ["3"] * 14
    assert table_below(ROOT / "results" / "cifar10-cheap" / "README.md", made[0]) == made
    (tmp_path / "made").write_text("\n".join(made))


def test_shown_differences_are_those_of_the_records(tmp_path):
    command = "--against " + " ".join(f'"{name}"' if " " in name else name for name in AGAINST)
    assert command in (ROOT / "docs" / "results.md").read_text()
    text = (ROOT / "results" / "cifar10-small" / "README.md").read_text()
    made = in_markdown(summary.differences(archived("cifar10-small", tmp_path), AGAINST))
    # Clean labels and two rates of noise.
    assert len(made) == 3 * len(AGAINST)
    section = text[text.index("\n## Differences") : text.index("\n## Accuracy")]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == [line for lines in made for line in lines]


def test_shown_accuracies_after_noise_are_those_of_the_records(tmp_path):
    rows = archived("digits-reproduce", tmp_path)
    symmetric = rows[(rows["noise"] > 0) & (rows["kind"] == "symmetric")]
    rates = [0.2, 0.4, 0.6, 0.8]
    end = sections.at_end(symmetric, {"accuracy": ""})
    found = tables.spreads(end.assign(label=end["noise"]))
    names = list(dict.fromkeys(end["network"]))
    expected = {tuple(line) for line in tables.lines(tables.texts(found, dict.fromkeys(names, 10)), names, rates)}
    header = "| method | 20 % altered | 40 % | 60 % | 80 % |"
    docs, readme = (
        {tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in table_below(path, header)[2:]}
        for path in (ROOT / "docs" / "results.md", ROOT / "README.md")
    )
    assert docs == expected
    # Under other names.
    assert {row[1:] for row in readme} <= {row[1:] for row in expected}
