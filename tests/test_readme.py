"""The README is executed: every Python block runs, every command parses."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import tyro

from benchmarks import step_cost
from experiments import compare, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAINS = {
    "experiments.train": train.main,
    "experiments.compare": compare.main,
    "benchmarks.step_cost": step_cost.main,
}
COMMANDS = re.findall(r"python -m ((?:experiments|benchmarks)\.\w+)([^\n`]*)", README)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_commands_parse(module, arguments):
    parsed = {}

    @functools.wraps(MAINS[module])
    def record(*positional, **named):
        parsed.update(named, positional=positional)

    tyro.cli(record, args=shlex.split(arguments))
    assert parsed


def test_commands_are_all_found():
    assert len(COMMANDS) >= 5
    assert {module for module, _ in COMMANDS} == set(MAINS)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
