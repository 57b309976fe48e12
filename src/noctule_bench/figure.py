"""The picture of the README: time and memory of one layer's training step against density."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noctule.core.errors import UsageError
from noctule.core.optim import param_groups
from noctule.measure import footprint
from noctule.sparse.layers import SparseLinear
from noctule_bench import program
from noctule_bench.contestants import BF16, LINEAR, NOCTULE, ONEDNN
from noctule_bench.layer_steps import ROW_MAJOR

ROWS = {
    LINEAR.name: ("nn.Linear, float32", "#8b949e"),
    ONEDNN.name: ("oneDNN, float32", "#b8860b"),
    BF16.name: ("nn.Linear, bfloat16", "#d1495b"),
    NOCTULE.name: ("Noctule, float32", "#2f81f7"),
}
"""Row of `layers` -> its name in the picture and its colour, which reads on white and on black."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 300, 52, 24, 40, 46
"""Of one panel, in its own units."""

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Row -> (density, value) in the order of densities."""


def figure(*, log: Path = Path("benchmarks/results/layers.jsonl"), threads: int = 1, out: Path | None = None) -> None:
    """Draw time and memory of a layer's training step against density, from the lines of `noctule bench layers`.

    Args:
        log: the lines of `layers`; bytes are counted anew.
        threads: which of them to draw.
        out: the SVG file to write.
    """
    lines = [
        line
        for line in program.read(log, "layers")
        if line["threads"] == threads and line["row"] in ROWS and line["layout"] == ROW_MAJOR and "error" not in line
    ]
    sizes = [line["features"][0] for line in lines]
    if out is None or not lines:
        raise UsageError(f"say --out FILE.svg and a --log of `noctule bench layers --threads {threads}`, got {log}")
    size = min(sizes)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for line in sorted((line for line in lines if line["features"][0] == size), key=lambda line: line["density"]):
        taken[line["row"]].append((line["density"], line["timing"]["median_seconds"] * 1e3))
    held = {
        name: [(density, _held_bytes(name, size, density) / 1e6) for density, _ in points]
        for name, points in taken.items()
        if name != ONEDNN.name  # it holds what nn.Linear holds
    }
    batch = lines[0]["batch"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(drawing({f"milliseconds, batch {batch}": taken, "megabytes held, with momentum": held}, size))


def _held_bytes(row: str, size: int, density: float) -> int:
    """Weights, indices, gradients and momentum of one layer."""
    if row == NOCTULE.name:
        layer: nn.Module = SparseLinear(size, size, density=density)
    else:
        layer = nn.Linear(size, size, dtype=torch.bfloat16 if row == BF16.name else torch.float32)
    optimizer = torch.optim.SGD(param_groups(layer), lr=0.1, momentum=0.9)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return footprint(layer, optimizer).total_bytes


def drawing(panels: Mapping[str, Series], size: int) -> str:
    """An SVG of panels beside each other, both axes logarithmic."""
    inside = "".join(_panel(title, series, at * WIDTH) for at, (title, series) in enumerate(panels.items()))
    legend = "".join(
        f'<line x1="{x}" x2="{x + 22}" y1="16" y2="16" stroke="{color}" stroke-width="3"/><text x="{x + 28}" y="20">{name}</text>'
        for x, (name, color) in zip(range(LEFT, 4000, 178), ROWS.values(), strict=False)
    )
    title = f"A training step of one {size} x {size} layer against the density of its weights"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * WIDTH} {HEIGHT + 24}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#7d8590"><title>{title}</title>'
        f'{legend}<g transform="translate(0 24)">{inside}</g></svg>\n'
    )


def _panel(title: str, series: Series, offset: int) -> str:
    points = [point for line in series.values() for point in line]
    x = _scale([density for density, _ in points] + [1.0], LEFT, WIDTH - RIGHT)
    y = _scale([value for _, value in points], HEIGHT - BOTTOM, TOP)
    parts = [f'<text x="{LEFT}" y="{TOP - 14}" font-weight="600">{title}</text>']
    for value in _ticks([density for density, _ in points] + [1.0]):
        parts.append(f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{100 * value:g} %</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 8}" text-anchor="middle">weights kept</text>')
    for value in _ticks([value for _, value in points]):
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
        parts.append(f'<path d="M{LEFT} {y(value)}H{WIDTH - RIGHT}" stroke="#7d8590" stroke-opacity=".3"/>')
    for name, line in series.items():
        path = "L".join(f"{x(density)} {y(value)}" for density, value in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{ROWS[name][1]}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{x(density)}" cy="{y(value)}" r="3" fill="{ROWS[name][1]}"/>' for density, value in line
        ]
    return f'<g transform="translate({offset} 0)">{"".join(parts)}</g>'


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: round(start + (math.log(value) - low) / (high - low) * (end - start), 1)


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten between the least and the greatest value."""
    low, high = min(values), max(values)
    powers: list[Any] = [step * 10.0**power for power in range(-4, 5) for step in (1, 2, 5)]
    return [value for value in powers if low * 0.999 <= value <= high * 1.001]
