"""One HTML page of a run that needs nothing but itself: no scripts, no fonts, no other files."""

import collections.abc
import html

from benchmarks import (
    answers,
    balancing_rows,
    elsewhere,
    figures,
    maglev_rows,
    packet_rows,
    plot,
    remarks,
    results,
    rows,
    sections,
    tables,
    verdicts,
)
from benchmarks.figure import CONTROL, Group

# Lighter where the page is dark; otherwise as in the PNG.
_DARK = {
    "lbproxy": "#56b4e9",
    "iptables": "#f08a4b",
    "nftables": "#3ccf9f",
    "bare": "#a8a8a8",
    CONTROL: "#e3a1c6",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1d; --paper: #fff; --soft: #f3f4f6; --line: #d5d8dc;
  --dim: #5b6168; --faint: #d5d8dc; --met: #1a7f37; --missed: #b3261e; --warn: #fff4d6; %(light)s }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #15171a; --soft: #1f2226;
  --line: #3a3f45; --dim: #a0a7ae; --faint: #34383d; --met: #5fd07e; --missed: #ff8a80; --warn: #3b3011;
  %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .25rem }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem }
p, ul { margin: .4rem 0; max-width: 48rem }
ul { padding-left: 1.2rem }
a { color: inherit }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; max-width: none }
.answer { font-size: 1.08rem }
.dim, small, caption { color: var(--dim) }
.warning { background: var(--warn); border-radius: .3rem; padding: .2rem .5rem; margin: .2rem 0 }
summary h3 { display: inline }
dt { color: var(--dim) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 24rem), 1fr)); gap: 1rem }
figure { margin: .75rem 0; max-width: 36rem }
figure svg { display: block; width: 100%%; height: auto; font-family: system-ui, sans-serif }
figcaption { font-size: .85rem; line-height: 1.4 }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; padding: 0; list-style: none; font-size: .9rem }
.legend span { display: inline-block; width: 1.1rem; height: .25rem; margin-right: .4rem;
  vertical-align: middle }
.scroll { overflow-x: auto; margin: .5rem 0; border: 1px solid var(--line); border-radius: .3rem }
.scroll:focus-visible { outline: 2px solid var(--lbproxy) }
table { border-collapse: collapse; font-size: .88rem; width: 100%% }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; overflow-wrap: normal }
thead th { background: var(--soft); font-weight: 600; min-width: 5rem; vertical-align: bottom }
tbody th { font-weight: 400; min-width: 11rem }
tbody tr:last-child > * { border-bottom: 0 }
td { min-width: 5rem }
td small { display: block; font-size: .8rem }
.met { color: var(--met) }
.missed { color: var(--missed) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0 }
dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer; margin: .5rem 0 }
@media (max-width: 40rem) { body { padding: .5rem .9rem 3rem } dl { grid-template-columns: 1fr }
  dd { margin-bottom: .4rem } h1 { font-size: 1.4rem } tbody th { min-width: 7.5rem } }
