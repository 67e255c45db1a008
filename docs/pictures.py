"""Structures drawn as SVG, from ``to_dense`` alone.

Blue places belong to ``D``, the part that is closed under transposition and that ``Pi`` takes over
as it is; orange ones to ``N``, which ``Pi`` doubles. Places of the same number share a shade.
All colours are legible on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from docs import catalogue
from structured import Structure

CELL, GAP, PANEL, TEXT = 9, 1, 36, "#6e7781"
EMPTY = "#808080"  # at a low opacity
BLUES = ((0x8C, 0xC4, 0xF7), (0x1B, 0x62, 0xB8))  # light, dark
ORANGES = ((0xF9, 0xC0, 0x7E), (0xCC, 0x60, 0x0C))
PURPLES = ((0xCF, 0xB2, 0xF2), (0x70, 0x3C, 0xB0))  # overlaps its transpose in part
PLAIN = 0.42  # the shade of a number with one place


def basis(structure: Structure, n: int) -> Tensor:
    """What each stored number writes, ``[p, n, n]``; numbers that write nothing are left out."""
    zero = structure(n, dtype=torch.float64)
    sizes = [t.numel() for t in zero.tensors()]
    unit = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, -1)
    parts = [u.reshape(sum(sizes), *t.shape) for u, t in zip(unit, zero.tensors(), strict=True)]
    E = zero.with_tensors(parts).to_dense()
    return E[E.abs().sum((1, 2)) > 0]


def shares(E: Tensor) -> Tensor:
    """How much of each number's transposed pattern lies in the space, ``[p]``: 1 in D, 0 in N."""
    flat, turned = E.flatten(1), E.mT.flatten(1)
    inside = turned @ torch.linalg.pinv(flat) @ flat
    return inside.square().sum(1) / turned.square().sum(1)


def colours(structure: Structure, n: int) -> list[list[str]]:
    """The colour of every place."""
    E = basis(structure, n)
    if not len(E):
        return [[EMPTY] * n for _ in range(n)]
    hits = E.abs() > 1e-12
    places, share = hits.sum((1, 2)).tolist(), shares(E).tolist()
    count, first = hits.sum(0).tolist(), hits.int().argmax(0).tolist()
    tied = [k for k, p in enumerate(places) if p > 1]
    mixed = torch.einsum("p,pij->ij", torch.linspace(1, -1, len(E), dtype=E.dtype), E).abs()
    mixed = (mixed / mixed.max().clamp(min=1e-12)).tolist()

    def colour(i: int, j: int) -> str:
        if not count[i][j]:
            return EMPTY
        k = first[i][j]
        ends = BLUES if share[k] > 0.99 else ORANGES if share[k] < 0.01 else PURPLES
        if count[i][j] > 1:
            return blend(ends, 0.15 + 0.7 * mixed[i][j])
        return blend(ends, PLAIN if places[k] == 1 else shaded(tied.index(k), len(tied)))

    return [[colour(i, j) for j in range(n)] for i in range(n)]


def shaded(index: int, count: int) -> float:
    """A shade for one of several shared numbers, neighbours unlike."""
    return 0.0 if count == 1 else (1 - index / (count - 1)) ** 1.2


def blend(ends: tuple[tuple[int, ...], tuple[int, ...]], shade: float) -> str:
    light, dark = ends
    mixed = [round(a + (b - a) * shade) for a, b in zip(light, dark, strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def cells(structure: Structure, n: int, x: float, y: float, cell: float = CELL) -> str:
    """One matrix; a path for each colour keeps the file small."""
    by_colour: dict[str, list[str]] = {}
    size = cell - GAP
    for i, row in enumerate(colours(structure, n)):
        for j, colour in enumerate(row):
            corner = f"M{x + j * cell:g} {y + i * cell:g}h{size:g}v{size:g}h-{size:g}z"
            by_colour.setdefault(colour, []).append(corner)
    paths = []
    for colour, corners in by_colour.items():
        faint = ' fill-opacity=".13"' if colour == EMPTY else ""
        paths.append(f'<path fill="{colour}"{faint} d="{"".join(corners)}"/>')
    return "".join(paths)


def document(width: float, height: float, body: Iterable[str], title: str) -> str:
    style = f"text{{font:10px ui-monospace,Menlo,Consolas,monospace;fill:{TEXT}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


def label(text: str, x: float, y: float, **style: str) -> str:
    extra = "".join(f' {k.replace("xml_space", "xml:space")}="{v}"' for k, v in style.items())
    return f'<text x="{x:g}" y="{y:g}"{extra}>{text}</text>'


def growing(name: str, sizes: tuple[int, ...] = (4, 8, 12, 16)) -> str:
    """The pattern of a structure over growing n."""
    structure, body, x = catalogue.structure(name), [], 0.0
    height = max(sizes) * CELL
    for n in sizes:
        try:
            body.append(cells(structure, n, x, height - n * CELL))
        except ValueError:  # not a size it has
            structure(12)
            n = 3 * (n // 3) or 3
            body.append(cells(structure, n, x, height - n * CELL))
        body.append(label(f"n = {n}", x, height + 13))
        x += n * CELL + 18
    return document(x, height + 20, body, catalogue.example(name))


def lines(spec: str, width: int = 20) -> list[str]:
    """A spec in at most a few lines, broken after commas and brackets."""
    out = [""]
    for part in spec.replace(", ", ",\0 ").replace("(", "(\0").split("\0"):
        if len(out[-1] + part) > width and out[-1]:
            out.append(" " + part.strip())
        else:
            out[-1] += part
    return out


def overview(n: int = 12, columns: int = 5) -> str:
    """Every named structure at size n."""
    names = catalogue.names()
    labels = {name: lines(catalogue.example(name)) for name in names}
    side, body, top = n * CELL, [], 0.0
    for start in range(0, len(names), columns):
        row = names[start : start + columns]
        for place, name in enumerate(row):
            structure, x = catalogue.structure(name), place * (side + PANEL)
            body.append(cells(structure, n, x, top))
            words = labels[name]
            for k, text in enumerate(words):
                body.append(label(text, x, top + side + 12 + 12 * k, xml_space="preserve"))
            count = catalogue.stored(structure, n)
            count = f"{count} number{'s' * (count > 1)}"
            body.append(label(count, x, top + side + 12 + 12 * len(words)))
        top += side + 12 * (max(len(labels[name]) for name in row) + 1) + 22
    legend = (
        (BLUES, "taken over by the projection"),
        (ORANGES, "doubled by it"),
    )
    x = 0.0
    for ends, text in legend:
        body.append(f'<path fill="{blend(ends, PLAIN)}" d="M{x:g} {top:g}h8v8h-8z"/>')
        body.append(label(text, x + 13, top + 8))
        x += 13 + 6.3 * len(text) + 22
    body.append(label("one shade: one number in several places", x, top + 8))
    width = columns * (side + PANEL)
    return document(width, top + 14, body, f"The structures at n = {n}")
