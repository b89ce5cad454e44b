"""One picture of a run: rates ÷ bare against the number of services."""

import pathlib

from benchmarks import ratios, results, stats, targets

_APART = 1.08
_SHOWN = {
    "lbproxy/service": "through a ClusterIP",
    "lbproxy/direct": "to a pod address",
    "bare/again": "bare again (control)",
}


def draw(found: results.Results, path: pathlib.Path) -> None:
    """Draw short connections' ratios with their quartiles; nothing where there are none."""
    short = sorted(
        (each for each in found.traffic if (each.mode, each.path) == ("short", "pod") and each.services),
        key=lambda each: each.services,
    )
    if not short:
        return
    import matplotlib as mpl  # noqa: PLC0415 - heavy, and only here

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 - the backend must be chosen before

    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=150)
    for place, (variant, said) in enumerate(_SHOWN.items()):
        seen = [stats.summary(ratios.ratios(each.rounds, variant)) for each in short]
        medians = [one.median for one in seen]
        below = [one.median - one.low for one in seen]
        above = [one.high - one.median for one in seen]
        axes.errorbar(
            # Side by side, or the bars would hide each other.
            [each.services * _APART ** (place - 1) for each in short],
            medians,
            yerr=[below, above],
            label=said,
            marker="o",
            capsize=3,
        )
    axes.axhline(targets.SHORT.bound, color="grey", linestyle=":", label=f"target {targets.SHORT}")
    axes.set_xscale("log")
    axes.set_xticks([each.services for each in short], [f"{each.services:,}" for each in short])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("services × 4 endpoints")
    axes.set_ylabel("rate ÷ bare")
    axes.set_title("Short TCP connections, pod to pod on one node")
    axes.legend(loc="lower left", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
