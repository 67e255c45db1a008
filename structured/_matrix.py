"""The idea: linear spaces of square matrices that are closed under multiplication.

A *structure* is a linear space ``V`` of ``n x n`` matrices that contains the identity and is closed
under multiplication (a unital matrix algebra). A *member* stores a few tensors, and ``to_dense``,
which writes it out, is linear in them. Everything in this file follows from ``to_dense``.

- :class:`Operator` is anything square that can be multiplied by a tensor.
- :class:`StructuredMatrix` is a member of a structure: the class to derive from.

Letters: ``n`` the size, ``m`` a number of columns, ``...`` the batch dimensions, ``A``, ``B``
members, ``S`` a symmetric matrix, ``X`` a matrix ``[..., n, m]``.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Self, TypeAlias, dataclass_transform

import numpy as np
import torch
from torch import Size, Tensor
from torch.utils import _pytree as pytree

from structured import _coordinates
from structured._dispatch import symmetric_product

if TYPE_CHECKING:
    from linear_operator import LinearOperator
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

Scalar: TypeAlias = "float | Tensor"


def static(**kwargs: Any) -> Any:
    """Mark a field as part of the structure, shared by all its members, not a stored number.

    Sums, scalings and :meth:`StructuredMatrix.tensors` pass static fields by. Two members belong to
    the same structure only if their static fields are equal (tensors: equal numbers).
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


# PyTorch's names for our operators, and whether their arguments are swapped.
_OPERATORS = {
    "matmul": ("matmul", False),
    "__rmatmul__": ("matmul", True),
    "mul": ("mul", False),
    "div": ("truediv", False),
    "__rdiv__": ("truediv", True),
    "add": ("add", False),
    "sub": ("sub", False),
    "__rsub__": ("sub", True),
}


