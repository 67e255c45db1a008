"""Compiles the kernels for a Hopper GPU, which need not be there, and prints the result.

python -m tests.kernels.compiled
"""

from __future__ import annotations

import json
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from singd.ops.kernels import inner_products, momentum_step, rounding
from structured.kernels import sums_of_squares, symmetric_product


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> str:
    """Assembly for arguments whose addresses and sizes are multiples of 16, as they mostly are."""
    names = kernel.arg_names
    types |= {name: "i32" for name in names if name not in types and name not in constants}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if types.get(name, "")[:1] in ("*", "i")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def report(text: str) -> dict[str, bool]:
    lines = text.splitlines()
    return {
        "matrix units": any("wgmma.mma_async" in line for line in lines),
        "pipelined": any("cp.async" in line and ", 0x10" in line for line in lines),
        "wide loads": any("ld.global" in line and ".v4" in line for line in lines),
    }


def main() -> None:
    cut = symmetric_product.LARGE
    tile = {"TILE": cut.size, "DEPTH": cut.depth, "BAND": symmetric_product.BAND, "ADD": False}
    numbers = {"alpha": "fp32", "beta": "fp32"}
    move = {"table": "*i64", "names": "*i64", "word": "*i64", "unless": "*i1"}
    move |= dict.fromkeys(("lr", "momentum", "weight_decay"), "fp32")
    found = {
        "symmetric product": ptx(
            symmetric_product._kernel,
            {"X": "*bf16", "out": "*bf16", **numbers},
            {"x_n": 1, "out_m": 1, **tile, "PRECISION": "ieee", "WIDEN": False},
            num_warps=cut.warps,
            num_stages=cut.stages,
        ),
        "sums of squares": ptx(
            sums_of_squares._kernel,
            {"X": "*bf16", "out": "*fp32"},
            {"stride_n": 1, "BLOCK_N": 128, "BLOCK_M": 32},
        ),
        "stochastic rounding": ptx(
            rounding._kernel,
            {"out": "*bf16", "x": "*fp32", "names": "*i64", "word": "*i64"},
            {"BLOCK": rounding.BLOCK, "BITS": 16},
        ),
        "inner product": ptx(
            inner_products._kernel,
            {"x": "*bf16", "y": "*bf16", "sums": "*fp32"},
            {"BLOCK": inner_products.BLOCK},
        ),
        "momentum step": ptx(
            momentum_step._kernel,
            move,
            {"TYPE": tl.bfloat16, "DIRECTION": tl.bfloat16, "MOMENTUM": True, "STRIDED": False}
            | {"DECOUPLED": True, "GUARDED": True, "ALIGNED": True, "BITS": 16, "BOXES": False}
            | {"BLOCK": momentum_step.BLOCK},
        ),
    }
    print(json.dumps({name: report(text) for name, text in found.items()}))


if __name__ == "__main__":
    main()
