"""SINGD: structured inverse-free natural gradient descent, as a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd import update
from singd.base import KroneckerOptimizer, in_range
from singd.capture import Statistics, Unit
from structured import StructuredMatrix, StructureLike, parse


class SINGD(KroneckerOptimizer):
    """IKFAC, INGD and SINGD (Lin et al., arXiv 2312.05705), trained like any other optimizer.

    >>> optimizer = SINGD(model, structures=("dense", "diagonal"))
    >>> optimizer.zero_grad()
    >>> loss_func(model(X), y).backward()
    >>> optimizer.step()

    Linear and convolutional layers are preconditioned by structured Kronecker factors, learned
    without matrix inversion; every other parameter is trained by AdamW. The empirical Fisher is
    used.

    Args:
        model: The model to train; its supported layers are hooked.
        params: Parameters or parameter groups; all trainable parameters of ``model`` if ``None``.
        lr: Learning rate (beta_2 in the paper).
        momentum: Momentum of the parameters (alpha_2), in [0, 1).
        damping: Damping lambda of the curvature.
        alpha1: Riemannian momentum of the factors (alpha_1), in [0, 1); 0 under ``kfac_like``.
        weight_decay: Weight decay gamma, added to the preconditioned gradient.
        T: The factors are updated at every ``T``-th step.
        loss_average: What the loss is a mean over: ``"batch"`` (as many terms as samples),
            ``"batch+sequence"`` (samples times shared positions), or ``None`` for a sum.
        lr_cov: Step size of the factors (beta_1), or a function of the step number.
        structures: Structures of K (input side) and C (output side): specs, classes or callables,
            see :func:`structured.parse`.
        kfac_approx: ``"expand"`` or ``"reduce"`` for layers that share their weight over positions
            (Eschenhagen et al., arXiv 2311.00636).
        warn_unsupported: Accepted for scripts written for PyPI ``singd``; nothing is left
            untrained, so there is nothing to warn of.
        kfac_like: IKFAC (close to KFAC) instead of INGD / SINGD.
        preconditioner_dtype: Data types of K and of C; ``None`` for that of the weight. Below
            float32, updates are rounded stochastically.
        init_grad_scale: Accepted for scripts written for PyPI ``singd``; statistics are summed in
            float32 at least, so no guess of a GradScaler's first scale is needed.
        normalize_lr_cov: Divide ``lr_cov`` by the largest entry of the factor's momentum where that
            exceeds 1.
        kl_clip: Bound ``kappa`` of every step: scaled down so that ``lr^2 <natural gradient,
            gradient>`` does not exceed it. ``None`` for the paper's bare rule.
        adamw: Options of :class:`torch.optim.AdamW` for all other parameters.
        seed: Of the stochastic rounding.

    Raises:
        ValueError: If an option is out of range.
    """

    _identity = ("structures", "kfac_like")

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 0.001,
        momentum: float = 0.9,
        damping: float = 0.001,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] = 1e-2,
        structures: tuple[StructureLike, StructureLike] = ("dense", "dense"),
        kfac_approx: str = "expand",
        warn_unsupported: bool = True,
        kfac_like: bool = False,
        preconditioner_dtype: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
        init_grad_scale: float = 1.0,
        normalize_lr_cov: bool = False,
        kl_clip: float | None = 1e-4,
        adamw: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "T": T,
            "loss_average": loss_average,
            "lr_cov": lr_cov,
            "structures": structures,
            "kfac_approx": kfac_approx,
            "kfac_like": kfac_like,
            "preconditioner_dtype": preconditioner_dtype,
            "normalize_lr_cov": normalize_lr_cov,
            "kl_clip": kl_clip,
            "seed": seed,
        }
        super().__init__(model, params, defaults, adamw)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        in_range("alpha1", group["alpha1"], 0.0, 1.0, open_end=True)
        if not callable(group["lr_cov"]):
            in_range("lr_cov", group["lr_cov"], 0.0, float("inf"))
        for name in ("structures", "preconditioner_dtype"):
            if not isinstance(group[name], tuple | list) or len(group[name]) != 2:
                raise ValueError(f"{name}: expected a pair, for K and for C, got {group[name]!r}")
        for spec in group["structures"]:
            parse(spec)

    # State --------------------------------------------------------------------------------------

    def _member(self, unit: Unit, name: str) -> StructuredMatrix:
        """``K``, ``C``, ``m_K`` or ``m_C`` of a unit; its tensors are those in the state."""
        if name not in unit.members:
            state, device = self.state[unit.weight], unit.weight.device
            zero = self._zero(unit, name[-1], "meta" if name in state else device)
            if name not in state:
                first = zero if name.startswith("m_") else zero.add_scaled_identity(1.0)
                state[name] = list(first.tensors())
            unit.members[name] = zero.with_tensors(state[name])
        return unit.members[name]

    def _zero(self, unit: Unit, side: str, device: torch.device | str) -> StructuredMatrix:
        """The zero member of the structure of ``side``, ``"K"`` or ``"C"``."""
        *batch, d_out, d_in = unit.shape
        index = "KC".index(side)
        dtype = unit.group["preconditioner_dtype"][index] or unit.weight.dtype
        structure = parse(unit.group["structures"][index])
        n = (d_in, d_out)[index]
        return structure(n, batch_shape=tuple(batch), dtype=dtype, device=device)

    def _expected_state(self, unit: Unit) -> dict[str, list[Tensor] | Tensor]:
        momenta = unit.group["alpha1"] and not unit.group["kfac_like"]
        names = ("K", "C", "m_K", "m_C") if momenta else ("K", "C")
        return {name: list(self._zero(unit, name[-1], "meta").tensors()) for name in names}

    def _describe(self, unit: Unit) -> str:
        return ", ".join(str(parse(spec)) for spec in unit.group["structures"])

    # The rule -----------------------------------------------------------------------------------

    def _statistic(self, unit: Unit, side: str, X: Tensor) -> StructuredMatrix:
        K = self._member(unit, side)
        compute = torch.float32 if X.dtype == torch.float16 else X.dtype
        wide = torch.promote_types(compute, torch.float32)
        return update.statistic(K.to(compute), X.to(compute)).to(wide)

    def _update(
        self, unit: Unit, seen: Statistics, scale_K: float, scale_C: Tensor | float
    ) -> None:
        group = unit.group
        U_K, U_C = scale_K * seen.U_K, scale_C * seen.U_C
        K = self._member(unit, "K").to(U_K.dtype)
        C = self._member(unit, "C").to(U_C.dtype)
        H_K, H_C = update.curvature(K, U_K), update.curvature(C, U_C)
        if group["kfac_like"]:
            m_K = update.ikfac_momentum(K, H_K, group["damping"])
            m_C = update.ikfac_momentum(C, H_C, group["damping"])
        else:
            m_K, m_C = update.singd_momenta(K, C, H_K, H_C, group["damping"])
        for name, factor, m in (("K", K, m_K), ("C", C, m_C)):
            self._move_factor(unit, name, factor, m)

    def _move_factor(
        self, unit: Unit, name: str, K: StructuredMatrix, m_K: StructuredMatrix
    ) -> None:
        """Momentum and step of one factor."""
        group = unit.group
        alpha1 = 0.0 if group["kfac_like"] else group["alpha1"]
        if group["normalize_lr_cov"]:
            m_K = (1 - alpha1) * m_K  # else the largest entry could only grow
        if alpha1:
            old = self._member(unit, f"m_{name}")
            m_K = alpha1 * old.to(m_K.dtype) + m_K
            for stored, new in zip(old.tensors(), m_K.tensors(), strict=True):
                stored.copy_(new)
        lr_cov = group["lr_cov"](group["step"]) if callable(group["lr_cov"]) else group["lr_cov"]
        if group["normalize_lr_cov"]:
            lr_cov = update.normalized(lr_cov, m_K)
        K = update.factor_step(K, m_K, lr_cov)
        for stored, new in zip(self._member(unit, name).tensors(), K.tensors(), strict=True):
            stored.copy_(self._rounded(new, stored.dtype, group))

    def _precondition(self, unit: Unit, G: Tensor) -> Tensor:
        K, C = self._member(unit, "K"), self._member(unit, "C")
        wide = torch.promote_types(K.dtype, C.dtype)
        natural = update.precondition(K.to(wide), C.to(wide), G.to(wide))
        return natural.to(G.dtype)
