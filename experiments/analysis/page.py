"""A page of sections with tables and pictures, as one HTML file that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.analysis import tables

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.5rem 1rem 4rem; color: #1c1e21; background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 0.75rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid #d8dce1; }
h3 { font-size: 1.02rem; margin: 2rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 44rem; }
nav ol { margin: 0.5rem 0; padding-left: 1.4rem; }
a { color: #0b5cad; }
.wide { overflow-x: auto; margin: 0.75rem 0 0.25rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e9ed; }
thead th { border-bottom: 2px solid #9aa3ad; vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: #fff; }
.text { text-align: left; white-space: normal; min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) > * { background: #f6f8fa; }
.caption, figcaption { color: #50575f; font-size: 0.85rem; line-height: 1.45; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
img { display: block; max-width: 100%; height: auto; }
summary { cursor: pointer; color: #0b5cad; }
@media (max-width: 34rem) {
  body { padding: 1rem 0.75rem 3rem; }
  h1 { font-size: 1.45rem; }
  th, td { padding: 0.3rem 0.5rem; }
  tbody th.text { min-width: 6rem; max-width: 38vw; }
}
"""


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


class Section(NamedTuple):
    """A part of the page with a title; a string in it is a paragraph."""

    title: str
    parts: Sequence[str | Heading | Table | Picture]


def to_html(title: str, introduction: str, sections: Sequence[Section], folder: Path) -> str:
    """The page as one HTML file: style and pictures are in it, and it loads nothing."""
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(introduction)}</p>"]
    if len(sections) > 1:
        links = (f'<li><a href="#part{i}">{html.escape(s.title)}</a></li>' for i, s in enumerate(sections))
        body.append(f"<nav><ol>{''.join(links)}</ol></nav>")
    for i, section in enumerate(sections):
        body.append(f'<section>\n<h2 id="part{i}">{html.escape(section.title)}</h2>')
        body += [_html(part, folder) for part in section.parts]
        body.append("</section>")
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>"
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{content}\n</body>\n</html>\n'


def to_markdown(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The page as Markdown, with links to the pictures."""
    parts = [f"# {tables.plain(title)}", tables.plain(introduction)]
    for section in sections:
        parts.append(f"## {tables.plain(section.title)}")
        parts += [_markdown(part) for part in section.parts]
    return "\n\n".join(parts) + "\n"


def _html(part: str | Heading | Table | Picture, folder: Path) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Heading):
        return f"<h3>{html.escape(part.text)}</h3>"
    if isinstance(part, Picture):
        kind = {".svg": "svg+xml", ".png": "png"}[Path(part.file).suffix]
        code = base64.b64encode((folder / part.file).read_bytes()).decode()
        caption = html.escape(part.caption)
        image = f'<img alt="{caption}" src="data:image/{kind};base64,{code}">'
        return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"
    lines = [_row("th", part.header, part), *(_row("td", line, part) for line in part.lines)]
    table = f"<table>\n<thead>{lines[0]}</thead>\n<tbody>\n" + "\n".join(lines[1:]) + "\n</tbody>\n</table>"
    table = f'<div class="wide">{table}</div>'
    if part.caption:
        table += f'\n<p class="caption">{html.escape(part.caption)}</p>'
    return f"<details><summary>{html.escape(part.folded)}</summary>\n{table}\n</details>" if part.folded else table


def _row(kind: str, line: Sequence[str], table: Table) -> str:
    """A row; the first cell of a row of numbers is its heading."""
    cells = []
    for i, text in enumerate(line):
        tag = "th" if i == 0 else kind
        scope = "" if tag == "td" else f' scope="{"col" if kind == "th" else "row"}"'
        style = ' class="text"' if i < table.left else ""
        cells.append(f"<{tag}{scope}{style}>{html.escape(text)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _markdown(part: str | Heading | Table | Picture) -> str:
    if isinstance(part, str):
        return tables.plain(part)
    if isinstance(part, Heading):
        return f"### {tables.plain(part.text)}"
    if isinstance(part, Picture):
        links = " ".join(f"[{Path(name).suffix[1:].upper()}]({name})" for name in part.also)
        return f"![]({part.file})\n\n{tables.plain(part.caption)}" + (f" {links}" if links else "")
    table = tables.markdown(part.header, part.lines, part.left)
    return f"{table}\n{tables.plain(part.caption)}".rstrip()
