"""Charts as inline SVG, without scripts and without inline styles: colours come from the style sheet's classes."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 72, 28
LEVELS = 7
"""Steps of the heat map's colour scale: classes `heat-0` to `heat-6`."""

Series = Sequence[tuple[float, float]]


def lines(title: str, series: dict[str, Series], x_label: str, y_label: str) -> Markup:
    """Line chart of one or more series of (x, y); empty where there is nothing to draw."""
    points = [point for each in series.values() for point in each]
    if not points:
        return Markup("")
    xs, ys = _range(x for x, _ in points), _range(y for _, y in points)
    parts = [*_grid(xs, ys, x_label, y_label)]
    for number, (name, each) in enumerate(series.items()):
        placed = [(_x(x, xs), _y(y, ys)) for x, y in each]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line series-{number}" points="{path}"/>')
        parts += [f'<circle class="dot series-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in _few(placed)]
        parts.append(_legend(len(series) - number, number, name))
    return _svg(title, parts, WIDTH, HEIGHT)


def _few(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Dots only where they can be told apart."""
    return points if len(points) <= 40 else points[-1:]


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    low, high = min(found), max(found)
    pad = 0.0 if high > low else abs(low) / 2 or 0.5  # a flat line lies in the middle
    return low - pad, high + pad


def _x(value: float, span: tuple[float, float]) -> float:
    return LEFT + (value - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - 12)


def _y(value: float, span: tuple[float, float]) -> float:
    return 26 + (1 - (value - span[0]) / (span[1] - span[0])) * (HEIGHT - BOTTOM - 34)


def _grid(xs: tuple[float, float], ys: tuple[float, float], x_label: str, y_label: str) -> list[str]:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = ys[0] + share * (ys[1] - ys[0])
        y = _y(value, ys)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    for value, anchor in ((xs[0], "start"), (xs[1], "end")):
        x = f'x="{_x(value, xs):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {x}>{value:g}</text>')
    parts.append(f'<text class="label" x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="{LEFT}" y="12">{escape(y_label)}</text>')
    return parts


def _legend(from_the_right: int, number: int, name: str) -> str:
    """Above the plot, side by side: a line at the top runs through nothing."""
    x = WIDTH - 150 * from_the_right
    return (
        f'<rect class="dot series-{number}" x="{x}" y="4" width="10" height="10"/>'
        f'<text class="label" x="{x + 15}" y="13">{escape(name)}</text>'
    )


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]]) -> Markup:
    """A dot with its interval per row of (name, mean, low, high), around a line at zero."""
    if not rows:
        return Markup("")
    span = _range([0.0, *(value for _, _, low, high in rows for value in (low, high))])
    height = 30 + 26 * len(rows)
    zero = _wide(0.0, span)
    parts = [f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="6" y2="{height - 20}"/>']
    parts.append(f'<text class="tick" x="{zero:.1f}" y="{height - 6}" text-anchor="middle">0</text>')
    for number, (name, mean, low, high) in enumerate(rows):
        y = 20 + 26 * number
        kind = "better" if high < 0 else "worse" if low > 0 else "even"
        parts.append(f'<text class="label" x="0" y="{y + 4}">{escape(name)}</text>')
        x1, x2 = _wide(low, span), _wide(high, span)
        parts.append(f'<line class="span {kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="mean {kind}" cx="{_wide(mean, span):.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text class="tick" x="{WIDTH}" y="{y + 4}" text-anchor="end">{mean:+.3f}</text>')
    return _svg(title, parts, WIDTH, height)


def bars(title: str, shares: Sequence[tuple[str, float]]) -> Markup:
    """A bar per share of a whole; empty where there are none."""
    parts = []
    for number, (name, share) in enumerate(shares):
        y, width = 8 + 24 * number, (WIDTH - 260) * share
        parts.append(f'<text class="label" x="190" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="dot series-0" x="200" y="{y}" width="{width:.1f}" height="16"/>')
        parts.append(f'<text class="tick" x="{206 + width:.1f}" y="{y + 13}">{share:.0%}</text>')
    return _svg(title, parts, WIDTH, 24 * len(shares) + 12) if shares else Markup("")


def _wide(value: float, span: tuple[float, float]) -> float:
    return 130 + (value - span[0]) / (span[1] - span[0]) * (WIDTH - 130 - 80)


def _svg(title: str, parts: Sequence[str], width: int, height: int) -> Markup:
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def level(value: float, low: float, high: float) -> int:
    """The step of the colour scale for `value` between `low` and `high`."""
    if high <= low:
        return 0
    return min(LEVELS - 1, int(LEVELS * (value - low) / (high - low)))
