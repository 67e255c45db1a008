"""Algebras known by ``zeros`` and ``to_dense`` alone, whose stored numbers share places and signs.

What the defaults have to cope with; closed under multiplication, all of them.
"""

import torch
from torch import Tensor

from structured import StructuredMatrix, static


class Complex(StructuredMatrix):
    """Blocks ``[[a, b], [-b, a]]`` of complex numbers: n even, signed storage."""

    a: Tensor  # [..., n / 2]
    b: Tensor  # [..., n / 2]

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        zero = torch.zeros(*batch_shape, n // 2, **opts)
        return cls(zero, zero.clone())

    def to_dense(self):
        rows = torch.stack([torch.stack([self.a, self.b]), torch.stack([-self.b, self.a])])
        blocks = torch.diag_embed(rows).movedim((0, 1), (-3, -1))  # [..., n/2, 2, n/2, 2]
        n = 2 * self.a.shape[-1]
        return blocks.reshape(*self.a.shape[:-1], n, n)


class Cyclic(StructuredMatrix):
    """Circulant matrices: every number in n places, transposes overlap."""

    c: Tensor  # [..., n]

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        ramp = torch.arange(self.c.shape[-1], device=self.c.device)
        return self.c[..., (ramp[:, None] - ramp) % max(len(ramp), 1)]


class Series(StructuredMatrix):
    """Lower triangular Toeplitz matrices: many places each, transposes outside the space."""

    t: Tensor  # [..., n]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        ramp = torch.arange(self.t.shape[-1], device=self.t.device)
        lag = ramp[:, None] - ramp
        return torch.where(lag >= 0, self.t[..., lag.clamp(min=0)], 0)


class Redundant(StructuredMatrix):
    """Diagonal matrices stored as a sum of two: more numbers than dimensions."""

    d: Tensor  # [..., n]
    e: Tensor  # [..., n]

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        zero = torch.zeros(*batch_shape, n, **opts)
        return cls(zero, zero.clone())

    def to_dense(self):
        return torch.diag_embed(self.d + 2 * self.e)


class Wasteful(StructuredMatrix):
    """Lower triangular matrices that store zeros too: half of the numbers have no place."""

    L: Tensor  # [..., n, n]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.L.tril()


class Skewed(StructuredMatrix):
    """``B U B^-1`` for upper triangular ``U`` and a ``B`` that is not orthogonal: all overlap."""

    U: Tensor  # [..., n, n]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        U = self.U.to(torch.promote_types(self.U.dtype, torch.float32)).triu()
        ramp = torch.arange(U.shape[-1], device=U.device)
        lag = ramp[:, None] - ramp
        B = ((lag == 0) | (lag == 1)).to(U.dtype)
        inverse = torch.where(lag >= 0, (1 - 2 * (lag % 2)).to(U.dtype), 0)  # (-1)^(i - j)
        return (B @ U @ inverse).to(self.U.dtype)


class InBasis(StructuredMatrix):
    """``Q diag(d) Q^T`` for an orthogonal ``Q`` that all members share: a static tensor."""

    d: Tensor  # [..., n]
    Q: Tensor = static()

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        ramp = torch.arange(float(n * n), dtype=torch.float64).reshape(n, n)
        Q = torch.linalg.qr(torch.cos(ramp)).Q
        d = torch.zeros(*batch_shape, n, dtype=dtype, device=device)
        return cls(d, Q.to(device=d.device, dtype=d.dtype))

    def to_dense(self):
        return self.Q @ (self.d[..., None] * self.Q.mT)


class PartlyMirrored(StructuredMatrix):
    """No algebra, but a space: the transpose of ``b``'s places is partly the place of ``c``."""

    b: Tensor  # [...]
    c: Tensor  # [...]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        zero = torch.zeros(tuple(batch_shape), **opts)
        return cls(zero, zero.clone())

    def to_dense(self):
        zero = torch.zeros_like(self.b)
        rows = [[zero, self.b, self.b], [self.c, zero, zero], [zero, zero, zero]]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)


class PartlyShared(StructuredMatrix):
    """No algebra, but a space: ``b`` and ``c`` share a place, and their transposes lie outside."""

    b: Tensor  # [...]
    c: Tensor  # [...]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        zero = torch.zeros(tuple(batch_shape), **opts)
        return cls(zero, zero.clone())

    def to_dense(self):
        zero = torch.zeros_like(self.b)
        rows = [[zero, self.b + self.c, self.c], [zero, zero, zero], [zero, zero, zero]]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)


class Large(Redundant):
    """The same in other units: ranks are relative."""

    def to_dense(self):
        return torch.diag_embed(1e6 * self.d + 3e5 * self.e)


class Overfull(StructuredMatrix):
    """Lower triangular matrices, their diagonal stored twice; zeros are stored too."""

    L: Tensor  # [..., n, n]
    d: Tensor  # [..., n]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        zero = torch.zeros(*batch_shape, n, n, **opts)
        return cls(zero, torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        return self.L.tril() + torch.diag_embed(self.d)


class TwoDense(StructuredMatrix):
    """Every matrix, as a sum of two."""

    M: Tensor  # [..., n, n]
    N: Tensor  # [..., n, n]

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        zero = torch.zeros(*batch_shape, n, n, **opts)
        return cls(zero, zero.clone())

    def to_dense(self):
        return self.M + self.N


class OffTheScale(StructuredMatrix):
    """Diagonal matrices whose last entries are stored in other units than the first."""

    d: Tensor  # [..., n]

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        ramp = torch.arange(self.d.shape[-1], device=self.d.device)
        return torch.diag_embed(torch.where(ramp % 2 == 0, 1e3 * self.d, self.d / 64))


class Permuted(StructuredMatrix):
    """Upper triangular matrices with rows and columns in an order that all members share."""

    U: Tensor  # [..., n, n]
    order: Tensor = static()
    mask: Tensor = static()

    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        order = torch.arange(n, device=device)
        mask = order[:, None] <= order
        U = torch.zeros(*batch_shape, n, n, dtype=dtype, device=device)
        return cls(U, order.roll(n // 2).flip(0), mask)

    def to_dense(self):
        U = torch.where(self.mask, self.U, 0)
        return U[..., self.order, :][..., self.order]


ALGEBRAS = {
    Complex: range(0, 9, 2),
    Cyclic: range(9),
    Series: range(9),
    Redundant: range(9),
    Wasteful: range(7),
    Skewed: range(7),
    InBasis: range(9),
}
