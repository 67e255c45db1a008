"""Products and sums that are written into memory which is there, panel by panel on a CPU.

Only plain numbers can be written anywhere: :func:`plain` says whether tensors are that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Size, Tensor
from torch.autograd import forward_ad

_PANEL = 1 << 21  # bytes: what is made and read again at once stays in the caches
_LARGE = 1 << 15  # numbers: products as large are not worth a temporary for all of them


def plain(*tensors: Tensor) -> bool:
    """Whether these are numbers alone: neither differentiated, nor mapped, nor compiled.

    What is written into memory made by hand has no place there for derivatives, or for the
    dimension that ``vmap`` hides. The compiler plans its memory itself.
    """
    # PyTorch has no public name for dual levels; within them and torch.func nothing is plain.
    if torch.compiler.is_compiling() or transformed() or forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def holds_product(X: Tensor, batch_shape: Size) -> bool:
    """Whether a product with matrices of ``batch_shape`` has the shape of ``X [..., n, m]``."""
    batch = X.shape[:-2]
    return batch == batch_shape or torch.broadcast_shapes(batch, batch_shape) == batch


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work; compiled code does not say."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._functorch.peek_interpreter_stack())  # without a public name


def plus_product(Y: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``Y + A B``, in the memory of ``Y`` where all are plain; ``Y`` is needed no more."""
    if not plain(Y, A, B):
        return Y + A @ B
    add_product_(Y, A, B)
    return Y


def panels(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one batch shape cut alike along it, the last into about :data:`_PANEL` bytes."""
    X = tensors[-1]
    if X.nbytes <= _PANEL or not X.is_cpu:
        yield tensors
    elif X.nbytes > _PANEL * len(X) and X.ndim > 3:
        for each in zip(*tensors, strict=True):
            yield from panels(*each)
    else:
        count = max(1, _PANEL * len(X) // X.nbytes)
        yield from zip(*(t.split(count) for t in tensors), strict=True)


def write_product_(out: Tensor, A: Tensor, B: Tensor) -> None:
    """``out <- A B``, on a CPU panel by panel where all are of one batch shape.

    ``B`` may be ``out``. That is faster than to multiply in place: PyTorch's products in place take
    small matrices one by one.
    """
    if not out.is_cpu and B is not out:
        add_product_(out, A, B, beta=0.0)
        return
    batched = out.ndim > 2 and out.shape[:-2] == A.shape[:-2] == B.shape[:-2]
    for each in panels(out, A, B) if batched else [(out, A, B)]:
        place, a, b = _as_stored(*each)
        place.copy_(a @ b)


def _as_stored(out: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``out = A B`` or its transpose, whichever ``out`` holds row by row."""
    by_columns = out.stride(-2) < out.stride(-1)
    return (out.mT, B.mT, A.mT) if by_columns else (out, A, B)


def accumulate_(out: Tensor, M: Tensor, *, beta: float, alpha: float) -> None:
    """``out <- beta out + alpha M``. For ``beta = 0`` what is in ``out`` does not matter."""
    before = out.mul_(beta) if beta else out.zero_()
    before.add_(M, alpha=alpha)


def add_product_(
    out: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """``out <- beta out + alpha A B``; no temporary with one batch dimension at most, in 32 bits.

    For ``beta = 0`` what is in ``out`` does not matter. In 16 bits PyTorch's sums in place take a
    hundred times as long on a CPU, unless all is laid out row by row; vmap has no rule for them.
    """
    slow = (out.is_cpu and out.dtype.itemsize < 4) or not plain(out, A, B)
    while out.ndim == A.ndim == B.ndim > 3 and len(out) == 1:
        out, A, B = out[0], A[0], B[0]
    large = out.is_cpu and out.numel() >= _LARGE * max(1, len(out))
    if large and out.ndim == A.ndim == B.ndim > 3 and len(out) == len(A) == len(B):
        for i in range(len(out)):
            add_product_(out[i], A[i], B[i], beta=beta, alpha=alpha)
    elif out.ndim == A.ndim == B.ndim == 2 and not slow:
        out.addmm_(A, B, beta=beta, alpha=alpha)
    elif out.ndim == A.ndim == B.ndim == 3 and len(out) == len(A) == len(B) and not slow:
        out.baddbmm_(A, B, beta=beta, alpha=alpha)
    else:
        out, A, B = _as_stored(out, A, B)
        accumulate_(out, A @ B, beta=beta, alpha=alpha)
