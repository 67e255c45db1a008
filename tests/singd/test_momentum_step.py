"""The step of the parameters: every way to take it is that of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from singd.ops import reference
from singd.ops.momentum_step import momentum_step_
from singd.ops.reference import Indices
from singd.ops.stochastic_rounding import Rounding

NAMES = ("matrix", "vector")


def tensors(dtype: torch.dtype, transposed: bool) -> list[Tensor]:
    """A matrix, stored by columns if ``transposed``, and a vector."""
    matrix = torch.randn(3, 4).to(dtype)
    return [matrix.T.contiguous().T if transposed else matrix, torch.randn(5).to(dtype)]


def rounded(x: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    return Rounding(0, 0)(x[None], dtype, [NAMES[index]])[0]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_scale_is_that_of_the_directions(
    dtype: torch.dtype,
    transposed: bool,
    momentum: float,
    scale: float | None,
    lr: float | Tensor,
    decoupled: bool,
) -> None:
    torch.manual_seed(0)
    params = tensors(dtype, transposed)
    buffers = tensors(dtype, transposed) if momentum else []
    expected, velocities = [p.clone() for p in params], [b.clone() for b in buffers]
    strided = [torch.randn(3, 9)[:, ::2][:, :4].to(dtype), torch.randn(10)[::2].to(dtype)]
    scaled = [(1.0 if scale is None else scale) * d for d in strided]
    options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": 0.01}
    options["decoupled"] = decoupled
    reference.momentum_step_(expected, scaled, velocities, **options, rounded=rounded)
    nu = None if scale is None else torch.tensor(scale)
    options |= {"rounding": Rounding(0, 0), "names": NAMES, "scale": nu}
    momentum_step_(params, strided, buffers, **options)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps  # that of the scale
    for got, wanted in zip(params + buffers, expected + velocities, strict=True):
        torch.testing.assert_close(got, wanted, rtol=4 * eps, atol=eps)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_guards_a_step_keeps_all_or_nothing(
    dtype: torch.dtype, transposed: bool, momentum: float, lr: float | Tensor
) -> None:
    torch.manual_seed(0)
    directions, nu = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)], torch.tensor(0.3)
    params, buffers = tensors(dtype, transposed), tensors(dtype, transposed) if momentum else []

    def step(unless: bool | None, direction: float = 1.0) -> list[Tensor]:
        ps, bs = [p.clone() for p in params], [b.clone() for b in buffers]
        along = [direction * d for d in directions]
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": 0.01}
        options |= {"decoupled": False, "rounding": Rounding(0, 0), "names": NAMES, "scale": nu}
        guard = None if unless is None else torch.tensor(unless)
        momentum_step_(ps, along, bs, **options, unless=guard)
        return ps + bs

    torch.testing.assert_close(step(False), step(None), rtol=0, atol=0)
    torch.testing.assert_close(step(True, float("nan")), params + buffers, rtol=0, atol=0)
    assert not torch.equal(step(False)[0], params[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("start", [1, 4, 7, 12])
def test_parts_of_a_tensor_move_as_the_whole(start: int, momentum: float) -> None:
    """So that noise does not depend on how parameters are distributed."""
    torch.manual_seed(0)
    p, d, b = (torch.randn(30).bfloat16() for _ in range(3))
    options: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
    options |= {"decoupled": False, "rounding": Rounding(3, 5)}
    whole = p.clone(), [b.clone()] if momentum else []
    momentum_step_([whole[0]], [d], whole[1], **options, names=["p"])
    cut = [t.clone() for t in (p[:start], p[start:])]
    buffers = [t.clone() for t in (b[:start], b[start:])] if momentum else []
    along, indices = [d[:start], d[start:]], [Indices(0), Indices(start)]
    momentum_step_(cut, along, buffers, **options, names=["p", "p"], indices=indices)
    assert torch.equal(torch.cat(cut), whole[0])
    assert all(torch.equal(torch.cat(buffers), t) for t in whole[1])


@pytest.mark.parametrize("box", [(slice(1, 4), slice(2, 7)), (slice(0, 5), slice(3, 4))])
def test_a_box_of_a_matrix_moves_as_the_whole(box: tuple[slice, slice]) -> None:
    """So does a part of rows and columns, as of tensor parallelism."""
    torch.manual_seed(0)
    p, d = torch.randn(5, 7).bfloat16(), torch.randn(5, 7).bfloat16()
    rows, columns = box
    places = Indices(7 * rows.start + columns.start, columns.stop - columns.start, 7)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.01}
    options |= {"decoupled": False, "rounding": Rounding(3, 5), "names": ["p"]}
    part = p[box].clone()
    momentum_step_([p], [d], [], **options)
    momentum_step_([part], [d[box]], [], **options, indices=[places])
    assert torch.equal(part, p[box])


def test_in_float32_it_is_that_of_sgd() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(4, 3), torch.randn(5)]
    theirs = [p.clone().requires_grad_() for p in ours]
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    buffers = [torch.zeros_like(p) for p in ours]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    options |= {"decoupled": False, "rounding": Rounding(0, 0), "names": NAMES}
    for _ in range(3):
        moves = [torch.randn_like(p) for p in ours]
        for p, d in zip(theirs, moves, strict=True):
            p.grad = d.clone()
        sgd.step()
        momentum_step_(ours, moves, buffers, **options)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach())


@pytest.mark.parametrize("transposed", [False, True])
def test_small_steps_add_up(transposed: bool) -> None:
    """Steps far below a unit in the last place move a bfloat16 parameter as they should."""
    p, d = torch.ones(80, 50).bfloat16(), torch.ones(80, 50)
    p = p.T if transposed else p
    d = d.T if transposed else d
    options: dict[str, Any] = {"lr": 1e-4, "momentum": 0.0, "weight_decay": 0.0}
    for step in range(20):
        rounding = Rounding(0, step)
        momentum_step_([p], [d], [], **options, decoupled=False, rounding=rounding, names=["p"])
    assert abs(float(p.double().mean()) - 0.998) < 2e-4


def test_of_no_parameters() -> None:
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    momentum_step_([], [], [], **options, decoupled=False, rounding=Rounding(0, 0), names=[])
