"""The pictures of a report: SVG that stands in a page, in whose colours and type it is drawn, by day and by night."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from reporting.geometry import Geometry

WIDTH = 4.7  # inches, 338 units of the SVG: about what a phone shows, so that type keeps its size there
FONT = 10.5
# Colours that matplotlib never uses by itself: the page has the real ones
INK, SOFT, LINE = "#010101", "#020202", "#030303"
COLOURS = ["#040404", "#050505", "#060606", "#070707", "#080808", "#090909"]
CSS = {INK: "currentColor", SOFT: "var(--soft)", LINE: "var(--line)"}
CSS |= {colour: f"var(--c{number})" for number, colour in enumerate(COLOURS, 1)}
MARKERS = "osD^vP"
STYLE: Any = {
    "svg.fonttype": "none",  # text as text
    "text.parse_math": False,
    "font.size": FONT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": FONT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.2,
}


def picture(title: str, height: float, draw: Callable[[Figure], None]) -> str:
    """What `draw` makes of an empty figure, as an <svg> with neither size nor colours of its own."""
    content = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # the same picture has the same names in it every time
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    svg = re.sub(r" <defs>\s*<style.*?</style>\s*</defs>\n", "", svg, count=1, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return re.sub("#0[1-9]0[1-9]0[1-9]", lambda match: CSS[match[0]], svg)


def curves(metrics: list[dict[str, Any]], steps_of_epoch: float) -> str:
    """The loss and the learning rate over the steps, one below the other."""
    steps = [line["step"] for line in metrics]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for ax, key, label, colour in zip(axes, ["loss", "learning_rate"], ["loss", "learning rate"], COLOURS[:2], strict=True):
            numbers = [line[key] for line in metrics]
            ax.plot(steps, numbers, "o-", color=colour, markersize=3 if len(steps) < 60 else 0)
            ax.set_ylim(0, 1.08 * max(numbers))
            ax.set_ylabel(label)
            ax.yaxis.set_major_formatter("{x:g}")
            for epoch in range(1, math.ceil(steps[-1] / steps_of_epoch) + 1) if steps[-1] < 40 * steps_of_epoch else ():
                ax.axvline(epoch * steps_of_epoch, color=SOFT, linewidth=0.8, linestyle=":")
        axes[1].set_xlim(left=0)
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].set_xlabel("step (at a dotted line an epoch ends)")
        figure.align_ylabels()

    return picture("Loss and learning rate", 4.1, draw)


def by_layer(title: str, label: str, found: dict[str, Geometry], number: Callable[[Geometry], float], top: float = 0) -> str:
    """A number of each adapted matrix: the layers from left to right, a line for each kind of module. The axis holds `top`."""
    modules = grouped(found)

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for position, (module, layers) in enumerate(modules.items()):
            numbers = [number(geometry) for geometry in layers.values()]
            colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
            ax.plot(list(layers), numbers, color=colour, marker=marker, label=module, markersize=5, linewidth=1.2)
        ax.set_ylim(0, max(top, ax.get_ylim()[1]))
        integer_axis(ax, sorted({layer for layers in modules.values() for layer in layers}))
        ax.set_xlabel("layer")
        ax.set_ylabel(label)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(3, len(modules)))

    return picture(title, 2.6 + 0.2 * (math.ceil(len(modules) / 3) - 1), draw)


def spectra(title: str, found: dict[str, Geometry]) -> str:
    """The singular values of BA: a panel for each kind of module, a line for each layer, the deeper the stronger."""
    modules = grouped(found)
    columns = min(3, len(modules))
    rows = math.ceil(len(modules) / columns)
    deepest = max(max(layers) for layers in modules.values())
    highest = max(geometry.singular_values.max().item() for geometry in found.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.flat[len(modules) :]:
            ax.remove()
        for position, (ax, (module, layers)) in enumerate(zip(axes.flat, modules.items(), strict=False)):
            for layer, geometry in layers.items():
                values = geometry.singular_values.tolist()
                strength = 0.25 + 0.75 * layer / deepest if deepest else 1
                colour = COLOURS[position % len(COLOURS)]
                ax.plot(range(1, len(values) + 1), values, "o-", color=colour, alpha=strength, markersize=3.5, linewidth=1.3)
            ax.set_title(module)
            integer_axis(ax, list(range(1, max(len(g.singular_values) for g in layers.values()) + 1)))
            ax.set_ylim(0, 1.08 * highest or 1)
        figure.supxlabel("number of the singular value", fontsize=FONT)
        figure.supylabel("singular value", fontsize=FONT)

    return picture(title, 1 + 1.6 * rows, draw)


def similarities(title: str, found: dict[tuple[str, int], np.ndarray]) -> str:
    """phi of two runs for each adapted matrix: the layers from left to right, a row for each kind of module.

    The strongest colour is the highest phi of all.
    """
    modules, layers = list(dict.fromkeys(module for module, _ in found)), sorted({layer for _, layer in found})
    rows, columns = (max(phi.shape[axis] for phi in found.values()) for axis in (0, 1))
    highest = max(phi.max() for phi in found.values())

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(len(modules) + 1, len(layers), height_ratios=[*[rows] * len(modules), 1.2 * rows_of_scale])
        for (module, layer), phi in found.items():
            ax = figure.add_subplot(grid[modules.index(module), layers.index(layer)])
            cells(ax, phi / highest)
            ax.set(xlim=(0.5, columns + 0.5), ylim=(rows + 0.5, 0.5), xticks=[], yticks=[])
            if module == modules[0]:
                ax.set_title(str(layer))
            if layer == layers[0]:
                ax.set_ylabel(module, rotation=0, horizontalalignment="right", verticalalignment="center")
            if layer == layers[-1]:
                ax.set_xticks(sorted({1, columns}) if module == modules[-1] else [])
                ax.yaxis.tick_right()
                ax.set_yticks(sorted({1, rows}))
        scale = figure.add_subplot(grid[-1, :])
        cells(scale, np.linspace(0, 1, 21)[None])
        scale.set(yticks=[], xticks=[1, 11, 21], xticklabels=["0", f"{highest / 2:.2g}", f"{highest:.2g}"])
        scale.set_xlabel("phi (i down, j across)")
        figure.suptitle("layer", fontsize=FONT)

    side = WIDTH * 72 / (len(layers) + 1.5)  # of a panel, in units
    panel = max(side * rows / columns, 28)
    rows_of_scale = 9 * rows / panel
    return picture(title, (len(modules) * (panel + 8) + 90) / 72, draw)


def cells(ax: Axes, strengths: np.ndarray) -> None:
    """A matrix as a picture: the stronger the colour, the nearer to 1."""
    for (row, column), strength in np.ndenumerate(strengths):
        ax.add_patch(Rectangle((column + 0.55, row + 0.55), 0.9, 0.9, facecolor=COLOURS[0], alpha=float(strength), linewidth=0))
    ax.set(xlim=(0.5, strengths.shape[1] + 0.5), ylim=(strengths.shape[0] + 0.5, 0.5))
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set(visible=True, color=LINE)


def integer_axis(ax: Axes, numbers: list[int]) -> None:
    if len(numbers) <= 12:
        ax.set_xticks(numbers)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlim(numbers[0] - 0.3, numbers[-1] + 0.3)


def grouped(found: dict[str, Geometry]) -> dict[str, dict[int, Geometry]]:
    """module -> layer -> geometry, from `distilbert.transformer.layer.0.attention.q_lin` and its like."""
    modules: dict[str, dict[int, Geometry]] = {}
    for name, geometry in found.items():
        module, layer = place(name)
        modules.setdefault(module, {})[layer] = geometry
    return modules


def place(name: str) -> tuple[str, int]:
    """(the last part of a layer's name, the first number in it or 0)."""
    number = re.search(r"\.(\d+)\.", name)
    return name.rpartition(".")[2], int(number[1]) if number else 0