@media print { .scroll { overflow: visible } }
"""
_TITLE = "lbproxy: what it costs, measured"
# Many lines that few want: closed until somebody asks.
_FOLDED = (Group.OTHERS, Group.PATHS, Group.OUTSIDE)
_TRUST = "How far can I trust this run?"


def render(found: results.Results) -> str:
    """Return the page."""
    asked = answers.answers(found)
    pictures = {panel.name: panel for panel in plot.panels(found)}
    parts = [
        f"<h1>{_text(_TITLE)}</h1>",
        f'<p class="dim">{_text(remarks.remarks(found)[0].text)}</p>',
        *_remarks(found, warning=True),
        *_contents([*(answer.question for answer in asked), _TRUST]),
        *_contestants(found),
        *_targets(found),
        *(part for answer in asked for part in _answer(answer, found, pictures)),
        *_trust(found),
    ]
    return "\n".join([_head(found), *parts, "</main>", "</body>", "</html>", ""])


def _head(found: results.Results) -> str:
    light = {plot.variable(name): value for name, value in plot.colours(found).items()}
    style = _STYLE % {
        "light": " ".join(f"--{name}: {value};" for name, value in light.items()),
        "dark": " ".join(f"--{name}: {_DARK[name]};" for name in light if name in _DARK),
    }
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(_TITLE)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            "<main>",
        ]
    )


def _contents(questions: collections.abc.Iterable[str]) -> list[str]:
    links = (f'<li><a href="#{_anchor(each)}">{_text(each)}</a></li>' for each in questions)
    return [f'<nav aria-label="Questions"><ul>{"".join(links)}</ul></nav>']


def _contestants(found: results.Results) -> list[str]:
    if not found.contestants:
        return []
    items = [
        f"<li><strong>{_text(rows.heading(each))}</strong>: {_text(rows.described(each))}.</li>"
        for each in found.contestants
    ]
    bare = "<li><strong>bare</strong>: client and server where nothing is programmed: the limit.</li>"
    return ["<h2>Who is compared</h2>", "<ul>", *items, bare, "</ul>"]


def _targets(found: results.Results) -> list[str]:
    if not verdicts.judged(found):
        return []
    said = f'<p class="dim">{_prose(verdicts.SAID)}</p>'
    return [f"<h2>{verdicts.HEADING}</h2>", said, _table(verdicts.table(found), verdicts.HEADING)]


def _answer(
    answer: answers.Answer, found: results.Results, pictures: collections.abc.Mapping[str, plot.Panel]
) -> list[str]:
    parts = [f'<h2 id="{_anchor(answer.question)}">{_text(answer.question)}</h2>']
    parts += [f'<p class="answer">{_text(sentence)}</p>' for sentence in answer.sentences[:1]]
    if answer.sentences[1:]:
        parts.append(_list(answer.sentences[1:]))
    if not answer.sentences:
        parts.append("<p>This run has no figures of lbproxy for it.</p>")
    drawn = [pictures[name] for name in answer.pictures if name in pictures]
    if drawn:
        parts += [_legend(found, drawn), '<div class="figures">']
        parts += [_picture(found, panel) for panel in drawn]
        parts.append("</div>")
    for group in answer.groups:
        parts += _group(group, found)
    if Group.SHORT in answer.groups:
        parts += _packets(found)
    return parts


def _group(group: Group, found: results.Results) -> list[str]:
    chosen = [figure for figure in figures.figures(found) if figure.group is group]
    if not chosen:
        return []
    heading = f"<h3>{_text(group)}</h3>"
    folded = group in _FOLDED
    parts = [f"<details><summary>{heading}</summary>" if folded else heading]
    if said := sections.caption(group, found):
        parts.append(f'<p class="dim">{_text(said)}</p>')
    parts.append(_table(rows.table(chosen, rows.headings(found)), str(group)))
    return [*parts, "</details>"] if folded else parts


def _packets(found: results.Results) -> list[str]:
    parts = []
    if found.packets:
        parts += [f"<h3>{Group.PACKETS}, ns</h3>", f'<p class="dim">{_prose(sections.of_packets(found))}</p>']
        parts.append(_table(packet_rows.table(packet_rows.lines(found)), str(Group.PACKETS)))
    for ports in found.ports:
        said, table = packet_rows.ports(ports)
        parts += ["<h3>Ports to masquerade with</h3>", f'<p class="dim">{_text(said)}</p>']
        parts.append(_table(table, "Ports to masquerade with"))
    if found.maglev:
        parts.append("<details><summary><h3>Maglev tables</h3></summary>")
        for each in maglev_rows.parts(found):
            if isinstance(each, str):
                parts.append(f'<p class="dim">{_prose(each)}</p>')
            else:
                parts.append(_table(each, "Maglev tables"))
        parts.append("</details>")
    if found.balancing:
        parts += [f"<h3>{balancing_rows.HEADING}</h3>"]
        parts += [f'<p class="dim">{_prose(balancing_rows.said(found))}</p>']
        parts += [_table(balancing_rows.table(found.balancing), balancing_rows.HEADING)]
        parts += [f"<pre>{_text(balancing_rows.bars(found.balancing))}</pre>"]
    if found.traffic:
        parts += [f"<details><summary><h3>{Group.RATES}: every variant</h3></summary>"]
        parts += [_table(sections.rates(found), str(Group.RATES)), "</details>"]
    return parts


def _remarks(found: results.Results, *, warning: bool) -> list[str]:
    """List the warnings, which nobody must read past, or all other remarks."""
    mark = ' class="warning"' if warning else ""
    items = [
        f"<li{mark}>{_text(each.text)}</li>" for each in remarks.remarks(found) if each.warning == warning
    ]
    return ["<ul>", *items, "</ul>"] if items else []


def _trust(found: results.Results) -> list[str]:
    parts = [
        f'<h2 id="{_anchor(_TRUST)}">{_TRUST}</h2>',
        f'<p class="answer">{_text(answers.trust(found))}</p>',
    ]
    parts += _remarks(found, warning=False)
    parts += _group(Group.ALIKE, found)
    if any(not each.real for each in found.contestants):
        if alike := elsewhere.alike(found):
            parts += [
                f"<h3>{_text(elsewhere.HEADING_ALIKE)}</h3>",
                f'<p class="dim">{_prose(alike.said)}</p>',
            ]
            parts.append(_table(alike.table, elsewhere.HEADING_ALIKE))
        parts += [f"<details><summary><h3>{_text(elsewhere.HEADING)}</h3></summary>"]
        parts += [f'<p class="dim">{_prose(elsewhere.SAID)}</p>']
        parts += [_table(elsewhere.table(), elsewhere.HEADING), "</details>"]
    parts += ["<h3>How it was measured</h3>", f"<p>{_prose(sections.KEY)}</p>"]
    parts += ["<h3>What it does not show</h3>", _list(sections.not_shown(found))]
    parts += ["<h3>Machine</h3>", _facts(found.machine), "<h3>Versions</h3>", _facts(found.software)]
    if found.settings:
        parts += ["<h3>Settings</h3>", _facts({name: str(value) for name, value in found.settings.items()})]
    table = sections.maps(found)
    if table.rows:
        parts += ["<details><summary><h3>BPF maps of lbproxy</h3></summary>"]
        parts += [_table(table, "BPF maps"), "</details>"]
    return parts


def _legend(found: results.Results, drawn: collections.abc.Iterable[plot.Panel]) -> str:
    there = {line.contestant for panel in drawn for line in panel.lines}
    items = [
        f'<li><span style="background: var(--{plot.variable(name)})"></span>{_text(said)}</li>'
        for name, said in plot.labels(found).items()
        if name in there
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _picture(found: results.Results, panel: plot.Panel) -> str:
    drawn = plot.svg(found, panel).replace("<svg", f'<svg role="img" aria-label="{_text(panel.alt)}"', 1)
    said = f"<strong>{_text(panel.title)}</strong><br>{_text(panel.kinds)}"
    return f"<figure><figcaption>{said}</figcaption>{drawn}</figure>"


def _table(table: tables.Table, name: str) -> str:
    head = "".join(f'<th scope="col">{_text(each)}</th>' for each in table.head)
    body = "\n".join(map(_row, table.rows))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(name)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _row(row: tuple[tables.Cell, ...]) -> str:
    cells = "".join(f"<td{_class(cell)}>{_cell(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{_cell(row[0])}</th>{cells}</tr>'


def _class(cell: tables.Cell) -> str:
    return {tables.Look.MET: ' class="met"', tables.Look.MISSED: ' class="missed"'}.get(cell.look, "")


def _cell(cell: tables.Cell) -> str:
    text = _text(cell.text)
    if text and cell.look is tables.Look.FIGURE:
        text = f"<strong>{text}</strong>"
    elif text and cell.look is tables.Look.CODE:
        text = f"<code>{text}</code>"
    return f"{text} <small>{_text(cell.more)}</small>" if cell.more else text


def _facts(facts: collections.abc.Mapping[str, str]) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def _list(lines: collections.abc.Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _anchor(question: str) -> str:
    letters = question.lower().replace(" ", "-")
    return "".join(letter for letter in letters if letter.isalnum() or letter == "-")


def _prose(text: str) -> str:
    """Escape text that is Markdown elsewhere: what stands between stars is emphasised."""
    parts = _text(text).split("*")
    return "".join(f"<em>{part}</em>" if place % 2 else part for place, part in enumerate(parts))


def _text(text: str) -> str:
    return html.escape(str(text))
