"""Tables that are shown are those of the records that are kept beside them."""

import tarfile
from pathlib import Path

import pytest

from experiments import tables
from experiments.report import page, saved, summary

ROOT = Path(__file__).parent.parent


def summary_of(archive, folder):
    """The lines of the summary of archived runs, in Markdown."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    content = summary.summary(saved.find([folder]).main)
    return [
        line
        for made in content
        if isinstance(made, page.Table)
        for line in tables.markdown(made.header, made.lines, made.left).splitlines()
    ]


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("cifar10-small", ("results/cifar10-small/README.md", "docs/results.md", "README.md")),
        ("digits-reproduce", ("results/digits-reproduce/README.md",)),
    ],
)
def test_shown_tables_are_those_of_the_records(name, pages, tmp_path):
    lines = summary_of(ROOT / "results" / name / "runs.tar.xz", tmp_path)
    assert len(lines) > 5
    for shown in pages:
        text = (ROOT / shown).read_text().splitlines()
        start = text.index(lines[0])
        end = next(i for i in range(start, len(text)) if not text[i].startswith("|"))
        assert text[start:end] == lines, shown
