"""The site: `python -m sphinx -W docs site` (extra `docs`).

The first page is the README. Pages of the API are made from the docstrings; those of the records, the change log and
how to contribute are the files of the repository. What is made lies in docs/api, docs/records and docs/project.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import hero_jax

ROOT = Path(__file__).parent.parent
MADE = {name: ROOT / "docs" / name for name in ("api", "records", "project")}
# Pages of the repository that are pages of the site.
PROJECT = {"CHANGELOG.md": "project/changelog.md", "CONTRIBUTING.md": "project/contributing.md"}

project = "hero_jax"
author = "the hero_jax developers"
release = version = hero_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "hero_jax"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
highlight_language = "text"
myst_heading_anchors = 4
# Names of types stand for themselves.
autodoc_type_aliases = {
    name: name.rpartition(".")[2]
    for name in (
        *("PyTree", "Scalar", "Mask", "GradFn", "LossFn", "MeanLossFn", "WeightFn", "Batches", "Apply", "AxisName"),
        *("jax.typing.ArrayLike", "parallel.AxisName", "optax.Schedule"),
    )
}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
default_role = "code"


def is_private(module: str) -> bool:
    """Whether a part of its name begins with an underscore."""
    return any(part.startswith("_") for part in module.split("."))


def public_modules() -> list[str]:
    """The modules of hero_jax that are public, in the order of its docstring."""
    root = str(Path(hero_jax.__file__).parent)
    found = [module.name for module in pkgutil.walk_packages([root], "hero_jax.")]
    public = [name for name in found if not is_private(name)]
    listed = inspect.getdoc(hero_jax) or ""
    return sorted(public, key=lambda name: (listed.index(".".join(name.split(".")[:2]) + " "), name))


def write_api() -> None:
    """A page for each public module, and one that lists all public names."""
    pages, lines, written = [], [], set()
    for name in public_modules():
        text, summary, own = api_page(name)
        if own:
            (MADE["api"] / f"{name}.md").write_text(text)
            pages.append(name)
            written |= set(own.values())
            names = ", ".join(f"{{py:obj}}`~{name}.{each}`" for each in own)
            lines.append(f"| [{name.removeprefix('hero_jax.')}]({name}.md) | {summary.replace('|', '')} | {names} |")
    modules = [importlib.import_module(name) for name in ("hero_jax", *public_modules())]
    missing = {found for module in modules for found in code_of(module).values()} - written
    if missing:
        raise ValueError(f"public and on no page: {missing}")
    about = "Every public name, by module: its formula, arguments, errors, cost, an example and the source."
    table = "\n".join(["| module | what it is | names |", "| --- | --- | --- |", *lines])
    (MADE["api"] / "index.md").write_text(_index("API reference", f"{about}\n\n{table}", pages, hidden=True))


def api_page(name: str) -> tuple[str, str, dict[str, Any]]:
    """The page of a module, the first line of its docstring, and the functions and classes that are its own."""
    module = importlib.import_module(name)
    code = code_of(module)
    own = {each: found for each, found in code.items() if found.__module__ == name or is_private(found.__module__)}
    own = dict(sorted(own.items(), key=lambda item: inspect.getsourcelines(item[1])[1]))
    summary, _, rest = (inspect.getdoc(module) or "").partition("\n\n")
    summary = " ".join(summary.split())
    constants = {each: getattr(module, each) for each in module.__all__ if each not in code}
    shown = {each: repr(found) for each, found in constants.items() if not inspect.ismodule(found)}
    values = {each: f" = `{text}`" if len(text) < 100 else "" for each, text in shown.items()}
    parts = [f"# {name}\n\n{summary}", f"```text\n{rest}\n```" if rest else ""]
    parts.append("\n".join(f"* `{each}`{value}" for each, value in values.items()))
    parts += [_block(name, each, found) for each, found in own.items()]
    return "\n\n".join(part for part in parts if part) + "\n", summary, own


def code_of(module: Any) -> dict[str, Any]:
    """The public functions and classes of a module by name."""
    public = {each: getattr(module, each) for each in module.__all__}
    return {each: found for each, found in public.items() if inspect.isclass(found) or inspect.isfunction(found)}


def _index(title: str, about: str, pages: list[str], *, hidden: bool = False) -> str:
    """A page that lists pages."""
    listed = "\n".join(pages)
    option = ":hidden:" if hidden else ":maxdepth: 1"
    return f"# {title}\n\n{about}\n\n```{{toctree}}\n{option}\n\n{listed}\n```\n"


def _block(module: str, name: str, found: object) -> str:
    """The directive for a function or a class; of a class, its own documented methods and properties too."""
    if inspect.isfunction(found):
        return f"```{{eval-rst}}\n.. autofunction:: {module}.{name}\n```"
    members = [
        key
        for key, value in vars(found).items()
        if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)) and value.__doc__
    ]
    option = f"\n   :members: {', '.join(members)}" if members else ""
    return f"```{{eval-rst}}\n.. autoclass:: {module}.{name}{option}\n```"


@functools.cache
def records() -> dict[Path, str]:
    """The pages of results by their path, and their place in the site."""
    results = ROOT / "results"
    found = {path: path.parent.name for path in [*results.glob("*/table.md"), *results.glob("*/README.md")]}
    found |= {path: path.stem for path in results.glob("*.md")}
    return {path: f"records/{name}.md" for path, name in found.items()}


@functools.cache
def copies() -> dict[Path, str]:
    """The files that are pages of the site as they are, and their place in it."""
    return records() | {ROOT / name: page for name, page in PROJECT.items()}


def write_copies() -> None:
    """The pages of results and of the project."""
    for path, page in copies().items():
        text = path.read_text()
        heading = "" if text.startswith("# ") else f"# {Path(page).stem}\n\n"
        (ROOT / "docs" / page).write_text(heading + linked(text, path, page))
    about = "The tables that the pages quote, each with the command that made it."
    pages = sorted(Path(page).name for page in records().values())
    (MADE["records"] / "index.md").write_text(_index("Records", about, pages))


def linked(text: str, path: Path, page: str) -> str:
    """The text of a file of the repository as that of a page: what it links to is on the site wherever it is there."""
    pages = copies() | {ROOT / "README.md": "index.md"}
    pages |= {path.parent: place for path, place in records().items() if path.parent.name != "results"}

    def target(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", link) or not link:
            return match[0]
        found = (path.parent / link).resolve()
        place = ROOT / "docs" / pages[found] if found in pages else found
        return f"]({Path(os.path.relpath(place, (ROOT / 'docs' / page).parent)).as_posix()}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)]*)?\)", target, text)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Before a page is parsed: the README opens the first one, and links are those of the site."""
    folder = name.partition("/")[0]
    if folder in MADE:
        return
    source[0] = linked(source[0], ROOT / "docs" / f"{name}.md", f"{name}.md")
    if name == "index":
        source[0] = linked((ROOT / "README.md").read_text(), ROOT / "README.md", "index.md") + "\n" + source[0]