class Operator(ABC):
    """A square linear map ``[..., n, n]`` known by its products with tensors."""

    __array_ufunc__ = None  # NumPy scalars leave ``c * A`` to us

    @property
    @abstractmethod
    def shape(self) -> Size:
        """``[*batch_shape, n, n]``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the stored tensors."""

    @property
    @abstractmethod
    def mT(self) -> Operator:
        """The transpose."""

    @abstractmethod
    def apply(self, X: Tensor) -> Tensor:
        """``A X`` for ``X [..., n, m]``."""

    @abstractmethod
    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A^T X`` for ``X [..., n, m]``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Write the operator out, ``[..., n, n]``."""

    @property
    def n(self) -> int:
        """Number of rows, and of columns."""
        return self.shape[-1]

    @property
    def batch_shape(self) -> Size:
        """Leading dimensions."""
        return self.shape[:-2]

    def __matmul__(self, other: Any) -> Any:
        """``A @ X`` for a matrix ``X [..., n, m]`` or a vector ``[n]``."""
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.apply(other[:, None])[..., 0] if other.ndim == 1 else self.apply(other)

    def __rmatmul__(self, other: Any) -> Any:
        """``X @ A`` for a matrix ``X [..., m, n]`` or a vector ``[n]``."""
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 1:
            return self.apply_transpose(other[:, None])[..., 0]
        return self.apply_transpose(other.mT).mT

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What ``torch.matmul(A, X)``, ``c * A`` and their like mean: our operator of that name."""
        name = func.__name__
        if name not in _OPERATORS or kwargs or len(args) != 2:
            return NotImplemented
        if func is Tensor.matmul and torch.compiler.is_compiling():
            # PyTorch up to 2.13 traces both ``A @ X`` and ``X @ A`` to this call
            raise TypeError("@ in torch.compile: expected A.apply(X) or torch.matmul, got @")
        operator, swapped = _OPERATORS[name]
        a, b = reversed(args) if swapped else args
        method = getattr(a, f"__{operator}__") if isinstance(a, Operator) else None
        if method is None:
            method, b = getattr(b, f"__r{operator}__", None), a
        return NotImplemented if method is None else method(b)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The dense matrix as a NumPy array (bfloat16 arrives as float32)."""
        if copy is False:
            raise ValueError(f"np.asarray({type(self).__name__}, copy=False): must be written out")
        dense = self.to_dense().detach().cpu()
        return np.asarray(dense.float() if dense.dtype == torch.bfloat16 else dense, dtype=dtype)

    def _check_columns(self, X: Tensor, operation: str) -> None:
        """Raise unless ``X`` is ``[..., n, m]`` with our dtype and device."""
        if not isinstance(X, Tensor):
            raise TypeError(f"{operation}: expected a tensor, got {type(X).__name__}")
        name = type(self).__name__
        if X.ndim < 2 or X.shape[-2] != self.n:
            raise ValueError(
                f"{name}.{operation}: expected shape [..., {self.n}, m], got {list(X.shape)}"
            )
        if X.dtype != self.dtype or X.device != self.device:
            raise ValueError(
                f"{name}.{operation}: expected {self.dtype} on {self.device}, "
                f"got {X.dtype} on {X.device}"
            )
        batch = self.batch_shape
        if len(batch) and X.ndim > 2:
            for ours, theirs in zip(reversed(batch), reversed(X.shape[:-2]), strict=False):
                if ours != theirs and ours != 1 and theirs != 1:
                    raise ValueError(
                        f"{name}.{operation}: batch shape {list(batch)} does not broadcast with "
                        f"{list(X.shape[:-2])}"
                    )


def _checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an author's ``method`` so that its argument is checked before it runs."""
    check = _CHECKS[name]

    @functools.wraps(method)
    def wrapper(self: StructuredMatrix, argument: Any) -> Any:
        check(self, argument, name)
        return method(self, argument)

    return wrapper


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static)
)
class StructuredMatrix(Operator):
    """A member of a structure: an immutable dataclass of tensors, or of other members.

    **You must** write two methods: :meth:`zeros` and :meth:`to_dense`. Subclassing with annotated
    fields is all it takes: no decorator, no registration.

    >>> class Diagonal(StructuredMatrix):
    ...     d: Tensor  # [..., n]
    ...
    ...     @classmethod
    ...     def zeros(cls, n, *, batch_shape=(), **opts):
    ...         return cls(torch.zeros(*batch_shape, n, **opts))
    ...
    ...     def to_dense(self):
    ...         return torch.diag_embed(self.d)

    **You may** write fast versions of ``shape``, ``mT``, ``matmul``, ``apply``,
    ``apply_transpose``, ``orthogonal_project``, ``project``, ``project_gram``, ``gram``, ``trace``,
    ``add_scaled_identity``, ``solve``, ``logdet``, ``max_abs`` and ``frobenius_norm``. Each has a
    correct default through :meth:`to_dense`. Arguments are checked before your method sees them.

    **You get** ``A @ B``, ``A @ X``, ``X @ A``, ``A + B``, ``A - B``, ``c * A``, ``A / c``, ``-A``,
    ``shape``, ``dtype``, ``device``, ``batch_shape``, ``identity``, ``zeros_like``, ``to``,
    ``clone``, ``detach``, ``tensors``, ``with_tensors``, a ``repr``, autograd through every
    operation, ``torch.compile`` and pytrees.

    ``closed_under_transpose`` says that the transpose of every member is a member (dense, diagonal,
    block-diagonal). Then ``Pi(K^T S K) = K^T Pi(S) K``: curvature may be collected before K is
    applied. It may be a property where it depends on the parts.
    """

    closed_under_transpose = False
    _fields: tuple[str, ...] = ()
    _static: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # made a dataclass above
        cls._fields = tuple(f.name for f in fields if not f.metadata.get("static"))
        cls._static = tuple(f.name for f in fields if f.metadata.get("static"))
        for name in _CHECKS.keys() & cls.__dict__.keys():
            setattr(cls, name, _checked(name, cls.__dict__[name]))
        pytree.register_pytree_node(cls, cls._flatten, cls._unflatten)

    def __post_init__(self) -> None:
        parts = [getattr(self, name) for name in self._fields]
        for name, part in zip(self._fields, parts, strict=True):
            if not isinstance(part, Tensor | StructuredMatrix):
                raise TypeError(
                    f"{type(self).__name__}.{name}: expected a tensor or a structured matrix, "
                    f"got {type(part).__name__}"
                )
            if part.dtype != parts[0].dtype or part.device != parts[0].device:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} in {parts[0].dtype} on "
                    f"{parts[0].device} as {self._fields[0]}, got {part.dtype} on {part.device}"
                )

    # You must write -----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def zeros(cls, n: int, *options: Any, **kwargs: Any) -> Self:
        """The zero member of size ``n``; options such as a block size appear here and only here.

        Args:
            n: The size.
            options: Whatever else makes the structure.
            kwargs: ``batch_shape=()``, and ``dtype`` and ``device`` as of :func:`torch.zeros`.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Write the member out, ``[..., n, n]``, linearly in the stored tensors."""

    # You may write ------------------------------------------------------------------------------

    @property
    def shape(self) -> Size:
        """``[*batch_shape, n, n]``."""
        return _coordinates.shape(self)

    @property
    def mT(self) -> StructuredMatrix:
        """The transpose, a member of the transposed structure."""
        from structured.transposed import Transposed

        return Transposed(self)

    def matmul(self, other: Self) -> Self:
        """The product ``A B`` of two members of one structure."""
        return self.orthogonal_project(self.to_dense() @ other.to_dense())

    def apply(self, X: Tensor) -> Tensor:
        """``A X`` for ``X [..., n, m]``."""
        return self.to_dense() @ X

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A^T X`` for ``X [..., n, m]``."""
        return self.to_dense().mT @ X

    def orthogonal_project(self, M: Tensor) -> Self:
        """``P(M)``, the member nearest to any ``M [..., n, n]`` in the Frobenius norm.

        Reads back a matrix that lies in the space: ``A.orthogonal_project(A.to_dense())`` is ``A``.
        """
        return _coordinates.orthogonal_project(self, M)

    def project(self, S: Tensor) -> Self:
        """``Pi(S)`` for a symmetric ``S [..., n, n]``, a member like ``self``.

        ``Pi(S)`` is the member ``r`` of least norm with ``P(r + r^T) = 2 P(S)``; equivalently its
        symmetric part is the nearest to ``S``. Only the structure of ``self`` matters.
        """
        return _coordinates.project(self, S)

    def project_gram(self, X: Tensor) -> Self:
        """``Pi(X X^T)`` for ``X [..., n, m]``, a member like ``self``."""
        return self.project(symmetric_product(X))

    def gram(self) -> Self:
        """``Pi(A^T A)``."""
        return self.project_gram(self.to_dense().mT)

    def trace(self) -> Tensor:
        """Sum of the diagonal, ``[...]``."""
        return self.to_dense().diagonal(dim1=-2, dim2=-1).sum(-1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``A + alpha I`` for a number or a tensor ``alpha`` of the batch shape."""
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        return self + alpha * self.orthogonal_project(eye.expand(self.shape))

    def solve(self, X: Tensor) -> Tensor:
        """``A^{-1} X`` for ``X [..., n, m]``; solved in float32 at least.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        wide, missing = at_least_float32(self.dtype), len(self.batch_shape) + 2 - X.ndim
        X = X[(None,) * missing]  # or a stack of vectors is seen where the shapes allow
        return torch.linalg.solve(self.to_dense().to(wide), X.to(wide)).to(self.dtype)

    def logdet(self) -> Tensor:
        """``log |det A|``, ``[...]``."""
        wide = at_least_float32(self.dtype)
        return torch.linalg.slogdet(self.to_dense().to(wide)).logabsdet.to(self.dtype)

    def max_abs(self) -> Tensor:
        """Largest absolute entry, ``[...]``; zero for ``n = 0``."""
        return largest(self.to_dense(), len(self.batch_shape))

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries, ``[...]``."""
        return torch.linalg.matrix_norm(self.to_dense())

    # You get ------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, n: int, *options: Any, **kwargs: Any) -> Self:
        """The identity of size ``n``; arguments as for :meth:`zeros`."""
        return cls.zeros(n, *options, **kwargs).add_scaled_identity(1.0)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored tensors."""
        dtype: torch.dtype = getattr(self, self._fields[0]).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        device: torch.device = getattr(self, self._fields[0]).device
        return device

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors, nested members flattened, in the order of the fields."""
        out: list[Tensor] = []
        for name in self._fields:
            part = getattr(self, name)
            if isinstance(part, StructuredMatrix):
                out.extend(part.tensors())
            else:
                out.append(part)
        return tuple(out)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The member of the same structure that stores ``tensors``, ordered as :meth:`tensors`."""
        parts: list[Any] = []
        start = 0
        for name in self._fields:
            part = getattr(self, name)
            if isinstance(part, StructuredMatrix):
                stop = start + len(part.tensors())
                parts.append(part.with_tensors(tensors[start:stop]))
            else:
                stop = start + 1
                parts.extend(tensors[start:stop])
            start = stop
        if len(tensors) != start:
            raise ValueError(f"{type(self).__name__}: expected {start} tensors, got {len(tensors)}")
        return self._build(parts)

    def map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply ``function`` to each stored tensor (and those of ``others``, side by side)."""
        columns = (self.tensors(), *(other.tensors() for other in others))
        return self.with_tensors([function(*row) for row in zip(*columns, strict=True)])

    def zeros_like(self) -> Self:
        """The zero member of this structure, size, batch shape, dtype and device."""
        return self.map(torch.zeros_like)

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self.map(torch.clone)

    def detach(self) -> Self:
        """The same numbers, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert dtype or device, as :meth:`torch.Tensor.to`."""
        moved = self.map(lambda t: t.to(*args, **kwargs))
        return moved._with_static(lambda t: t.to(*args, **kwargs))

    def to_linear_operator(self) -> LinearOperator:
        """As a ``LinearOperator``: :func:`structured.interop.to_linear_operator`."""
        from structured.interop import to_linear_operator

        return to_linear_operator(self)

    def to_scipy(self) -> ScipyOperator:
        """As SciPy's ``LinearOperator``: :func:`structured.interop.to_scipy`."""
        from structured.interop import to_scipy

        return to_scipy(self)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What makes two members addable: class, static fields and shapes, as a hashable tuple."""
        parts = []
        for name in self._fields:
            part = getattr(self, name)
            parts.append(part.layout if isinstance(part, StructuredMatrix) else part.shape)
        for name in self._static:
            value = getattr(self, name)
            parts.append(_SharedTensor(value) if isinstance(value, Tensor) else value)
        return (type(self), *parts)

    def __matmul__(self, other: Any) -> Any:
        """``A @ B`` for a member of the same structure, ``A @ X`` for a tensor."""
        return (
            self.matmul(other) if isinstance(other, StructuredMatrix) else super().__matmul__(other)
        )

    def __add__(self, other: Self) -> Self:
        """``A + B``, members of one structure."""
        if not isinstance(other, StructuredMatrix):
            return NotImplemented
        _check_member(self, other, "+")
        return self.map(torch.add, other)

    def __sub__(self, other: Self) -> Self:
        """``A - B``, members of one structure."""
        if not isinstance(other, StructuredMatrix):
            return NotImplemented
        _check_member(self, other, "-")
        return self.map(torch.sub, other)

    def __neg__(self) -> Self:
        """``-A``."""
        return self.map(torch.neg)

    def __mul__(self, c: Scalar) -> Self:
        """``c A`` for a number or a tensor of the batch shape; keeps the dtype of ``A``."""
        if not isinstance(c, Tensor):
            return self.map(lambda t: t * c) if isinstance(c, Real) else NotImplemented
        self._check_scalar(c, "*")
        return self.map(lambda t: (t * trailing(c, t)).to(t.dtype))

    __rmul__ = __mul__

    def __truediv__(self, c: Scalar) -> Self:
        """``A / c`` for a number or a tensor of the batch shape; keeps the dtype of ``A``."""
        if not isinstance(c, Tensor):
            return self.map(lambda t: t / c) if isinstance(c, Real) else NotImplemented
        self._check_scalar(c, "/")
        return self.map(lambda t: (t / trailing(c, t)).to(t.dtype))

    def __repr__(self) -> str:
        batch = f", batch {tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"{self._describe()} [{str(self.dtype).removeprefix('torch.')}{batch}]"

    def _describe(self) -> str:
        """``name(n; field = shape or part, ...)``."""
        parts = []
        for name in self._fields + self._static:
            part = getattr(self, name)
            if isinstance(part, StructuredMatrix):
                parts.append(f"{name} = {part._describe()}")
            elif isinstance(part, Tensor):
                core = part.shape[len(self.batch_shape) :]
                parts.append(f"{name}: {' x '.join(map(str, core)) or '1'}")
            else:
                parts.append(f"{name} = {part}")
        return f"{type(self).__name__}({self.n}; {', '.join(parts)})"

    def _check_scalar(self, c: Tensor, operation: str) -> None:
        if c.ndim and c.shape != self.batch_shape:
            raise ValueError(
                f"{type(self).__name__} {operation} scalar: expected a scalar or shape "
                f"{list(self.batch_shape)}, got {list(c.shape)}"
            )

    def _build(self, parts: Sequence[Any]) -> Self:
        """A member with the given fields and our static ones."""
        statics = {name: getattr(self, name) for name in self._static}
        return type(self)(**dict(zip(self._fields, parts, strict=True)), **statics)

    def _with_static(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``function`` to the static tensors, nested members' too."""
        parts: list[Any] = [getattr(self, name) for name in self._fields]
        statics: list[Any] = [getattr(self, name) for name in self._static]
        return self._unflatten(
            [p._with_static(function) if isinstance(p, StructuredMatrix) else p for p in parts],
            [function(value) if isinstance(value, Tensor) else value for value in statics],
        )

    def _flatten(self) -> tuple[list[Any], tuple[Any, ...]]:
        return (
            [getattr(self, name) for name in self._fields],
            tuple(getattr(self, name) for name in self._static),
        )

    @classmethod
    def _unflatten(cls, parts: Iterable[Any], statics: Iterable[Any]) -> Self:
        member = object.__new__(cls)  # transforms put placeholders here: no checks
        member.__dict__.update(zip(cls._fields, parts, strict=True))
        member.__dict__.update(zip(cls._static, statics, strict=True))
        return member


