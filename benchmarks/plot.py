"""Pictures of a run: a PNG of all of them, and each by itself as SVG that follows the page's colours."""

import collections.abc
import dataclasses
import io
import math
import pathlib
import re
import typing

from benchmarks import figures, remarks, results, rows, targets
from benchmarks.figure import CONTROL, LBPROXY, Figure, Group

# Of Okabe and Ito's palette: told apart by all kinds of eyes.
COLOURS = {
    LBPROXY: "#0072b2",
    "iptables": "#d55e00",
    "nftables": "#009e73",
    "bare": "#7a7a7a",
    CONTROL: "#cc79a7",
}
_SPARE = ("#b8860b", "#56b4e9")
# In SVG, what a browser shall colour as it does the text around: a colour that nothing else has.
_INK, _FAINT = "#1b1c1d", "#c9cacb"
_BESIDE = 1.04  # marks of the same number of services stand beside each other


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a picture: figures by number of services."""

    contestant: str
    dashed: bool
    points: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One picture; `solid` and `dashed` say what the kinds of lines are."""

    name: str
    title: str
    solid: str
    dashed: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False
    target: targets.Target | None = None

    @property
    def kinds(self) -> str:
        """What the kinds of lines are."""
        return f"solid: {self.solid} · dashed: {self.dashed}"

    @property
    def alt(self) -> str:
        """What the picture shows, for those who do not see it."""
        shown = [f"{self.title}, {self.unit}, against the number of services."]
        for line in self.lines:
            kind = self.dashed if line.dashed else self.solid
            values = ", ".join(f"{point.text} at {point.services:,}" for point in line.points)
            who = _OF_CONTROL if line.contestant == CONTROL else f"{line.contestant}, {kind}"
            shown.append(f"{who}: {values}.")
        return " ".join(shown)


def panels(found: results.Results) -> list[Panel]:
    """Return the pictures that there are figures for."""
    listed = figures.figures(found)
    short, waits, memory = (
        [one for one in listed if one.group is group]
        for group in (Group.SHORT, Group.PROGRAMMING, Group.MEMORY)
    )
    kind = f"{figures.MODES['short']}, {figures.PATHS['pod']}"
    dialled = [
        dataclasses.replace(one, what=share)
        for one in figures.absolutes(found)
        for share in ("p50", "p99")
        if one.topic == kind
        and one.services
        and one.what in (figures.measure("service", share), figures.measure("", share))
    ]
    made = (
        Panel(
            "rate",
            "Short connections: rate ÷ bare",
            figures.WAYS["service"],
            figures.WAYS["direct"],
            "÷ bare",
            _lines(short, figures.WAYS["service"], figures.WAYS["direct"]),
            target=targets.SHORT,
        ),
        Panel(
            "latency",
            "Short connections: time of one",
            "p50",
            "p99",
            "µs",
            _lines(dialled, "p50", "p99"),
            log=True,
        ),
        Panel(
            "programming",
            "A changed slice takes effect",
            "p50",
            "p99",
            "ms",
            _lines([one for one in waits if one.column != CONTROL], "quiet, p50", "quiet, p99"),
            log=True,
        ),
        Panel(
            "memory",
            "Memory",
            "agent (RSS)",
            "in the kernel (maps, or rules)",
            "MB",
            _lines(memory, figures.RESIDENT, figures.KERNEL_MEMORY),
        ),
    )
    return [panel for panel in made if panel.lines]


def _lines(listed: collections.abc.Iterable[Figure], solid: str, dashed: str) -> tuple[Line, ...]:
    points: dict[tuple[str, bool], list[Figure]] = {}
    for figure in listed:
        # Nothing that never came can be drawn.
        if figure.what in (solid, dashed) and figure.value != float("inf"):
            points.setdefault((figure.column, figure.what == dashed), []).append(figure)
    return tuple(
        Line(*key, tuple(sorted(of, key=lambda one: one.services))) for key, of in sorted(points.items())
    )


def colours(found: results.Results) -> dict[str, str]:
    """Return the colour of each contestant, of bare and of the control: the same in every picture."""
    chosen = {"bare": COLOURS["bare"], CONTROL: COLOURS[CONTROL]}
    spare = iter(_SPARE)
    for name in rows.headings(found):
        chosen[name] = COLOURS.get(name) or next(spare, COLOURS["bare"])
    return chosen


def labels(found: results.Results) -> dict[str, str]:
    """Return what the legend calls each contestant."""
    return {**rows.headings(found), "bare": "bare: no proxy", CONTROL: _OF_CONTROL}


_OF_CONTROL = "bare again ÷ bare: how far two runs of the same are apart"


