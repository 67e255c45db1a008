"""The step of the parameters: every way to take it is the plain one."""

from __future__ import annotations

import pytest
import torch
from singd.descent import descend, plain
from singd.rounding import Rounding
from torch import Tensor

from singd import descent

OPTIONS = {"lr": 0.1, "weight_decay": 0.01}


def tensors(dtype: torch.dtype, transposed: bool) -> list[Tensor]:
    """A matrix, stored by columns if ``transposed``, and a vector."""
    matrix = torch.randn(3, 4).to(dtype)
    return [matrix.T.contiguous().T if transposed else matrix, torch.randn(5).to(dtype)]


@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_scale_is_that_of_the_directions(
    dtype: torch.dtype, transposed: bool, momentum: float, scale: float | None
) -> None:
    torch.manual_seed(0)
    params, expected = tensors(dtype, transposed), []
    buffers = tensors(dtype, transposed) if momentum else []
    expected, kept = [p.clone() for p in params], [b.clone() for b in buffers]
    strided = [torch.randn(3, 9)[:, ::2][:, :4].to(dtype), torch.randn(10)[::2].to(dtype)]
    scaled = [(1.0 if scale is None else scale) * d for d in strided]
    plain(expected, scaled, kept, momentum=momentum, rounded=Rounding(0, 0), **OPTIONS)
    nu = None if scale is None else torch.tensor(scale)
    rounding = Rounding(0, 0)
    descend(params, strided, buffers, momentum=momentum, rounding=rounding, scale=nu, **OPTIONS)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps  # that of the scale
    for got, wanted in zip(params + buffers, expected + kept, strict=True):
        torch.testing.assert_close(got, wanted, rtol=4 * eps, atol=eps)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_guards_a_step_keeps_all_or_nothing(
    dtype: torch.dtype, transposed: bool, momentum: float, lr: float | Tensor
) -> None:
    directions, nu = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)], torch.tensor(0.3)
    params, buffers = tensors(dtype, transposed), tensors(dtype, transposed) if momentum else []

    def step(ok: bool | None, direction: float = 1.0) -> list[Tensor]:
        ps, bs = [p.clone() for p in params], [b.clone() for b in buffers]
        along = [direction * d for d in directions]
        options = {"lr": lr, "momentum": momentum, "weight_decay": 0.01, "scale": nu}
        guard = None if ok is None else torch.tensor(ok)
        descend(ps, along, bs, rounding=Rounding(0, 0), ok=guard, **options)
        return ps + bs

    torch.testing.assert_close(step(True), step(None), rtol=0, atol=0)
    torch.testing.assert_close(step(False, float("nan")), params + buffers, rtol=0, atol=0)
    assert not torch.equal(step(True)[0], params[0])


@pytest.mark.parametrize("piece", [1, 7, 12, 100])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_pieces_are_cut_and_joined(
    monkeypatch: pytest.MonkeyPatch, momentum: float, piece: int
) -> None:
    monkeypatch.setattr(descent, "PIECE", piece)
    torch.manual_seed(0)
    params = [torch.randn(s).bfloat16() for s in ((3, 4), (5,), (0,), (2, 3, 1))]
    directions = [torch.randn(p.shape) for p in params]
    directions[1] = directions[1].bfloat16()
    buffers = [torch.randn_like(p) for p in params] if momentum else []
    expected, kept = [p.clone() for p in params], [b.clone() for b in buffers]
    nu = torch.tensor(0.3)
    moves = [nu * d.float() for d in directions]
    plain(expected, moves, kept, momentum=momentum, rounded=Rounding(0, 0), **OPTIONS)
    rounding = Rounding(0, 0)
    descend(params, directions, buffers, momentum=momentum, rounding=rounding, scale=nu, **OPTIONS)
    for got, wanted in zip(params + buffers, expected + kept, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.01, atol=1e-4)


def test_no_piece_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "PIECE", 7)
    vectors = [torch.ones(n) for n in (3, 3, 3, 16, 7)]
    sizes = [sum(map(len, piece)) for (piece,) in descent._pieces([vectors])]
    assert sizes == [6, 3, 7, 7, 2, 7]