class _SharedTensor:
    """A static tensor in a layout: equal to itself, and to one with the same numbers."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _SharedTensor):
            return NotImplemented
        mine, theirs = self.value, other.value
        if mine is theirs:
            return True
        alike = (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        return alike and torch.equal(mine, theirs)


def _check_member(self: StructuredMatrix, other: Any, operation: str) -> None:
    """Raise unless ``other`` has our structure, size, batch shape, dtype and device."""
    if not isinstance(other, StructuredMatrix):
        raise TypeError(
            f"{type(self).__name__} {operation}: expected a member of the same structure, "
            f"got {type(other).__name__}"
        )
    if self.layout != other.layout:
        raise ValueError(
            f"{operation}: expected two members of one structure, got {self!r} and {other!r}"
        )
    if self.dtype != other.dtype or self.device != other.device:
        raise ValueError(
            f"{type(self).__name__} {operation}: expected {self.dtype} on {self.device}, "
            f"got {other.dtype} on {other.device}"
        )


def _check_square(self: StructuredMatrix, S: Tensor, operation: str) -> None:
    """Raise unless ``S`` is ``[..., n, n]`` with our dtype and device."""
    n = self.n
    if not isinstance(S, Tensor):
        raise TypeError(f"{operation}: expected a tensor, got {type(S).__name__}")
    if S.ndim < 2 or S.shape[-2:] != (n, n):
        raise ValueError(
            f"{type(self).__name__}.{operation}: expected shape [..., {n}, {n}], "
            f"got {list(S.shape)}"
        )
    if S.dtype != self.dtype or S.device != self.device:
        raise ValueError(
            f"{type(self).__name__}.{operation}: expected {self.dtype} on {self.device}, "
            f"got {S.dtype} on {S.device}"
        )


def _check_rows(self: StructuredMatrix, X: Tensor, operation: str) -> None:
    """Raise unless ``X`` is ``[..., n, m]`` with our dtype and device; any batch shape."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{operation}: expected a tensor, got {type(X).__name__}")
    if X.ndim < 2 or X.shape[-2] != self.n or X.dtype != self.dtype or X.device != self.device:
        raise ValueError(
            f"{type(self).__name__}.{operation}: expected shape [..., {self.n}, m], {self.dtype} "
            f"on {self.device}, got {list(X.shape)}, {X.dtype} on {X.device}"
        )


