"""Multiplication tables of finite groups, element 0 the neutral one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cycles(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The multiplication table of a product of cycles: sums, digit by digit."""
    n = math.prod(sizes)
    ramp, unit = torch.arange(n, device=device), 1
    table = torch.zeros(n, n, dtype=torch.int64, device=device)
    for size in reversed(sizes):
        digit = ramp // unit % max(size, 1)
        table = table + (digit[:, None] + digit) % max(size, 1) * unit
        unit *= size
    return table


def dihedral(n: int, device: torch.device) -> Tensor:
    """Of the symmetries of a polygon: ``r^a`` is element a, ``r^a s`` element n / 2 + a."""
    m = max(n // 2, 1)
    ramp = torch.arange(n, device=device)
    turn, flip = ramp % m, ramp // m
    turned = (turn[:, None] + (1 - 2 * flip[:, None]) * turn) % m
    return turned + m * ((flip[:, None] + flip) % 2)


def check_table(table: Tensor, n: int) -> None:
    """Raise unless ``table [n, n]`` is that of a group whose element 0 is neutral."""
    what = "group_algebra(table)"
    if table.shape != (n, n) or table.is_floating_point():
        raise ValueError(f"{what}: expected integers [{n}, {n}], got {list(table.shape)}")
    ramp = torch.arange(n, device=table.device)
    latin = all(torch.equal(t.sort(-1).values, ramp.expand(n, n)) for t in (table, table.mT))
    neutral = all(torch.equal(t[:1].flatten(), ramp[:n]) for t in (table, table.mT))
    if not (latin and neutral):
        raise ValueError(f"{what}: expected products of a group, element 0 neutral, got none")
    # Light's test: (x g) y = x (g y) for generators g is enough
    reached = ramp < 1
    while n and not reached.all():
        g = int((~reached).int().argmax())
        if not torch.equal(table[table[:, g]], table[:, table[g]]):
            raise ValueError(f"{what}: expected associative products, got others with element {g}")
        reached[g] = True
        while True:
            found = reached.clone()
            found[table[reached][:, reached].flatten()] = True
            if torch.equal(found, reached):
                break
            reached = found
