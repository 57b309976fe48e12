"""Draws docs/figures/folders.svg: the folders of Noctule in the order of their imports. Run by ``make figures``."""

import ast
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "figures" / "folders.svg"
BOX, GAP, ROW, MARGIN = 104, 26, 74, 16
"""Width of a box, space between two, height of a row with its arrows, and the edge, in the drawing's units."""


def imports() -> dict[str, set[str]]:
    """Folder -> the folders that its modules import; those that are reached through another one are left out."""
    graph = grimp.build_graph("noctule", cache_dir=None)
    folders = sorted(name for name in graph.find_children("noctule") if not name.endswith("._native"))
    direct = {
        a.split(".")[1]: {
            b.split(".")[1]
            for b in folders
            if a != b and graph.direct_import_exists(importer=a, imported=b, as_packages=True)
        }
        for a in folders
    }
    return {a: {b for b in below if not any(b in _all_below(c, direct) for c in below)} for a, below in direct.items()}


def _all_below(folder: str, direct: dict[str, set[str]]) -> set[str]:
    return {each for near in direct[folder] for each in {near, *_all_below(near, direct)}}


def rows(below: dict[str, set[str]]) -> list[list[str]]:
    """The folders, each one row further down than the deepest of those it imports, neighbours near their imports."""
    levels: list[list[str]] = []
    place: dict[str, float] = {}
    while len(place) < len(below):
        ready = [folder for folder, needs in below.items() if folder not in place and needs <= place.keys()]
        ready.sort(key=lambda folder: (sum(place[each] for each in below[folder]) / max(len(below[folder]), 1), folder))
        levels.append(ready)
        place.update({folder: at - (len(ready) - 1) / 2 for at, folder in enumerate(ready)})
    return levels


def question(folder: str) -> str:
    """The first line of the folder's docstring."""
    return (ast.get_docstring(ast.parse((ROOT / "src/noctule" / folder / "__init__.py").read_text())) or "").split(
        "\n"
    )[0]


def drawing() -> str:
    """The SVG: what is imported lies above; an arrow leads to each folder that is imported directly."""
    below = imports()
    levels = rows(below)
    width = max(map(len, levels)) * (BOX + GAP) - GAP + 2 * MARGIN
    at = {
        folder: (width / 2 + (column - (len(row) - 1) / 2) * (BOX + GAP), MARGIN + 17 + number * ROW)
        for number, row in enumerate(levels)
        for column, folder in enumerate(row)
    }
    arrows = "".join(_arrow(at[a], at[b]) for a, needs in sorted(below.items()) for b in sorted(needs))
    boxes = "".join(
        f"<g><title>{question(folder).replace('&', '&amp;').replace('<', '&lt;')}</title>"
        f'<rect x="{x - BOX / 2:g}" y="{y - 17:g}" width="{BOX}" height="34" rx="6"/>'
        f'<text fill="#fff" x="{x:g}" y="{y + 5:g}">{folder}</text></g>'
        for folder, (x, y) in at.items()
    )
    height = 2 * MARGIN + 34 + (len(levels) - 1) * ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="14" text-anchor="middle">'
        "<title>The folders of Noctule in the order of their imports</title>"
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8b949e"/></marker></defs>'
        f'<g fill="none" stroke="#8b949e" stroke-opacity=".7">{arrows}</g><g fill="#2f81f7">{boxes}</g></svg>\n'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (u, v) = start, end
    return f'<path d="M{x:g} {y - 17:g}C{x:g} {y - 45:g} {u:g} {v + 48:g} {u:g} {v + 20:g}" marker-end="url(#a)"/>'


if __name__ == "__main__":
    FIGURE.write_text(drawing())
