"""The README and the pages of docs are executed: every Python block runs, every command parses."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import compiled, curvature, language_model, precision, step_cost, throughput
from benchmarks import quantize as sweep
from experiments import cli, compare, export, hessian, landscape, prepare, quantize, report, reproduce, search, train

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(PAGES.values())
MAINS = {
    "experiments.train": train.main,
    "experiments.compare": compare.main,
    "experiments.export": export.main,
    "experiments.hessian": hessian.main,
    "experiments.landscape": landscape.main,
    "experiments.prepare": prepare.main,
    "experiments.quantize": quantize.main,
    "experiments.report": report.main,
    "experiments.reproduce": reproduce.main,
    "experiments.search": search.main,
    "benchmarks.compiled": compiled.main,
    "benchmarks.curvature": curvature.main,
    "benchmarks.language_model": language_model.main,
    "benchmarks.precision": precision.main,
    "benchmarks.quantize": sweep.main,
    "benchmarks.step_cost": step_cost.main,
    "benchmarks.throughput": throughput.main,
}
COMMANDS = re.findall(r"python -m ((?:experiments|benchmarks)\.\w+)([^\n`]*)", TEXT.replace("\\\n", " "))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_python_blocks_run(block, capsys):
    exec(compile(block, "page", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_commands_parse(module, arguments):
    parsed = {}

    @functools.wraps(MAINS[module])
    def record(*positional, **named):
        parsed.update(named, positional=positional)

    cli.call(record, shlex.split(arguments))
    assert parsed


def test_commands_are_all_found():
    assert len(COMMANDS) >= 5
    assert {module for module, _ in COMMANDS} == set(MAINS)


def test_no_line_is_a_comment():
    """The site leaves out a line that begins with a percent sign."""
    for path, text in PAGES.items():
        assert not re.search(r"^\s*%", text, re.MULTILINE), path


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), target
