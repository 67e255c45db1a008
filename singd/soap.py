"""A second moment in a tracked basis, as SOAP has it, as a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from singd.methods.soap import TrackedBasis
from singd.methods.spiked import SpikedBasis
from singd.optimizer import KroneckerOptimizer


class SOAP(KroneckerOptimizer):
    """Adam's second moment in the eigenbasis of Shampoo (Vyas et al., arXiv 2409.11321).

    Preconditions every parameter of two or more dimensions; needs no hooks on layers::

        for every dimension i of size d_i:
            S_i = beta2 S_i + (1 - beta2) G_i G_i^T                    G_i: unfolding of G
            Q_i = orthogonal factor of (S_i + damping mean(S_i) I) Q_i  every basis_interval steps
        V = beta2 V + (1 - beta2) (G x_1 Q_1^T ... x_k Q_k^T)^2        V moves with its basis
        D = (G x_1 Q_1^T ... x_k Q_k^T / (V + damping mean(V))^(1/2)) x_1 Q_1 ... x_k Q_k

    and the step of :class:`singd.SINGD`, whose momentum is taken of ``D``; arguments that are not
    listed are its, where they apply. The state of an m x n matrix is 2 m^2 + 2 n^2 + 2 m n numbers,
    so this is the method with the largest state here.

    Args:
        model: Model to train.
        params: Parameters or parameter groups; all trainable parameters of ``model`` if ``None``.
        lr: Learning rate; directions have a root mean square of 0.2.
        beta2: Averaging rate of ``S_i`` and ``V``, in [0, 1).
        basis_interval: Number of steps between two turns of the bases, after as many first steps
            that turn them each.
        damping: Damping in units of the mean of what it is added to.
        T: Number of steps between two updates of moments and bases.
        max_dim: Size beyond which a dimension has no basis, unless ``rank`` is given.
        rank: Number of leading directions that are tracked in every dimension; all others count
            alike (:mod:`singd.methods.spiked`). The state of an m x n matrix is then about
            ``rank (m + n) + rank^2`` numbers and the momentum; bases turn at every update. For an
            optimizer, ``None`` (whole bases) or not.

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
        beta2: float = 0.95,
        basis_interval: int = 10,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        T: int = 1,
        max_dim: int = 2048,
        rank: int | None = None,
        kl_clip: float | None = None,
        graft: str | None = "auto",
        max_skipped: int | None = 10,
        seed: int = 0,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        adamw: Mapping[str, Any] | None = None,
        process_group: Any = None,
        data: Any = None,
        places: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "basis_interval": basis_interval,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "T": T,
            "max_dim": max_dim,
            "rank": rank,
            "kl_clip": kl_clip,
            "graft": graft,
            "seed": seed,
        }
        super().__init__(
            model,
            TrackedBasis() if rank is None else SpikedBasis(),
            params,
            defaults,
            adamw=adamw,
            max_skipped=max_skipped,
            telemetry=telemetry,
            process_group=process_group,
            data=data,
            places=places,
        )
