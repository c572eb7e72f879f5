"""Draw who imports whom, room by room: python -m benchmarks.imports writes docs/imports.svg.

The rooms and their order are those of tests/test_imports.py.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from tests.modules import MODULES, ROOT, imported
from tests.test_imports import ORDER, PACKAGE, layer

PICTURE = ROOT / "docs" / "imports.svg"
CELL, LEFT, TOP, BOTTOM = 20, 190, 180, 30
Pairs = Counter[tuple[str, str]]
"""For two rooms: how often a module of the first imports a module of the second."""


def room_pairs() -> Pairs:
    """Imports between two rooms of the package."""
    pairs: Pairs = Counter()
    for module in PACKAGE:
        for name in imported(module) & MODULES.keys():
            pair = room(module), room(name)
            if "" not in pair and pair[0] != pair[1]:
                pairs[pair] += 1
    return pairs


def room(module: str) -> str:
    """The room's name without the package's, which is empty for what no room has."""
    return layer(module)[0].removeprefix("nemo_skymoe").removeprefix(".") if module in PACKAGE else ""


def picture(pairs: Pairs) -> str:
    """An SVG: a row per room with the number of its imports from each room, all of them left of the diagonal."""
    rooms = [name for name in ORDER if any(name in pair for pair in pairs)]
    size = CELL * len(rooms)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + size} {TOP + size + BOTTOM}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{LEFT + size}" height="{TOP + size + BOTTOM}" fill="white"/>',
    ]
    for place, name in enumerate(rooms):
        middle = place * CELL + CELL // 2
        parts += [
            f'<path d="M{LEFT} {TOP + place * CELL}h{size}M{LEFT + place * CELL} {TOP}v{size}" stroke="#ddd"/>',
            f'<rect x="{LEFT + place * CELL}" y="{TOP + place * CELL}" width="{CELL}" height="{CELL}" fill="#bbb"/>',
            f'<text x="{LEFT - 6}" y="{TOP + middle + 4}" text-anchor="end">{name}</text>',
            f'<text transform="translate({LEFT + middle + 4} {TOP - 6}) rotate(-90)">{name}</text>',
        ]
    for (name, other), count in sorted(pairs.items()):
        x, y = LEFT + rooms.index(other) * CELL, TOP + rooms.index(name) * CELL
        opacity = 0.15 + 0.5 * min(count, 30) / 30
        parts += [
            f'<g><title>{name} imports {other}</title><rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
            f'fill="#36c" fill-opacity="{opacity:.2f}"/>'
            f'<text x="{x + CELL // 2}" y="{y + 14}" text-anchor="middle">{count}</text></g>'
        ]
    caption = "A row imports from a column, so many times. Nothing stands above the diagonal: imports point one way."
    parts += [
        f'<text x="{LEFT + size}" y="{TOP + size + 20}" text-anchor="end">{caption}</text>',
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def drawn(svg: str) -> set[tuple[str, str]]:
    """The pairs of rooms that a picture shows."""
    return set(re.findall(r"<title>(\S+) imports (\S+)</title>", svg))


def main(path: Path = PICTURE) -> None:
    path.write_text(picture(room_pairs()))
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
