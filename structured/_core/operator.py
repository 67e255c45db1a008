"""Anything square that can be multiplied by a tensor."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Size, Tensor

from structured._core.autocast import compute_without_autocast
from structured._core.entries import entries, places
from structured._core.numbers import at_least_float32, largest, largest_singular_value, solve_dense

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        compute_without_autocast(cls)

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

    def apply_overwriting(self, X: Tensor) -> Tensor:
        """``A X`` where ``X`` is needed no more: its memory may be used for the product."""
        return self.apply(X)

    rows_apart = False
    """Whether rows that come in two parts are multiplied without joining them."""

    def apply_rows(self, X: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``A [X; x]`` for rows in two parts, the result in the same two."""
        joined = self.apply(torch.cat([X.mT, x.mT], -1).mT)
        return joined[..., : X.shape[-2], :], joined[..., X.shape[-2] :, :]

    @abstractmethod
    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A^T X`` for ``X [..., n, m]``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Write the operator out, ``[..., n, n]``."""

    # Each has a default through to_dense ---------------------------------------------------------

    def solve(self, X: Tensor) -> Tensor:
        """``A^{-1} X`` for ``X [..., n, m]`` or ``[n]``; solved in float32 at least.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        columns = X[:, None] if X.ndim == 1 else X
        solved = solve_dense(self.to_dense(), columns)
        return solved[..., 0] if X.ndim == 1 else solved

    def diagonal(self) -> Tensor:
        """The diagonal, ``[..., n]``."""
        return self.to_dense().diagonal(dim1=-2, dim2=-1).clone()

    def squared_rows(self) -> Tensor:
        """Sums of squares of the rows, ``[..., n]``: the diagonal of ``A A^T``."""
        return self.to_dense().square().sum(-1)

    def trace(self) -> Tensor:
        """Sum of the diagonal, ``[...]``."""
        return self.diagonal().sum(-1)

    def logdet(self) -> Tensor:
        """``log |det A|``, ``[...]``."""
        wide = at_least_float32(self.dtype)
        return torch.linalg.slogdet(self.to_dense().to(wide)).logabsdet.to(self.dtype)

    def max_abs(self) -> Tensor:
        """Largest absolute entry, ``[...]``; zero for ``n = 0``."""
        return largest(self.to_dense(), len(self.batch_shape))

    def spectral_norm(self) -> Tensor:
        """Largest singular value, ``[...]``, in float32 at least; zero for ``n = 0``."""
        return largest_singular_value(self.to_dense())

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries, ``[...]``."""
        return torch.linalg.matrix_norm(self.to_dense())

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

    def __getitem__(self, index: Any) -> Any:
        """``A[..., i, j]``, as of ``A.to_dense()``; integers and slices take a product at most.

        Raises:
            IndexError: If an index is out of range, or there are too many.
        """
        where = places(index, len(self.shape))
        return self.to_dense()[index] if where is None else entries(self, where)

    def to_structure(self, structure: Any) -> Any:
        """The member of another structure nearest to this matrix: the same one, where it has it.

        Writes the matrix out. From a structure into a larger one and back nothing changes.

        Args:
            structure: As for :func:`structured.parse`.
        """
        # Structures are made of operators: what reads their names is found at the time of the call.
        parse = sys.modules["structured"].parse
        return parse(structure).from_dense(self.to_dense())

    def sample(self, m: int, *, generator: Generator | None = None) -> Tensor:
        """``m`` columns ``A z`` with standard normal ``z``, ``[..., n, m]``: covariance A A^T."""
        z = torch.empty((*self.shape[:-1], m), dtype=self.dtype, device=self.device)
        return self.apply(z.normal_(generator=generator))

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
