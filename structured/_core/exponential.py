"""The exponential within an algebra: a polynomial of a small multiple, squared again and again.

Source: Higham, *Functions of Matrices* (SIAM, 2008), section 10.3, with a Taylor polynomial in
place of a Padé approximant: products stay in the structure and cost what they cost there.
"""

from __future__ import annotations

from math import factorial
from typing import TypeVar

import torch
from torch import Tensor

from structured._core.member import Member
from structured._core.numbers import trailing
from structured._products.in_place import plain

M_ = TypeVar("M_", bound=Member)

_NORM = 0.5  # up to here the polynomial is exact: 0.5^17 / 17! < 1e-19
_ON_META = 8  # squarings where there are no numbers to tell


def can_be_counted(t: Tensor) -> bool:
    """Whether a number of squarings can depend on ``t``: not compiled, nor within a transform."""
    return plain() and not hasattr(t, "fake_mode")


def exponential(A: M_, mean: Tensor, norm: Tensor) -> M_:
    """``exp(A)``, by 6 products and about ``log2(norm) + 1`` squarings.

    How many are needed is read off the numbers, which on a GPU waits for them.

    Args:
        A: A member, in float32 or wider.
        mean: Mean of the diagonal, ``[...]``.
        norm: At least the spectral norm of ``A - mean I``, ``[...]``.
    """
    steps = (norm.detach() / _NORM).log2().ceil().nan_to_num(0, 0, 0).clamp(min=0)
    scale = torch.exp2(-steps)
    E = (scale * mean).exp() * _polynomial(scale * A.add_scaled_identity(-mean))
    most = _ON_META if steps.is_meta else int(steps.max()) if steps.numel() else 0
    for k in range(most):
        E = E.matmul(E).map(lambda new, old, k=k: _where(steps > k, new, old), E)
    return E


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(trailing(condition, yes), yes, no)


def _polynomial(B: M_) -> M_:
    """The Taylor polynomial of degree 16, by the powers 1 to 4 (Paterson and Stockmeyer)."""
    B2 = B.matmul(B)
    B3, B4 = B2.matmul(B), B2.matmul(B2)

    def cubic(k: int) -> M_:
        terms = B / factorial(k + 1) + B2 / factorial(k + 2) + B3 / factorial(k + 3)
        return terms.add_scaled_identity(1 / factorial(k))

    E = B4 / factorial(16) + cubic(12)
    for k in (8, 4, 0):
        E = E.matmul(B4) + cubic(k)
    return E
