"""Line plots as SVG, without a script. CSS draws the first line by its class ``line-1``, and so on."""

import math
from collections.abc import Collection, Mapping, Sequence

from markupsafe import Markup

from vlm_lora.inference.pages import render

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 312, 48, 608, 34, 270
"""Of the drawing, and where the axes begin and end in it."""


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    shown: tuple[float, float],
    names: tuple[str, str],
    dots: Collection[str] = (),
) -> Markup:
    """An SVG element: lines by name through points (x, y) in order of x, axes with numbers, and a legend.

    Args:
        shown: the range of y that is to be seen; lines that leave it are cut off.
        names: those of x and y.
        dots: names of the lines whose points are marked.
    """
    xs = [x for points in lines.values() for x, _ in points]
    ticks = _ticks(*shown)
    first, last, low, high = min(xs), max(xs), ticks[0], ticks[-1]

    def across(x: float) -> float:
        return round(LEFT + (x - first) / ((last - first) or 1) * (RIGHT - LEFT), 1)

    def down(y: float) -> float:
        return round(BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP), 1)

    below = [tick for tick in _ticks(first, last) if first <= tick <= last and tick == int(tick)]
    return render(
        "line_plot.svg",
        edges=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        title=title,
        names=names,
        x_ticks=[(across(tick), f"{tick:,.0f}") for tick in below],
        y_ticks=[(down(tick), f"{tick:g}") for tick in ticks],
        lines={name: [(across(x), down(y)) for x, y in points] for name, points in lines.items()},
        dots=dots,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers around low..high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(start, max(end, start + 1) + 1)]
