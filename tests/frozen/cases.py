"""The frozen configurations: each a model, options, and a way to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from structured import parse
from tests.singd.paper import KFAC, SINGD

F64, F32 = torch.float64, torch.float32
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One configuration.

    Args:
        net: Name of the model in ``nets.NETS``.
        options: Options of the optimizer, besides ``lr`` and ``T``.
        method: Optimizer.
        way: Name of the way to train in ``train.WAYS``.
        dtype: Data type of the model.
        autocast: Data type of autocast, if it is used.
        ranks: Number of processes that share each batch.
    """

    net: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    method: type[Any] = SINGD
    way: str = "plain"
    dtype: torch.dtype = F64
    autocast: torch.dtype | None = None
    ranks: int = 1

    @property
    def precision(self) -> torch.dtype:
        """The lowest precision in which anything is computed or stored."""
        stored = self.options.get("preconditioner_dtype", ())
        moved = F32 if self.way == "moved to float32" else None
        used = {self.dtype, self.autocast, moved, *stored} - {None}
        return max(used, key=lambda dtype: torch.finfo(dtype).eps)


METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "IKFAC": (SINGD, {"kfac_like": True}),
    "INGD": (SINGD, {"alpha1": 0.5}),
    "SINGD": (SINGD, {"alpha1": 0.5, "structures": ("block_diagonal(2)", "hierarchical(1, 1)")}),
    "KFAC": (KFAC, {}),
}
STRUCTURES = (
    "diagonal", "scaled_identity", "block_diagonal(2)", "hierarchical(1, 2)", "lower_triangular",
    "upper_triangular", "lower_toeplitz", "upper_toeplitz", "circulant", "low_rank_lower(1)",
    "rotated(diagonal, cosine)", "low_rank_upper(1)", "direct_sum(dense, upper_toeplitz, 2)",
    "block_upper(dense, diagonal, 1)", "transposed(hierarchical(1, 1))",
)  # fmt: skip
EVEN_STRUCTURES = ("block_circulant(2)", "tied(2, dense)", "strided(2, lower_triangular)")
NETS = ("sequence", "conv1d", "conv2d", "conv3d", "grouped", "transposed1d", "transposed2d",
        "attention", "attention, sizes", "tied", "heads", "unseen")  # fmt: skip
WAYS = ("micro", "bad gradients", "bad inputs", "curvature", "precondition", "counted", "resumed",
        "two groups", "added group", "closure", "paused", "schedule", "moved to float32",
        "new structures", "frozen layer")  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "no momentum": {"momentum": 0.0},
    "alpha1, triangular": {"alpha1": 0.9, "structures": ("lower_triangular", "diagonal")},
    "weight decay": {"weight_decay": 0.1},
    "T=1": {"T": 1},
    "T=3": {"T": 3},
    "loss is a sum": {"loss_average": None, "lr": 1e-3},
    "no kl_clip": {"kl_clip": None, "lr": 1e-2},
    "no factor_clip": {"factor_clip": None, "lr_cov": 0.01},
    "bare": {"factor_clip": None, "kl_clip": None, "lr_cov": 0.01, "lr": 1e-2, "alpha1": 0.5},
    "damping": {"damping": 1.0, "alpha1": 0.3},
    "no damping": {"damping": 0.0},
    "lr_cov": {"lr_cov": 0.05},
    "lr_cov is a function": {"lr_cov": lambda step: 0.1 / (step + 1)},
    "normalize_lr_cov": {"normalize_lr_cov": True, "alpha1": 0.5},
    "graft=running": {"graft": "running", "kl_clip": None, "lr": 1e-2},
    "graft=rms": {"graft": "rms", "kl_clip": None, "lr": 1e-2},
    "graft=sgd": {"graft": "sgd", "kl_clip": None},
    "graft=adamw": {"graft": "adamw", "kl_clip": None, "lr": 1e-2},
    "no products": {"keep_products": False},
    "max_dim": {"max_dim": 5},
    "max_dim, wide_structure": {"max_dim": {"4.*": 3}, "wide_structure": "lower_triangular"},
    "patterns": {
        "structures": {
            "0.*": ("diagonal", "dense"),
            "2.*": ("lower_toeplitz",) * 2,
            "*": ("dense", "dense"),
        }
    },
    "classes": {"structures": (parse("block_diagonal(3)"), lambda n, **k: parse("dense")(n, **k))},
}
EVERYTHING: dict[str, Any] = {"layers": "all", "alpha1": 0.5}
ADAMW = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True}
LOW = ("block_diagonal(2)", "lower_toeplitz")