def docstring(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Makes reStructuredText of a docstring: formulas stand as they are written, and no sign in them has a meaning."""
    text = "\n".join(lines).strip("\n")
    if not text:
        raise ValueError(f"{name} is public and has no docstring")
    made: list[str] = []
    for block in re.split(r"\n{2,}", text):
        if block.startswith("    "):
            made.append(f"::\n\n{block}")
        elif block.startswith(">>>"):
            made.append(block)
        elif what == "class" and re.match(r"[a-z_]\w*(, \w+)*: ", block):  # its fields
            made.append("Attributes:\n" + textwrap.indent(escaped(block), "  "))
        else:
            made.append(escaped(block))
    lines[:] = "\n\n".join(made).splitlines()


def signature(
    app: Sphinx, what: str, name: str, found: object, options: object, args: str, returned: str
) -> tuple[Any, ...]:
    """Without what Sphinx writes around the name of a type that stands for itself."""
    plain = (part and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", part) for part in (args, returned))
    return tuple(plain)


def escaped(text: str) -> str:
    """A paragraph in which `code` is literal and stars, bars and underscores are themselves."""
    parts = re.split(r"`([^`]*)`", text)
    plain = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    plain[1:] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in plain[1:]]  # a letter right behind code
    code = [f"``{part}``" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def setup(app: Sphinx) -> None:
    for folder in MADE.values():
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    write_api()
    write_copies()
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-process-signature", signature)
