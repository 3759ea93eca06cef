"""The public names: exported, in `__all__`, documented, with few parameters, in one order."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import jax
import pytest

import hero_jax

ROOT = Path(hero_jax.__file__).parent
MODULES = ["hero_jax"] + [
    module.name
    for module in pkgutil.walk_packages([str(ROOT)], "hero_jax.")
    if not any(part.startswith("_") for part in module.name.split("."))
]
# Networks take the fields of their module.
CORE = [name for name in MODULES if not name.startswith("hero_jax.models")]
PUBLIC = [(module, name) for module in CORE for name in importlib.import_module(module).__all__]


def public(module, name):
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_is_public(module):
    found = importlib.import_module(module)
    assert found.__doc__
    assert all(hasattr(found, name) for name in found.__all__)


def test_top_level_has_every_subject():
    subjects = {name.removeprefix("hero_jax.") for name in MODULES if name.count(".") == 1} - {"models"}
    assert subjects <= set(hero_jax.__all__)
    for subject in subjects:
        assert f"hero_jax.{subject} " in hero_jax.__doc__


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_name_is_documented(module, name):
    found = public(module, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        doc = inspect.getdoc(found)
        assert doc
        assert not doc.startswith(f"{name}(")  # what a NamedTuple or dataclass says by itself
    if inspect.isfunction(found):
        assert "Args:" in doc or len(inspect.signature(found).parameters) < 2
        assert "Returns:" in doc or inspect.signature(found).return_annotation == "None" or "Args:" not in doc


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_function_has_few_parameters(module, name):
    found = public(module, name)
    if inspect.isfunction(found) and found is not hero_jax.hero:
        assert len(inspect.signature(found).parameters) <= 8


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_key_comes_last_of_the_objects(module, name):
    """Objects, then `key`, then keyword-only options."""
    found = public(module, name)
    if not inspect.isfunction(found) or "key" not in inspect.signature(found).parameters:
        return
    parameters = inspect.signature(found).parameters
    after = list(parameters.values())[list(parameters).index("key") + 1 :]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in after)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_refusals_are_argument_errors(file):
    """`raise ValueError` is nowhere in the library: a refusal is an ArgumentError, or a TypeError."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            assert node.exc.func.id != "ValueError", node.lineno


def test_argument_error_is_a_value_error():
    with pytest.raises(ValueError, match=r"`sam\(rho=...\)`") as raised:
        hero_jax.sam(-1.0)
    assert type(raised.value) is hero_jax.ArgumentError


def test_the_version_has_one_home():
    assert importlib.metadata.version("hero_jax") == hero_jax.__version__
    assert jax.__version__ != hero_jax.__version__


def test_what_moves_between_versions_of_jax_is_imported_in_one_place():
    homes = ("jax.core", "jax.extend", "jax.interpreters", "jax._src")
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert path.name == "_jax.py" or not [name for name in names if name.startswith(homes)], path