CASES: dict[str, Case] = (
    {f"method {m}, {n}": Case(n, o, c) for m, (c, o) in METHODS.items() for n in ("mlp", "conv2d")}
    | {f"structure {s}": Case("wide", {"structures": (s, s), "alpha1": 0.5}) for s in STRUCTURES}
    | {f"structure {s}": Case("even", {"structures": (s, "dense")}) for s in EVEN_STRUCTURES}
    | {
        "structure rotated(lower_triangular, hadamard)": Case(
            "wide", {"structures": ("dense", "rotated(lower_triangular, hadamard)")}
        ),
        "IKFAC, lower_triangular": Case(
            options={"kfac_like": True, "structures": ("lower_triangular", "lower_triangular")}
        ),
    }
    | {f"option {name}": Case(options=o) for name, o in OPTIONS.items()}
    | {f"net {name}": Case(name) for name in NETS}
    | {f"net {name}, KFAC": Case(name, method=KFAC) for name in ("grouped", "attention")}
    | {f"way {name}": Case(way=name) for name in WAYS}
    | {f"way {w}, KFAC": Case(method=KFAC, way=w) for w in ("micro", "bad inputs", "resumed")}
    | {
        "reduce": Case("sequence", {"kfac_approx": "reduce"}),
        "reduce, conv2d": Case("conv2d", {"kfac_approx": "reduce"}),
        "reduce, KFAC": Case("conv2d", {"kfac_approx": "reduce"}, KFAC),
        "batch+sequence": Case("sequence", {"loss_average": "batch+sequence"}),
        "norms by AdamW": Case("norms", {"adamw": ADAMW}),
        "optional layers": Case("norms", EVERYTHING),
        "optional layers, images": Case("image norms", EVERYTHING),
        "grafted to AdamW": Case("norms", {"graft": "adamw", "adamw": ADAMW, "kl_clip": None}),
        "unseen, resumed": Case("unseen", way="resumed"),
        "attention, micro": Case("attention", {"alpha1": 0.5}, way="micro"),
    }
    | {
        f"{str(dtype)[6:]}{name}": Case(options=o, method=m, dtype=dtype)
        for dtype in (F32, BF16, F16)
        for name, m, o in (
            ("", SINGD, {"alpha1": 0.5}),
            (", structured", SINGD, {"structures": LOW}),
            (", KFAC", KFAC, {}),
        )
    }
    | {
        "bfloat16 factors": Case(options={"preconditioner_dtype": (BF16, F32)}, dtype=F32),
        "bfloat16, another seed": Case(options={"seed": 1}, dtype=BF16),
        "bfloat16, resumed": Case(way="resumed", dtype=BF16),
        "bfloat16, conv2d": Case("conv2d", dtype=BF16),
        "autocast bfloat16": Case(dtype=F32, autocast=BF16),
        "autocast bfloat16, conv2d": Case("conv2d", dtype=F32, autocast=BF16),
        "autocast float16, scaled": Case(way="scaled", dtype=F32, autocast=F16),
    }
    | {
        "2 ranks": Case(ranks=2),
        "2 ranks, KFAC": Case(method=KFAC, ranks=2),
        "2 ranks, wrapped": Case("conv2d", way="wrapped", ranks=2),
        "2 ranks, bad inputs": Case(way="bad inputs", ranks=2, options={"alpha1": 0.5}),
        "2 ranks, bfloat16": Case(dtype=BF16, ranks=2, options={"structures": LOW}),
    }
)