def draw(found: results.Results, path: pathlib.Path) -> None:
    """Draw all panels into one PNG with a legend for all; without any, remove the PNG of before."""
    listed = panels(found)
    if not listed:
        path.unlink(missing_ok=True)
        return
    pyplot = _pyplot()
    columns = min(2, len(listed))
    height = -(-len(listed) // columns)
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            height, columns, figsize=(4.6 * columns, 3.1 * height + 0.5), dpi=150, squeeze=False
        )
        for axis, panel in zip(axes.flat, listed, strict=False):
            _draw_panel(axis, panel, colours(found))
            axis.set_title(f"{panel.title}\n{panel.kinds}", loc="left", fontsize=8.5)
        for axis in list(axes.flat)[len(listed) :]:
            axis.set_visible(False)
        _legend(figure, found, listed)
        figure.text(0.01, 0.008, origin(found), fontsize=7, va="bottom")
        figure.savefig(path, format="png", metadata={"Software": None})
        pyplot.close(figure)


def origin(found: results.Results) -> str:
    """Say, for a picture that is shown without its page, what it is of and whether it means anything."""
    said = [remarks.origin(found)]
    if found.profile == results.MEANS_NOTHING:
        said.append("smoke: means nothing")
    if not found.complete:
        said.append("incomplete")
    return " · ".join(said)


def svg(found: results.Results, panel: Panel) -> str:
    """Draw one panel as SVG to stand within HTML: text stays text, and colours are the page's variables."""
    pyplot = _pyplot()
    with pyplot.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": panel.name}):
        figure, axis = pyplot.subplots(figsize=(4.6, 2.9))
        _draw_panel(axis, panel, colours(found))
        figure.tight_layout()
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return _for_page(out.getvalue(), panel, colours(found))


_STYLE: dict[str, typing.Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _draw_panel(axis: typing.Any, panel: Panel, colour: collections.abc.Mapping[str, str]) -> None:
    names = list(dict.fromkeys(line.contestant for line in panel.lines))
    for line in panel.lines:
        shift = _BESIDE ** (names.index(line.contestant) - len(names) / 2)
        values = [point.value for point in line.points]
        bars = [
            [max(0.0, point.value - point.low) for point in line.points],
            # What reaches to "never" cannot be drawn either.
            [max(0.0, point.high - point.value) if point.high < math.inf else 0.0 for point in line.points],
        ]
        # Of a percentile near the end, the bar would be the whole sample.
        barred = panel.name in ("rate", "latency")
        axis.errorbar(
            [point.services * shift for point in line.points],
            values,
            yerr=bars if barred else None,
            color=colour[line.contestant],
            linestyle="--" if line.dashed else "-",
            marker="s" if line.dashed else "o",
            markersize=3.5,
            markerfacecolor="none" if line.dashed else colour[line.contestant],
            linewidth=1.3,
            elinewidth=0.8,
            capsize=2,
        )
    if panel.target is not None:
        axis.axhline(panel.target.bound, color=_INK, linestyle=":", linewidth=0.9)
        axis.text(0.02, 0.03, f"dotted: target {panel.target}", transform=axis.transAxes, fontsize=8)
    sizes = sorted({point.services for line in panel.lines for point in line.points})
    axis.set_xscale("log")
    axis.set_xticks(sizes, [_size(size) for size in sizes])
    axis.set_xlim(sizes[0] / 1.8, sizes[-1] * 1.8)
    axis.minorticks_off()
    if panel.log:
        axis.set_yscale("log")
        from matplotlib import ticker  # noqa: PLC0415 - as heavy as the rest of it

        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.12g}"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("services, 4 endpoints each")
    axis.set_ylabel(panel.unit)


def _size(services: int) -> str:
    return f"{services // 1000}k" if services >= 1000 and services % 1000 == 0 else f"{services:,}"


def _legend(figure: typing.Any, found: results.Results, listed: list[Panel]) -> None:
    from matplotlib import lines  # noqa: PLC0415 - as heavy as the rest of it

    there = {line.contestant for panel in listed for line in panel.lines}
    named = {name: said for name, said in labels(found).items() if name in there}
    handles = [
        lines.Line2D([], [], color=colours(found)[name], marker="o", markersize=4, label=said)
        for name, said in named.items()
    ]
    columns = 2 if len(handles) > 2 else len(handles)
    rows_of = -(-len(handles) // columns)
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.2 / height, 1, 1 - (0.2 * rows_of + 0.1) / height))
    figure.legend(handles=handles, loc="upper center", ncols=columns, frameon=False, fontsize=8)


def _pyplot() -> typing.Any:
    import matplotlib as mpl  # noqa: PLC0415 - heavy, and only here

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 - the backend must be chosen before

    return pyplot


def _for_page(text: str, panel: Panel, colour: collections.abc.Mapping[str, str]) -> str:
    """Keep the drawing of a file's text, with ids of this panel alone and the page's variables as colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    for name, value in colour.items():
        text = text.replace(value, f"var(--{variable(name)})")
    return (
        text.replace(_INK, "currentColor")
        .replace(_FAINT, "var(--faint)")
        .replace("<svg", '<svg role="img"', 1)
    )


def variable(name: str) -> str:
    """Return the name of the page's variable that holds a contestant's colour."""
    return re.sub(r"[^a-z0-9]", "-", name.lower())
