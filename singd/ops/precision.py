"""In which precision products run, and how many digits they keep."""

from __future__ import annotations

import torch

from structured import Dense, Diagonal, StructuredMatrix


def product_dtype(K: StructuredMatrix) -> torch.dtype:
    """The data type in which K is multiplied with its curvature.

    That of K, but float32 for float16, which has not the range, for bfloat16 on a processor that
    has no instructions for it, and for all structures but the dense one, which gain nothing.
    """
    wide = torch.promote_types(K.dtype, torch.float32)
    if not isinstance(K, Dense) or K.dtype != torch.bfloat16:
        return wide
    return K.dtype if K.device.type != "cpu" or has_bfloat16_products() else wide


def rounds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` keep fewer digits than float32 has.

    So does float32 itself where PyTorch may use TF32 or bfloat16 for it
    (:func:`torch.set_float32_matmul_precision`).
    """
    if dtype != torch.float32:
        return dtype.itemsize < 4
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("tf32", "bf16")


def is_whitened(K: StructuredMatrix) -> bool:
    """Whether K is applied to the columns, since ``S`` does not determine H or loses digits."""
    rounded = rounds_products(product_dtype(K), K.device) and not isinstance(K, Diagonal)
    return rounded or not K.closed_under_congruence


def has_bfloat16_products() -> bool:
    """Whether this processor has instructions for products in bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
