"""A scene as a picture: for the terminal while it goes on, at the end, and as an SVG file."""

import io
import itertools
import pathlib

from rich import bar, box, console, panel, table, text

from lbproxy.demo import scene

WIDTH = 104
FRAME_COLUMNS = 6
NAME_COLUMNS, RATE_COLUMNS, TOTAL_COLUMNS = 14, 8, 9
LIVE_MOMENTS = 7
_LEVELS = " ▁▂▃▄▅▆▇█"
_COLOURS = ("cyan", "green", "magenta", "blue", "yellow")

# The whole file is one drawing: unlike rich's own frame it names no font to be fetched from elsewhere.
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def live(seen: scene.Scene, width: int = WIDTH) -> console.RenderableType:
    """Draw what is going on."""
    now = text.Text(f"▶ {seen.now}", style="bold")
    parts = (_backends(seen, width, finished=False), "", _totals(seen), now, "", _moments(seen, LIVE_MOMENTS))
    return _framed(seen, width, parts)


def final(seen: scene.Scene, width: int = WIDTH) -> console.RenderableType:
    """Draw what has been."""
    parts = (
        _backends(seen, width, finished=True), "", _totals(seen), "",
        _moments(seen, len(seen.moments)), "", findings(seen),
    )  # fmt: skip
    return _framed(seen, width, parts)


def findings(seen: scene.Scene) -> table.Table:
    """Draw the result as a table."""
    drawn = table.Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    drawn.add_column("result")
    drawn.add_column("found")
    drawn.add_column("")
    for finding in seen.findings:
        sign = text.Text("ok", style="green") if finding.ok else text.Text("FAILED", style="bold red")
        drawn.add_row(text.Text(finding.what), text.Text(finding.found), sign)
    return drawn


def save_svg(seen: scene.Scene, path: pathlib.Path) -> None:
    """Write the final picture into a file that refers to nothing outside it."""
    recorder = console.Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        legacy_windows=False,
    )  # fmt: skip
    recorder.print(final(seen))
    recorder.save_svg(str(path), title="lbproxy demo", code_format=_SVG, unique_id="lbproxy-demo")


def history(drawn: scene.Backend, slots: int, peak: float, columns: int) -> str:
    """Draw connections over time, a column at most as high as `peak` connections a slot."""
    top = len(_LEVELS) - 1
    heights = scene.condensed(drawn.history, slots, columns)
    # Whatever is not nothing shows.
    return "".join(_LEVELS[min(top, -int(-value * top // peak))] if value else " " for value in heights)


def _framed(seen: scene.Scene, width: int, parts: tuple[console.RenderableType, ...]) -> panel.Panel:
    return panel.Panel(
        console.Group(*parts), title=f"lbproxy demo · {seen.title}", width=width, padding=(1, 2),
        box=box.ROUNDED,
    )  # fmt: skip


def _backends(seen: scene.Scene, width: int, *, finished: bool) -> table.Table:
    room = width - FRAME_COLUMNS - NAME_COLUMNS - RATE_COLUMNS - TOTAL_COLUMNS - 4
    bar_columns = max(1, room // 3)
    history_columns = max(1, room - bar_columns)
    drawn = table.Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    drawn.add_column("backend", width=NAME_COLUMNS, no_wrap=True)
    drawn.add_column("of all" if finished else "now", width=bar_columns, no_wrap=True)
    drawn.add_column("share" if finished else "a second", justify="right", width=RATE_COLUMNS)
    drawn.add_column("total", justify="right", width=TOTAL_COLUMNS)
    drawn.add_column("connections over time", width=history_columns, no_wrap=True)
    slots = seen.slot + 1 if seen.connections else 0
    heights = (scene.condensed(backend.history, slots, history_columns) for backend in seen.backends)
    peak = max(itertools.chain.from_iterable(heights), default=0.0)
    values = {
        backend.name: seen.share(backend) if finished else seen.rate(backend) for backend in seen.backends
    }
    largest = max(values.values()) or 1.0
    for index, backend in enumerate(seen.backends):
        colour = _COLOURS[index % len(_COLOURS)]
        value = values[backend.name]
        drawn.add_row(
            _name(backend, colour),
            bar.Bar(largest, 0, value, width=bar_columns, color=colour),
            f"{value:.1%}" if finished else f"{value:,.0f}",
            f"{backend.total:,}",
            text.Text(history(backend, slots, peak or 1.0, history_columns), style=colour),
        )
    return drawn


def _name(backend: scene.Backend, colour: str) -> text.Text:
    if backend.state is scene.State.SERVING:
        return text.Text(f"{backend.name} on {backend.node}", style=f"bold {colour}")
    return text.Text(f"{backend.name} {backend.state}", style="bold red")


def _totals(seen: scene.Scene) -> text.Text:
    style = "bold red" if seen.failed else "bold green"
    found = text.Text(f"{seen.connections:,} connections in {seen.elapsed_s:.1f} s, ")
    return found.append(f"{seen.failed:,} failed", style=style)


def _moments(seen: scene.Scene, latest: int) -> table.Table:
    drawn = table.Table.grid(padding=(0, 2))
    drawn.add_column(justify="right", style="dim", no_wrap=True)
    drawn.add_column()
    for moment in seen.moments[-latest:]:
        drawn.add_row(f"{moment.at_s:.1f} s", text.Text(moment.text))
    return drawn
