"""Triton kernels behind PyTorch operators, each beside its plain twin.

The twins are the functions of ``structured/_products/gram.py``. An operator runs its kernel on CUDA
where that can serve; anywhere else, and wherever something is differentiated, its twin. Deleting
this folder leaves a correct library.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from structured._products import gram

_LIBRARY = torch.library.Library("structured", "DEF")

# In 16 bits and float32; float64 is left to PyTorch.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    library: torch.library.Library,
    schema: str,
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    fake: Callable[..., Any],
    serves: Callable[..., bool],
) -> None:
    """Define an operator.

    Args:
        library: Where.
        schema: As of :meth:`torch.library.Library.define`.
        kernel: Run on CUDA where ``serves(*arguments)`` and Triton is installed.
        twin: Run anywhere else, and differentiated in its stead.
        fake: What tensors come out, for ``torch.compile``.
        serves: Whether the kernel can take the arguments, and should.
    """
    name = schema.partition("(")[0]
    qualified = f"{library.ns}::{name}"

    def on_cuda(*args: Any) -> Any:
        if _triton_is_installed() and serves(*args):
            return kernel(*args)
        return twin(*args)

    def differentiable(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if any(isinstance(a, Tensor) and _is_differentiated(a) for a in args):
            return twin(*args)
        operator = getattr(getattr(torch.ops, library.ns), name).default
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def batched(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, dims, strict=True)]
        return getattr(getattr(torch.ops, library.ns), name)(*moved), 0

    library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, twin, "CPU")
    library.impl(name, on_cuda, "CUDA")
    library.impl(name, differentiable, "Autograd", with_keyset=True)
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_vmap(qualified, batched, lib=library)


def _is_differentiated(t: Tensor) -> bool:
    """Whether a derivative by ``t`` may be asked for, backward or forward."""
    if torch.is_grad_enabled() and t.requires_grad:
        return True
    return forward_ad.unpack_dual(t).tangent is not None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_served(X: Tensor) -> bool:
    """Whether there is something to multiply, in a precision of the kernels."""
    return X.dtype in DTYPES and X.numel() > 0


define(
    _LIBRARY,
    "sums_of_squares(Tensor X) -> Tensor",
    _sums_of_squares,
    gram.sums_of_squares,
    lambda X: X.new_empty(X.shape[:-1]),
    _is_served,
)
define(
    _LIBRARY,
    "symmetric_product(Tensor X) -> Tensor",
    _symmetric_product,
    gram.symmetric_product,
    lambda X: X.new_empty(*X.shape[:-1], X.shape[-2]),
    _is_served,
)
define(
    _LIBRARY,
    "add_symmetric_product_(Tensor(a!) out, Tensor X, float beta, float alpha) -> ()",
    _add_symmetric_product_,
    gram.add_symmetric_product_,
    lambda out, X, beta, alpha: None,
    lambda out, X, beta, alpha: _is_served(X) and out.dtype == torch.float32 and out.ndim <= 4,
)