def _check_alpha(self: StructuredMatrix, alpha: Any, operation: str) -> None:
    if isinstance(alpha, Tensor):
        self._check_scalar(alpha, operation)
    elif not isinstance(alpha, Real):
        raise TypeError(
            f"{type(self).__name__}.{operation}: expected a number or a tensor, "
            f"got {type(alpha).__name__}"
        )


_CHECKS: dict[str, Callable[[Any, Any, str], None]] = {
    "matmul": _check_member,
    "apply": Operator._check_columns,
    "apply_transpose": Operator._check_columns,
    "solve": Operator._check_columns,
    "orthogonal_project": _check_square,
    "project": _check_square,
    "project_gram": _check_rows,
    "add_scaled_identity": _check_alpha,
}
for _name in _CHECKS:  # the defaults check as well
    setattr(StructuredMatrix, _name, _checked(_name, StructuredMatrix.__dict__[_name]))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The precision to compute in: float32 for bfloat16 and float16, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def trailing(c: Tensor, t: Tensor) -> Tensor:
    """View a scalar ``c [...]`` so that it multiplies ``t [..., *core]`` along the batch."""
    return c[(...,) + (None,) * (t.ndim - c.ndim)] if c.ndim else c


def joint_norm(*norms: Tensor) -> Tensor:
    """Euclidean norm of parts with the given norms; its gradient at zero is zero, not NaN."""
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def largest(t: Tensor, batch_ndim: int) -> Tensor:
    """Largest absolute value over all but the first ``batch_ndim`` dimensions, 0 if none."""
    flat = t.flatten(batch_ndim) if t.ndim > batch_ndim else t[..., None]
    return flat.abs().amax(-1) if flat.shape[-1] else flat.sum(-1)
