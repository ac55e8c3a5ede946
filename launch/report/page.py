"""A study -> report.html, one page that needs no other file, and report.md with the same words and tables.

Works on a study that is half done: what is missing is named at the top. The page has no script and loads nothing; its
figures take their colours from its style, so they follow the reader's light or dark setting.
"""

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from types import MappingProxyType

from thriftlab.data.files import replace_atomically
from thriftlab.launch.report import figures, published, repetition, tables
from thriftlab.launch.report.figures import Picture, colours
from thriftlab.launch.report.probes import probe_pictures
from thriftlab.launch.report.results import Study
from thriftlab.launch.report.tables import Cell, Table, circumstances
from thriftlab.launch.report.words import answers, question, warnings


def write_report(study: Study) -> Path:
    """Write report.html and report.md into the study's folder; returns the page."""
    page = Template(template()).substitute(title=html.escape(title(study)), body=body(study))
    target = study.folder / "report.html"
    replace_atomically(target, page.encode())
    replace_atomically(study.folder / "report.md", markdown(study).encode())
    return target


def template() -> str:
    return resources.files("thriftlab.launch").joinpath("report/report.html").read_text("utf-8")


def title(study: Study) -> str:
    if study.plan["question"]:
        return study.folder.resolve().name
    baseline, *others = study.plan["arms"]
    return f"{', '.join(others)} against {baseline}" if others else baseline


def body(study: Study) -> str:
    found, lead, colour = sections(study), 2 if study.contrasts else 1, colours(study)
    parts = [
        f"<h1>{html.escape(title(study))}</h1>",
        f'<p class="question">{html.escape(question(study))}</p>',
        '<ul class="answers">', *(f"<li>{html.escape(line)}</li>" for line in answers(study)), "</ul>",
        warning_box(warnings(study)),
        *(html_section(*section, colour) for section in found[:lead]),
        '<h2>Figures</h2><div class="figures">', *map(html_figure, pictures(study)), "</div>",
        *(html_section(*section, colour) for section in found[lead:]),
        "<h2>How it was run</h2><dl>", *(html_fact(*fact) for fact in circumstances(study)), "</dl>",
    ]  # fmt: skip
    return "\n".join(parts)


def sections(study: Study) -> list[tuple[str, Table, str]]:
    """Title, table and note of every table of the report."""
    found = tables.sections(study)
    more = [section for section in (published.section(study), repetition.section(study)) if section]
    return [*found[:2], *more, *found[2:]]


def pictures(study: Study) -> list[Picture]:
    """Every figure of the report."""
    more = repetition.picture(study)
    return [*figures.pictures(study), *probe_pictures(study), *([more] if more else [])]


def warning_box(lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="warnings"><strong>Keep in mind</strong><ul>{items}</ul></div>' if lines else ""


def html_section(name: str, rows: Table, note: str, colour: Mapping[str, int]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in rows[0])
    lines = "".join(f"<tr>{html_row(row, colour)}</tr>" for row in rows[1])
    return (
        f'<h2>{html.escape(name)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{lines}</tbody></table></div><p class="note">{html.escape(note)}</p>'
    )


def html_row(row: Sequence[Cell], colour: Mapping[str, int]) -> str:
    (name,), *others = row
    key = f'<span class="key" style="background: var(--s{colour[name]})"></span>' if name in colour else ""
    return f"<td>{key}{html.escape(name)}</td>" + "".join(f"<td>{html_cell(cell)}</td>" for cell in others)


def html_cell(cell: Cell) -> str:
    return html.escape(cell[0]) + "".join(f"<small>{html.escape(text)}</small>" for text in cell[1:])


def html_figure(picture: Picture) -> str:
    svg = picture.svg.replace("<svg ", f'<svg aria-label="{html.escape(picture.title)}" ', 1)
    caption = html.escape(picture.caption)
    return f"<figure><h3>{html.escape(picture.title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def html_fact(term: str, text: str) -> str:
    shown = f"<code>{html.escape(text)}</code>" if term == "command" else html.escape(text)
    return f"<dt>{term}</dt><dd>{shown}</dd>"


def markdown(study: Study, figures: Mapping[str, Picture] = MappingProxyType({})) -> str:
    """The report as text; `figures` lie beside it in files of these names."""
    parts = [f"# {title(study)}", question(study), "\n".join(f"- {line}" for line in answers(study))]
    if found := warnings(study):
        parts.append("**Keep in mind**\n\n" + "\n".join(f"- {line}" for line in found))
    parts += [f"## {name}\n\n{markdown_table(rows)}\n\n{note}" for name, rows, note in sections(study)]
    parts += [f"## {p.title}\n\n![{p.title}]({name})\n\n{p.caption}" for name, p in figures.items()]
    parts.append("## How it was run\n\n" + "\n".join(f"- {term}: {text}" for term, text in circumstances(study)))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(rows: Table) -> str:
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *[["; ".join(cell) for cell in row] for row in rows[1]]]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
