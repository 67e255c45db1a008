"""Triton kernels as PyTorch operators, each with a reference in plain PyTorch.

The references are the functions of :mod:`structured._products.gram`. An operator runs its kernel on
CUDA where that can serve, once :class:`Guarded` has checked it; anywhere else, and wherever
something is differentiated, its reference. Deleting this folder leaves a correct library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from structured._products import gram
from structured.kernels.guard import Guarded, KernelStatus, integers

__all__ = ["Guarded", "KernelStatus", "integers", "status"]

_LIBRARY = torch.library.Library("structured", "DEF")

# In 16 bits and float32; float64 is left to PyTorch.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def status() -> list[KernelStatus]:
    """Which kernels of this package serve, on which device and data types; those used so far."""
    return [row for kernel in GUARDED for row in kernel.status()]


def _sums_of_squares(X: Tensor) -> Tensor:
    """``diag(X X^T)``: one pass over ``X``, summed in float32."""
    from structured.kernels import sums_of_squares as kernel

    return kernel.launch(X)


def _symmetric_product(X: Tensor) -> Tensor:
    """``X X^T``: half the tiles, mirrored."""
    from structured.kernels import symmetric_product as kernel

    return kernel.launch(X)


def _add_symmetric_product_(out: Tensor, X: Tensor, beta: float, alpha: float) -> None:
    """``out <- beta out + alpha X X^T``: half the tiles, mirrored, one pass over ``out``."""
    from structured.kernels import symmetric_product as kernel

    kernel.launch_add(out, X, beta, alpha)
    torch.autograd.graph.increment_version(out)


def define(
    schema: str,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    serves: Callable[..., bool],
    samples: Callable[..., Iterable[tuple[Any, ...]]],
) -> Guarded:
    """Define an operator.

    Args:
        schema: Schema as of :meth:`torch.library.Library.define`.
        kernel: Function that runs on CUDA where ``serves(*arguments)``, once it is checked.
        reference: Function that runs anywhere else, and is differentiated in its stead.
        fake: What tensors come out, for ``torch.compile``.
        serves: Whether the kernel can take the arguments, and should.
        samples: Arguments for the check of the kernel, see :class:`Guarded`.
    """
    name = schema.partition("(")[0]
    qualified = f"{_LIBRARY.ns}::{name}"
    guarded = Guarded(qualified, kernel, reference, samples)

    def run(*args: Any) -> Any:
        return guarded(*args) if serves(*args) else reference(*args)

    def differentiable(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if any(isinstance(a, Tensor) and _is_differentiated(a) for a in args):
            return reference(*args)
        operator = getattr(getattr(torch.ops, _LIBRARY.ns), name).default
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def batched(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, dims, strict=True)]
        return getattr(getattr(torch.ops, _LIBRARY.ns), name)(*moved), 0

    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    _LIBRARY.impl(name, differentiable, "Autograd", with_keyset=True)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_vmap(qualified, batched, lib=_LIBRARY)
    return guarded


def _is_differentiated(t: Tensor) -> bool:
    """Whether a derivative by ``t`` may be asked for, backward or forward."""
    if torch.is_grad_enabled() and t.requires_grad:
        return True
    return forward_ad.unpack_dual(t).tangent is not None


def _is_served(X: Tensor) -> bool:
    """Whether there is something to multiply, in a precision of the kernels."""
    return X.dtype in DTYPES and X.numel() > 0


def _samples(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[Tensor]]:
    """By rows and by columns, small blocks and a matrix of several tiles; sums below 256."""
    options: dict[str, Any] = {"bound": 2, "dtype": dtypes[-1], "device": device}
    yield (integers(3, 20, 50, **options),)
    yield (integers(50, 140, **options).mT,)


def _samples_with_sums(
    device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[Tensor, Tensor, float, float]]:
    for (X,) in _samples(device, dtypes):
        n = X.shape[-2]
        out = integers(n, n, bound=9, dtype=dtypes[0], device=device)
        yield (out + out.mT).expand(*X.shape[:-1], n).clone(), X, 0.5, 2.0


GUARDED = (
    define(
        "sums_of_squares(Tensor X) -> Tensor",
        _sums_of_squares,
        gram.sums_of_squares,
        lambda X: X.new_empty(X.shape[:-1]),
        _is_served,
        _samples,
    ),
    define(
        "symmetric_product(Tensor X) -> Tensor",
        _symmetric_product,
        gram.symmetric_product,
        lambda X: X.new_empty(*X.shape[:-1], X.shape[-2]),
        _is_served,
        _samples,
    ),
    define(
        "add_symmetric_product_(Tensor(a!) out, Tensor X, float beta, float alpha) -> ()",
        _add_symmetric_product_,
        gram.add_symmetric_product_,
        lambda out, X, beta, alpha: None,
        lambda out, X, beta, alpha: _is_served(X) and out.dtype == torch.float32 and out.ndim <= 4,
        _samples_with_sums,
    ),
)
