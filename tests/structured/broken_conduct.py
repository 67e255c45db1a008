"""Structures of bad conduct, by the laws that each breaks: noted in ``BROKEN`` as well."""

import itertools

import torch
from torch import Tensor

from structured import Dense, Diagonal, LowerTriangular, StructuredMatrix, static
from tests.structured.broken import BROKEN, fails


@fails("fresh")
class Aliased(Dense):
    def orthogonal_project(self, M):
        return self._build([M])


@fails("fresh", "gradients", "backward", "forward", "large")
class Modifies(Diagonal):
    """Works in its operand's memory."""

    def apply(self, X):
        return super().apply(X.mul_(1.0))


@fails("precision")
class Widens(Diagonal):
    def trace(self):
        return self.d.sum(-1, dtype=torch.promote_types(self.d.dtype, torch.float32))


@fails("precision")
class Rounds(Diagonal):
    """Computes in 16 bits for float32; small integers are exact."""

    def trace(self):
        d = self.d.bfloat16() if self.dtype == torch.float32 else self.d
        return d.sum(-1).to(self.dtype)


@fails("gradients")
class Detaches(Diagonal):
    def matmul(self, other):
        return self._build([self.d.detach() * other.d])


@fails("deterministic", "mapped")
class Random(Diagonal):
    def apply(self, X):
        return super().apply(X) * (1 + 1e-14 * torch.rand_like(X))


@fails("trees")
class OtherLeaves(Diagonal):
    def _flatten(self):
        return [self.d + 1], ()


@fails("zeros", "random", "meta")
class UnflattensToItsBase(Diagonal):
    @classmethod
    def _unflatten(cls, parts, statics):
        return Diagonal(*parts)


@fails("copies")
class ClonesInPlace(Diagonal):
    def clone(self):
        return self


@fails("copies")
class CopiesNothing(Diagonal):
    def __copy__(self):
        return self.zeros_like()


@fails("copies")
class PicklesItsBase(Diagonal):
    def __reduce__(self):
        return Diagonal, (self.d,)


@fails("copies")
class CastsItsIndices(StructuredMatrix):
    """Takes a permutation for numbers."""

    d: Tensor
    order: Tensor = static()

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        d = torch.zeros(*batch_shape, n, dtype=dtype, device=device)
        return cls(d, torch.arange(n, device=device).flip(0))

    def to_dense(self):
        return torch.diag_embed(self.d[..., self.order.long()])

    def to(self, *args, **kwargs):
        return super().to(*args, **kwargs).map_static(lambda t: t.to(*args, **kwargs))


@fails(
    "copies",
    "scaling",
    "add_scaled_identity",
    "fresh",
    "precision",
    "meta",
    "deterministic",
    "errors",
)
class StaysInDouble(Diagonal):
    def to(self, *args, **kwargs):
        return self if isinstance(args[0], torch.dtype) else super().to(*args, **kwargs)


@fails("backward")
class DropsTheDerivativeInX(Diagonal):
    """Where it alone is asked for."""

    def apply(self, X):
        return super().apply(X if self.d.requires_grad or not X.requires_grad else X.detach())


