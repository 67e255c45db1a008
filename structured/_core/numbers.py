"""What the structures share: precision, scalars along a batch, norms of parts, tables."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The precision to compute in: float32 for bfloat16 and float16, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def trailing(c: Tensor, t: Tensor) -> Tensor:
    """View a scalar ``c [...]`` so that it multiplies ``t [..., *core]`` along the batch."""
    return c[(...,) + (None,) * (t.ndim - c.ndim)] if c.ndim else c


def add_to_diagonal(M: Tensor, alpha: float | Tensor, offset: int = 0) -> Tensor:
    """``M [..., p, q]`` with ``alpha``, a number or ``[...]``, added along a diagonal; a copy."""
    if not isinstance(alpha, Tensor):
        out = M.clone()
        out.diagonal(offset, -2, -1).add_(alpha)
        return out
    diagonal = M.diagonal(offset, -2, -1)  # alpha may be differentiated or mapped where M is not
    shifted = diagonal + trailing(alpha, diagonal)
    return torch.diagonal_scatter(M, shifted.to(M.dtype), offset, -2, -1)


def add_to_first(t: Tensor, alpha: float | Tensor) -> Tensor:
    """``t [..., k]`` with ``alpha``, a number or ``[...]``, added to the first of the k numbers."""
    alpha = trailing(alpha, t) if isinstance(alpha, Tensor) else alpha
    return torch.cat([(t[..., :1] + alpha).to(t.dtype), t[..., 1:]], -1)


def joint_norm(*norms: Tensor) -> Tensor:
    """Euclidean norm of parts with the given norms; its gradient at zero is zero, not NaN."""
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def lengths(t: Tensor) -> Tensor:
    """Euclidean norms ``[..., 1]`` along the last dimension; squares may overflow or vanish."""
    scale = t.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)
    return scale * torch.linalg.vector_norm(t / scale, dim=-1, keepdim=True)


def largest(t: Tensor, batch_ndim: int) -> Tensor:
    """Largest absolute value over all but the first ``batch_ndim`` dimensions, 0 if none."""
    flat = t.flatten(batch_ndim)
    return flat.abs().amax(-1) if flat.shape[-1] else flat.sum(-1)


def largest_singular_value(M: Tensor) -> Tensor:
    """Spectral norm of ``M [..., p, q]``, computed in float32 at least; 0 if ``M`` is empty."""
    if not M.shape[-1] * M.shape[-2]:
        return M.sum((-2, -1))
    return torch.linalg.matrix_norm(M.to(at_least_float32(M.dtype)), 2).to(M.dtype)


def solve_dense(M: Tensor, X: Tensor) -> Tensor:
    """``M^{-1} X`` in float32 at least."""
    wide = at_least_float32(M.dtype)
    X = X[(None,) * (M.ndim - X.ndim)]  # or a stack of vectors is seen where the shapes allow
    return torch.linalg.solve(M.to(wide), X.to(wide)).to(M.dtype)


def above_rounding(sizes: Tensor) -> Tensor:
    """``sizes [..., k]``, zero where below the rounding of the largest in its row."""
    if not sizes.shape[-1]:
        return sizes
    bound = torch.finfo(sizes.dtype).eps * sizes.amax(-1, keepdim=True)
    return torch.where(sizes > bound, sizes, 0)


def tabulated(make: Callable[..., tuple[np.ndarray, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Make arrays of constants once for each set of sizes and ``dtype``, tensors on the CPU.

    What is kept is NumPy's: no transform, inference mode or fake tensor of PyTorch gets into it. To
    ``torch.compile`` they are constants.
    """

    @functools.lru_cache(64)
    def kept(*sizes: int, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
        name = str(dtype).removeprefix("torch.")
        arrays = make(*sizes)
        return tuple(a.astype(name) if a.dtype.kind == "f" else a for a in arrays)

    @functools.wraps(make)
    def tensors(*sizes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in kept(*sizes, dtype=dtype))

    # What torch.compiler.assume_constant_result does, less the import of the compiler.
    tensors._dynamo_marked_constant = True  # type: ignore[attr-defined]  # of a function
    return tensors
