"""In which precision products run, and how many digits they keep."""

from __future__ import annotations

import torch


def products_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply large matrices of ``dtype`` in.

    Itself, but float32 for float16, which has not the range, and for bfloat16 on a processor that
    has no instructions for it.
    """
    if dtype == torch.bfloat16 and (device.type != "cpu" or _cpu_has_bfloat16()):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def rounds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` keep fewer digits than float32 has.

    So does float32 itself where PyTorch may use TF32 or bfloat16 for it
    (:func:`torch.set_float32_matmul_precision`).
    """
    if dtype != torch.float32:
        return dtype.itemsize < 4
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("tf32", "bf16")


def _cpu_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