class _Sum(torch.autograd.Function):
    """A sum with a derivative backward alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d):
        return d.sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.n = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient[..., None].expand(*gradient.shape, ctx.n)


@fails("forward")
class OnlyBackward(Diagonal):
    def trace(self):
        return _Sum.apply(self.d)


@fails("mapped")
class AddsIntoZeros(Diagonal):
    def trace(self):
        out = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        out += self.d.sum(-1)
        return out


@fails("autocast")
class AddsByProducts(Diagonal):
    """A sum as a matrix product, which autocast runs in 16 bits."""

    def __add__(self, other):
        total = super().__add__(other)
        if total is NotImplemented:
            return total
        one = torch.ones(1, 1, dtype=self.dtype, device=self.device)
        return total.map(lambda t: (t[..., None] @ one)[..., 0])


@fails("large")
class ForgetsInLargeProducts(Diagonal):
    def apply(self, X):
        return super().apply(X.detach() if X.nbytes > 1 << 21 else X)


@fails("first_use")
class DrawsForItsShape(StructuredMatrix):
    """Diagonal matrices; a random number is drawn where the shape is found."""

    d: Tensor

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        if self.d.is_meta:
            torch.rand(())
        return torch.diag_embed(self.d)


@fails("dynamic")
class BreaksTheGraph(Diagonal):
    """With more than four columns."""

    def apply(self, X):
        if X.shape[-1] > 4:
            torch._dynamo.graph_break()
        return super().apply(X)


@fails("views")
class Taciturn(Diagonal):
    def __repr__(self):
        return "a matrix"


@fails("views")
class ShowsTheTranspose(LowerTriangular):
    def __array__(self, dtype=None, copy=None):
        return self.mT.__array__(dtype, copy)


@fails("meta", "compiled", "mapped", "dynamic")
class LooksAtNumbers(Diagonal):
    def solve(self, X):
        if (self.d == 0).any():
            raise torch.linalg.LinAlgError("singular")
        return super().solve(X)


@fails("meta")
class BeginsOnTheCPU(Diagonal):
    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        return super().zeros(n, batch_shape=batch_shape, dtype=dtype, device="cpu")


@fails("meta")
class LeavesTheDevice(Diagonal):
    def trace(self):
        if self.d.is_meta:
            return torch.zeros(self.batch_shape, dtype=self.dtype)
        return super().trace()


@fails("meta")
class DoubleOnMeta(Diagonal):
    def trace(self):
        return super().trace().double() if self.d.is_meta else super().trace()


@fails("meta")
class ForgetsTheBatchOnMeta(Diagonal):
    def trace(self):
        return self.d.sum() if self.d.is_meta else super().trace()


@fails("errors")
class AddsAnything(Diagonal):
    def __add__(self, other):
        return self.map(torch.add, other) if isinstance(other, Diagonal) else self


@fails("errors")
class Unclear(Diagonal):
    def __add__(self, other):
        try:
            return super().__add__(other)
        except ValueError:
            raise ValueError("no") from None


@fails("errors")
class RoundsNothing(Diagonal):
    """Takes integers for what they could be."""

    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        real = dtype if dtype is None or dtype.is_floating_point else torch.float64
        return super().zeros(n, batch_shape=batch_shape, dtype=real, device=device)


@fails("spec")
class _Nameless(Diagonal):
    """No name that a spec could use."""


@fails("zeros", "spec", "from_dense", "random")
class AnotherEveryTime(StructuredMatrix):
    """In a basis drawn anew with each zero: its name does not say which."""

    d: Tensor
    Q: Tensor = static()

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
        d = torch.zeros(*batch_shape, n, dtype=dtype, device=device)
        return cls(d, Q.to(d))

    def to_dense(self):
        return self.Q @ (self.d[..., None] * self.Q.mT)


@fails("zeros", "spec", "from_dense", "random")
class NumbersItsZeros(Diagonal):
    """The same numbers, in a structure of its own each time."""

    number: int = static()

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts), number=next(_NUMBERS))


_NUMBERS = itertools.count()


def dense(n, **opts):
    """The members of another, and its name."""
    return Dense.zeros(n, **opts)


BROKEN[dense] = {"spec"}


def _diagonal():
    class Diagonal(StructuredMatrix):
        """Its name is taken."""

        d: Tensor

        @classmethod
        def zeros(cls, n, *, batch_shape=(), **opts):
            return cls(torch.zeros(*batch_shape, n, **opts))

        def to_dense(self):
            return torch.diag_embed(self.d)

    return Diagonal


BROKEN[_diagonal()] = {"spec"}


@fails("compiled")
class CompilesToItsDouble(Diagonal):
    def trace(self):
        return super().trace() * (2 if torch.compiler.is_compiling() else 1)


@fails("compiled")
class CompilesToATensor(Diagonal):
    def matmul(self, other):
        product = super().matmul(other)
        return product.to_dense() if torch.compiler.is_compiling() else product
