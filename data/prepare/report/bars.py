"""Bars as inline SVG that takes its colours from the page: histograms with their cuts, and shares of a whole."""

import html
from collections.abc import Sequence
from itertools import accumulate

WIDTH, HEIGHT = 320, 150  # of a histogram, in units of its own
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22  # margins
TICKS = 4
COLOURS = 8


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], cuts: Sequence[float]) -> str:
    """Counts between neighbouring edges as bars of one width, whatever the distance of the edges, and cuts as lines."""
    wide, high, most = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, max([*counts, 1])
    step, base = wide / max(len(counts), 1), HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for k, count in enumerate(counts):
        if count:
            tall = max(1.0, high * count / most)
            words = f"{short(edges[k])} to {short(edges[k + 1])}: {count:,}"
            parts.append(
                f'<rect x="{LEFT + k * step:.1f}" y="{base - tall:.1f}" width="{max(step - 1, 0.5):.1f}" '
                f'height="{tall:.1f}"><title>{words}</title></rect>'
            )
    for k in sorted({round(k * len(counts) / TICKS) for k in range(TICKS + 1)}):
        anchor = "start" if k == 0 else "end" if k == len(counts) else "middle"
        x = LEFT + k * step
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="{anchor}">{short(edges[k])}</text>')
    parts.append(f'<text x="{LEFT - 5}" y="{TOP + 9}" text-anchor="end">{short(most)}</text>')
    for cut in cuts:
        x = LEFT + step * place(edges, cut)
        parts.append(
            f'<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"><title>cut at {cut:.4g}</title></line>'
        )
    return _svg(title, WIDTH, HEIGHT, parts)


def place(edges: Sequence[float], value: float) -> float:
    """Where a value lies, in bars from the left; between two edges in proportion."""
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        if value < high:
            return k + max(value - low, 0) / (high - low)
    return len(edges) - 1


def shares(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    """One bar, divided in proportion."""
    total, wide = sum(values) or 1, 1000
    starts = accumulate((value / total * wide for value in values), initial=0.0)
    parts = [
        f'<rect x="{start:.1f}" y="0" width="{value / total * wide:.1f}" height="20" '
        f'style="fill: var(--s{k % COLOURS})"><title>{html.escape(name)}: {value:,}</title></rect>'
        for k, (name, value, start) in enumerate(zip(names, values, starts, strict=False))
        if value
    ]
    return _svg(title, wide, 20, parts, 'preserveAspectRatio="none" class="shares"')


def short(number: float, gap: str = "") -> str:
    """As a label: 0.25, 512, 1.5k, 3M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{gap}{unit}"
    return f"{number:.3g}{gap}"


def _svg(title: str, width: int, height: int, parts: list[str], more: str = "") -> str:
    label = html.escape(title)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" {more}>{"".join(parts)}</svg>'
