"""Imports run one way: from the commands through the rooms of experiments to what hero_jax has for everyone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each knows those before it and none after it.
ROOMS = ("config", "storage", "data", "training", "measure", "analysis")
FILES = {file.relative_to(ROOT): ast.parse(file.read_text()) for file in sorted((ROOT / "experiments").rglob("*.py"))}
OTHERS = {file.relative_to(ROOT): ast.parse(file.read_text()) for file in sorted((ROOT / "benchmarks").rglob("*.py"))}


def module(file):
    """The dotted name of a file."""
    return ".".join(part for part in file.with_suffix("").parts if part != "__init__")


MODULES = {module(file) for file in FILES}


def imported(tree):
    """The modules that a file imports, and names from them, in dotted form; also those of its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where something comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """Of a dotted name the number of its room; that of the commands is the last."""
    parts = name.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS)


def arrows():
    """(file, module of experiments that it imports), each once."""
    for file, tree in FILES.items():
        for name in set(imported(tree)):
            if name.split(".")[0] == "experiments":
                yield file, name if name in MODULES else name.rpartition(".")[0]


def test_every_folder_is_a_room():
    assert {file.parts[1] for file in FILES if len(file.parts) > 2} == set(ROOMS)


def test_rooms_know_those_before_them_alone():
    wrong = [(str(file), name) for file, name in arrows() if room(name) > room(module(file))]
    assert not wrong


def test_no_circles():
    graph = {name: set() for name in MODULES}
    for file, name in arrows():
        if name != module(file):
            graph[module(file)].add(name)
    while graph:
        ends = {name for name, below in graph.items() if not below & graph.keys()}
        assert ends, f"a circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in ends}


@pytest.mark.parametrize("file", [*FILES, *OTHERS], ids=str)
def test_nothing_private_is_imported(file):
    for name in imported((FILES | OTHERS)[file]):
        assert not any(part.startswith("_") for part in name.split(".")[1:]), name


@pytest.mark.parametrize("file", [file for file in FILES if len(file.parts) > 2], ids=str)
def test_rooms_do_not_print(file):
    calls = [node.func for node in ast.walk(FILES[file]) if isinstance(node, ast.Call)]
    assert "print" not in {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
    for name in imported(FILES[file]):
        assert not name.startswith(("experiments.cli", "experiments.progress", "rich.console", "rich.progress", "tyro"))
