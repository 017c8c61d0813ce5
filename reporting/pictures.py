"""The pictures of a report: SVG in the colours of the page around it, light or dark."""

import io
import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reporting.results import VALIDATION, Layers

WIDTH = 4.7  # inches, 338 units of the SVG: about the width of a phone, so that text keeps its size there
FONT_SIZE = 10.5
# Matplotlib needs fixed colours. These stand for the page's own, which differ in light and in dark.
INK, SOFT, LINE = "#010101", "#020202", "#030303"
COLOURS = ["#040404", "#050505", "#060606", "#070707", "#080808", "#090909"]
IN_PAGE = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS, 1)},
    "'DejaVu Sans'": "system-ui, sans-serif",
    '<g id="': '<g class="',  # every picture has the same ids, and a page may have each only once
}
MARKERS = "osD^vP"
STYLE: Any = {
    "svg.fonttype": "none",  # text as text
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": FONT_SIZE,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def svg(figure: Figure, title: str) -> str:
    """A figure as an <svg> element that is as wide as its place in the page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids inside are unique to the picture, and the same every time
        figure.savefig(file, format="svg", transparent=True)
    content = file.getvalue().partition("</defs>")[2]  # up to there: size, date, and a style that would apply to the page
    for old, new in IN_PAGE.items():
        content = content.replace(old, new)
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{title}">{content}'


@matplotlib.rc_context(STYLE)
def curves(metrics: list[dict[str, float]]) -> str:
    """The loss, the learning rate and, if there is one, the score of the validation part over the steps, one below another."""
    keys = ("loss", "learning_rate", VALIDATION)
    shown = {key: points for key in keys if (points := [(line["step"], line[key]) for line in metrics if key in line])}
    figure = Figure((WIDTH, 4.1 + 1.6 * (len(shown) - 2)), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, height_ratios=[2, 1, 1.5][: len(shown)])
    for ax, (key, points), colour in zip(axes, shown.items(), COLOURS, strict=False):
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, "o-", color=colour, markersize=3 if len(steps) < 60 else 0)
        ax.set_ylim(0, 1.08 * max(values))
        ax.set_ylabel(key.replace("_", " "))
        ax.yaxis.set_major_formatter("{x:g}")
    axes[-1].set_xlim(left=0)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("step")
    figure.align_ylabels()
    return svg(figure, "Loss and learning rate")


@matplotlib.rc_context(STYLE)
def by_layer(title: str, label: str, layers: Layers, quantity: str, top: float = 0) -> str:
    """A field of Geometry over the layers, a line for each kind of module. The axis reaches at least to `top`."""
    figure = Figure((WIDTH, 2.6 + 0.2 * (math.ceil(len(layers) / 3) - 1)), layout="constrained")
    ax = figure.subplots()
    for position, (kind, numbered) in enumerate(layers.items()):
        values = [getattr(layer, quantity) for layer in numbered.values()]
        colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
        ax.plot(list(numbered), values, color=colour, marker=marker, label=kind, markersize=5, linewidth=1.2)
    ax.set_ylim(0, max(top, ax.get_ylim()[1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.2)
    return svg(figure, title)


@matplotlib.rc_context(STYLE)
def spectra(title: str, layers: Layers) -> str:
    """The singular values of BA: a panel for each kind of module, a line for each layer, stronger the deeper it is."""
    columns = min(3, len(layers))
    rows = math.ceil(len(layers) / columns)
    deepest = max(max(numbered) for numbered in layers.values())
    figure = Figure((WIDTH, 1 + 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(layers) :]:
        ax.remove()
    for position, (ax, (kind, numbered)) in enumerate(zip(axes.flat, layers.items(), strict=False)):
        for number, layer in numbered.items():
            values = layer.singular_values.tolist()
            colour, alpha = COLOURS[position % len(COLOURS)], 0.25 + 0.75 * number / deepest if deepest else 1
            ax.plot(range(1, len(values) + 1), values, "o-", color=colour, alpha=alpha, markersize=3.5, linewidth=1.3)
        ax.set_title(kind)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylim(bottom=0)  # of every panel, and last: it ends the scaling of the shared axis to the lines
    figure.supxlabel("number of the singular value", fontsize=FONT_SIZE)
    figure.supylabel("singular value", fontsize=FONT_SIZE)
    return svg(figure, title)
