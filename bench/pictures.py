"""Three kinds of picture as SVG, written by hand: heat maps, curves and bars.

A plotting library in the environment would be imported by avalanche with every trainer that starts (see
`strategies.lean_avalanche`), and a text file can be compared in a review.
"""

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#dd4477", "#66aa00", "#b82e2e")
CELL, MARGIN, GAP = 44, 76, 26
"""Side of a heat map's cell, room for its row names, space between two maps; pixels, as everything here."""
PER_LINE = 6
"""Heat maps, and names of a legend's column: more side by side would be too small to read on a page."""
WIDTH, HEIGHT = 360, 220
DASHES = ("", 'stroke-dasharray="7 4"', 'stroke-dasharray="2 3"')
"""Of lines whose colours begin anew."""


def _text(x: float, y: float, words: str, size: int = 11, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" {extra}>{escape(words)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    frame = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif">'
    )
    return "\n".join([frame, f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>', *parts, "</svg>\n"])


def heat_maps(maps: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Sequence[str]) -> str:
    """One map per name, side by side; values from 0 to 1, shown in percent."""
    parts: list[str] = []
    wide, high = CELL * len(columns) + GAP, 30 + CELL * len(rows) + 70
    for place, (name, values) in enumerate(maps.items()):
        left, top = MARGIN + place % PER_LINE * wide, place // PER_LINE * high
        parts.append(_text(left + CELL * len(columns) / 2, top + 18, name, 13, extra='font-weight="bold"'))
        parts += [
            _cell(left + CELL * j, top + 30 + CELL * i, value)
            for i, row in enumerate(values) for j, value in enumerate(row)
        ]  # fmt: skip
        under = top + 44 + CELL * len(rows)
        parts += [_slanted(left + CELL * (j + 0.5), under, column) for j, column in enumerate(columns)]
        if place % PER_LINE == 0:
            parts += [_text(MARGIN - 6, top + 34 + CELL * (i + 0.5), row, anchor="end") for i, row in enumerate(rows)]
    return _svg(MARGIN + min(len(maps), PER_LINE) * wide, -(-len(maps) // PER_LINE) * high, parts)


def _cell(x: float, y: float, value: float) -> str:
    light = 96 - 58 * min(max(value, 0.0), 1.0)
    box = f'<rect x="{x:.0f}" y="{y:.0f}" width="{CELL - 1}" height="{CELL - 1}" fill="hsl(212 60% {light:.0f}%)"/>'
    ink = 'fill="white"' if light < 60 else ""
    return box + _text(x + CELL / 2, y + CELL / 2 + 4, f"{100 * value:.0f}", 12, extra=ink)


def _slanted(x: float, y: float, words: str) -> str:
    return _text(x, y, words, anchor="end", extra=f'transform="rotate(-40 {x:.0f} {y:.0f})"')


def curves(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One panel per name with one line per series, over the updates 1, 2, ...; the axis begins at 0."""
    parts: list[str] = []
    for place, (name, series) in enumerate(panels.items()):
        parts += _panel(50 + place * (WIDTH + 60), name, series)
    names = list(next(iter(panels.values())))
    below = HEIGHT + 74
    for place, name in enumerate(names):
        x, y = 50 + 150 * (place // PER_LINE), below + 18 * (place % PER_LINE)
        parts.append(f'<path d="M{x} {y + 2} h24" {_stroke(place)}/>')
        parts.append(_text(x + 30, y + 6, name, anchor="start"))
    return _svg(len(panels) * (WIDTH + 60) + 20, below + 18 * min(len(names), PER_LINE) + 8, parts)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _stroke(place: int) -> str:
    again = DASHES[place // len(COLOURS) % len(DASHES)]
    return f'fill="none" stroke="{_colour(place)}" stroke-width="2" {again}'


def _panel(left: float, name: str, series: Mapping[str, Sequence[float]]) -> list[str]:
    top = max(max(values) for values in series.values()) or 1.0
    updates = max(len(values) for values in series.values())

    def at(update: int, value: float) -> tuple[float, float]:
        return left + WIDTH * (update + 0.5) / updates, 34 + HEIGHT * (1 - value / top)

    parts = [_text(left + WIDTH / 2, 18, name, 13), _axes(left)]
    parts += [_text(at(update, 0)[0], HEIGHT + 52, str(update + 1)) for update in range(updates)]
    parts += [_text(left - 6, at(0, share * top)[1] + 4, f"{share * top:.3g}", 10, "end") for share in (0, 0.5, 1)]
    for place, values in enumerate(series.values()):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(update, value) for update, value in enumerate(values)))
        parts.append(f'<polyline points="{points}" {_stroke(place)}/>')
    return parts


def _axes(left: float) -> str:
    return f'<path d="M{left:.0f} 34 V{34 + HEIGHT} H{left + WIDTH:.0f}" fill="none" stroke="#888"/>'


def bars(title: str, values: Mapping[str, float]) -> str:
    """One horizontal bar per name, in the order given."""
    left, step, longest = 220, 26, max(values.values())
    parts = [_text(left, 18, title, 13, "start", 'font-weight="bold"')]
    for place, (name, value) in enumerate(values.items()):
        y, length = 32 + step * place, WIDTH * value / longest
        parts.append(_text(left - 8, y + 14, name, anchor="end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.0f}" height="18" fill="{_colour(min(place, 1))}"/>')
        parts.append(_text(left + length + 6, y + 14, f"{value:.0f}", anchor="start"))
    return _svg(left + WIDTH + 60, 40 + step * len(values), parts)


def lines(panels: Mapping[str, Sequence[float]], x: Sequence[float], x_name: str) -> str:
    """One panel per name with one line over `x`, which begins at 0; the other axis begins at 0, too."""
    parts: list[str] = []
    for place, (name, values) in enumerate(panels.items()):
        left, top, right = 50 + place * (WIDTH + 60), max(values) * 1.1 or 1.0, max(x) or 1.0
        parts += [_text(left + WIDTH / 2, 18, name, 13), _axes(left)]
        parts += [_text(left - 6, 38 + HEIGHT * (1 - at), f"{at * top:.3g}", 10, "end") for at in (0, 0.5, 1)]
        parts += [_text(left + WIDTH * at, HEIGHT + 52, f"{at * right:.0f}") for at in (0, 0.5, 1)]
        points = " ".join(
            f"{left + WIDTH * a / right:.1f},{34 + HEIGHT * (1 - b / top):.1f}" for a, b in zip(x, values, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(0)}" stroke-width="1.5"/>')
    return _svg(len(panels) * (WIDTH + 60) + 20, HEIGHT + 84, [*parts, _text(50, HEIGHT + 74, x_name, anchor="start")])
