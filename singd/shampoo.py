"""KL-Shampoo and root-free Shampoo as a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from singd.methods.options import warn_of_limits
from singd.methods.shampoo import GradientCovariance
from singd.optimizer import KroneckerOptimizer
from structured import StructureLike


class KLShampoo(KroneckerOptimizer):
    """KL-Shampoo (Lin et al., arXiv 2509.03378) without roots, inverses or decompositions.

    Preconditions every parameter of two or more dimensions by the covariance of its gradients, a
    Kronecker product of one factor for each dimension; needs no hooks on layers::

        every T steps, for every dimension i of size d_i, with Y = G x_1 K_1^T ... x_k K_k^T:
            H_i = Pi(d_i / d Y_i Y_i^T + damping mean(G^2) prod_{j != i} mean(K_j^T K_j) K_i^T K_i)
            K_i = K_i (I - lr_cov / 2 (H_i - I))
        D = G x_1 (K_1 K_1^T)^power ... x_k (K_k K_k^T)^power

    and the step of :class:`singd.SINGD`; arguments that are not listed are its, where they apply.

    Args:
        model: Model to train.
        params: Parameters or parameter groups; all trainable parameters of ``model`` if ``None``.
        lr: Learning rate; directions have a root mean square of 0.2.
        structures: Structure of all factors, or a tuple for the first, second, ... dimension, the
            last for all that follow: ``up_to(8192, dense, diagonal)`` unless given.
        power: 0.5 for KL-Shampoo, in structures that are closed under transposition; 1 for
            root-free Shampoo (Lin et al., arXiv 2402.03496), in any.
        damping: Damping in units of the mean square of the gradient.
        lr_cov: Step size of the factors, in [0, 1], or a function of the step number; by default
            0.03 T, at most 0.3.
        T: Number of steps between two updates of the factors.
        max_dim: *Compatibility.* Size beyond which a factor takes ``wide_structure`` instead; write
            ``up_to`` in ``structures``.
        wide_structure: Structure of wide factors, likewise.

    Raises:
        TypeError: If ``model`` or ``params`` is of the wrong kind.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 3e-3,
        *,
        structures: StructureLike | tuple[StructureLike, ...] = "up_to(8192, dense, diagonal)",
        power: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-4,
        lr_cov: float | Callable[[int], float] | None = None,
        T: int = 10,
        kl_clip: float | None = None,
        graft: str | None = "auto",
        max_skipped: int | None = 10,
        seed: int = 0,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        adamw: Mapping[str, Any] | None = None,
        process_group: Any = None,
        data: Any = None,
        places: Any = None,
        max_dim: int | None = None,
        wide_structure: StructureLike | None = None,
    ) -> None:
        warn_of_limits(max_dim, wide_structure)
        defaults = {
            "lr": lr,
            "structures": structures,
            "power": power,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "lr_cov": lr_cov,
            "T": T,
            "max_dim": max_dim,
            "wide_structure": wide_structure,
            "kl_clip": kl_clip,
            "graft": graft,
            "seed": seed,
        }
        super().__init__(
            model,
            GradientCovariance(),
            params,
            defaults,
            adamw=adamw,
            max_skipped=max_skipped,
            telemetry=telemetry,
            process_group=process_group,
            data=data,
            places=places,
        )
