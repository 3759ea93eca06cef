"""A page of sections with tables and pictures, as one HTML file that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from experiments.analysis import tables


class Heading(NamedTuple):
    """The title of what follows in a section."""

    text: str


class Table(NamedTuple):
    """A table, its first `left` columns of text and the others of numbers; `folded` is shown in its place at first."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1
    folded: str = ""


class Picture(NamedTuple):
    """A PNG or SVG file in the folder of the page; `also` are names of the same picture in other formats."""

    file: str
    caption: str
    also: Sequence[str] = ()


# A string is a paragraph.
Part = str | Heading | Table | Picture


class Section(NamedTuple):
    """A part of the page with a title."""

    title: str
    parts: Sequence[Part]


def to_html(title: str, introduction: str, sections: Sequence[Section], folder: Path) -> str:
    """The page as one HTML file (page.html): style and pictures are in it, and it loads nothing."""

    def embedded(picture: Picture) -> str:
        kind = {".svg": "svg+xml", ".png": "png"}[Path(picture.file).suffix]
        return f"data:image/{kind};base64,{base64.b64encode((folder / picture.file).read_bytes()).decode()}"

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    # What follows each other and is of one kind.
    grouped = functools.partial(itertools.groupby, key=lambda part: type(part).__name__)
    pages.filters |= {"grouped": grouped, "embedded": embedded}
    return pages.get_template("page.html").render(title=title, introduction=introduction, sections=sections)


def to_markdown(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The page as Markdown, with links to the pictures."""
    parts = [f"# {tables.plain(title)}", tables.plain(introduction)]
    for section in sections:
        parts += [f"## {tables.plain(section.title)}", *map(_markdown, section.parts)]
    return "\n\n".join(parts) + "\n"


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return tables.plain(part)
    if isinstance(part, Heading):
        return f"### {tables.plain(part.text)}"
    if isinstance(part, Picture):
        links = " ".join(f"[{Path(name).suffix[1:].upper()}]({name})" for name in part.also)
        return f"![]({part.file})\n\n{tables.plain(part.caption)}" + (f" {links}" if links else "")
    return f"{tables.markdown(part.header, part.lines, part.left)}\n{tables.plain(part.caption)}".rstrip()
