"""SINGD: structured inverse-free natural gradient descent, as a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from singd import distributed, rule, update
from singd.base import KroneckerOptimizer
from singd.capture import Form, Unit
from singd.factors import Job
from singd.grouping import Members, Products
from singd.options import Group, by_name, floating, in_range, integer, one_of, pair
from structured import Dense, Operator, Structure, StructuredMatrix, StructureLike, parse

MAX_DIM = 8192

Structures: TypeAlias = tuple[StructureLike, StructureLike]


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
        lr: Learning rate (beta_2 in the paper); a tensor is read anew by a CUDA graph.
        momentum: Momentum of the parameters (alpha_2), in [0, 1).
        damping: Damping lambda of the curvature. What is smaller than its rounding counts as that
            (``docs/singd/precision.md``).
        alpha1: Riemannian momentum of the factors (alpha_1), in [0, 1); 0 under ``kfac_like``.
        weight_decay: Weight decay gamma, added to the preconditioned gradient.
        T: The factors are updated at every ``T``-th step.
        loss_average: What the loss is a mean over: ``"batch"`` (as many terms as samples),
            ``"batch+sequence"`` (samples times shared positions), or ``None`` for a sum.
        lr_cov: Step size of the factors (beta_1), or a function of the step number.
        structures: Structures of K (input side) and C (output side): specs, classes or callables,
            see :func:`structured.parse`. Or a mapping from patterns of parameter names, as for
            :mod:`fnmatch`, to such pairs: the first that matches counts, dense if none does.
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
            gradient>`` does not exceed it at the highest ``lr`` so far. Below that, steps are
            shorter in proportion: schedules act. ``None`` for the paper's bare rule.
        factor_clip: Bound, in (0, 1], of ``||lr_cov m_K||_2`` at every update of K, and so of C:
            they stay invertible, and in range whatever the scale of inputs and gradients. ``None``
            for the paper's bare rule.
        graft: Give every layer's preconditioned gradient the norm of the gradient (``"sgd"``) or of
            AdamW's step (``"adamw"``, with the options ``adamw``; its moments are stored as well);
            ``lr`` is then a learning rate of that method, and ``kl_clip`` best ``None``.
        keep_products: Keep ``K K^T`` and ``C C^T`` between updates of the factors where their
            structure allows: half the work of a step, for the memory of K and C once more.
        max_dim: A factor wider than this takes ``wide_structure`` instead; ``None`` for no limit.
            Or a mapping from patterns of parameter names to such limits, as for ``structures``:
            8192 if none matches.
        wide_structure: See ``max_dim``.
        layers: Further types to precondition, by diagonal factors: embeddings and normalizations,
            as listed in :data:`singd.layers.OPTIONAL`; or ``"all"`` of them.
        adamw: Options of :class:`torch.optim.AdamW` for all other parameters; ``lr=3e-3`` unless
            given.
        seed: Of the stochastic rounding.
        max_skipped: Steps in a row that may be skipped since a gradient or statistic was not
            finite, before that is an error. On a GPU a step does not wait for the device: that it
            was skipped is known at the next one, or as soon as ``skipped`` is asked for. ``None``
            looks for nothing.
        telemetry: Called after every step with a dictionary: per layer the norms of gradient and
            preconditioned gradient and the residuals of K and C, the factor of the trust region,
            and the number of skipped steps. Costs nothing if ``None``.
        process_group: Of the ranks that share the data, if not all do. Statistics are summed over
            it, and gradients averaged unless ``model`` is wrapped in DistributedDataParallel.

    Raises:
        ValueError: If an option is out of range.
    """

    _identity = ("structures", "kfac_like", "max_dim", "wide_structure")

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 0.001,
        alpha1: float = 0.0,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] = 0.3,
        structures: Structures | Mapping[str, Structures] = ("dense", "dense"),
        kfac_approx: str = "expand",
        warn_unsupported: bool = True,
        kfac_like: bool = False,
        preconditioner_dtype: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
        init_grad_scale: float = 1.0,
        normalize_lr_cov: bool = False,
        kl_clip: float | None = 3e-5,
        factor_clip: float | None = 0.5,
        graft: str | None = None,
        keep_products: bool = True,
        max_dim: int | Mapping[str, int | None] | None = MAX_DIM,
        wide_structure: StructureLike = "diagonal",
        layers: Collection[type[nn.Module]] | str = (),
        adamw: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_skipped: int | None = 10,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        process_group: Any = None,
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
            "factor_clip": factor_clip,
            "graft": graft,
            "keep_products": keep_products,
            "max_dim": max_dim,
            "wide_structure": wide_structure,
            "seed": seed,
        }
        super().__init__(
            model, params, defaults, adamw, layers, max_skipped, telemetry, process_group
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        in_range("alpha1", group["alpha1"], 0.0, 1.0, open_end=True)
        if not callable(group["lr_cov"]):
            in_range("lr_cov", group["lr_cov"], 0.0, float("inf"))
        if group["factor_clip"] is not None:
            in_range("factor_clip", group["factor_clip"], 1e-6, 1.0)
        limits = group["max_dim"]
        for limit in limits.values() if isinstance(limits, Mapping) else [limits]:
            if limit is not None:
                integer("max_dim", limit, 0)
        for name in ("kfac_like", "normalize_lr_cov", "keep_products"):
            one_of(name, group[name], (False, True))
        pair("preconditioner_dtype", group["preconditioner_dtype"])
        for dtype in group["preconditioner_dtype"]:
            floating("preconditioner_dtype", dtype)
        given = group["structures"]
        pairs = list(given.values()) if isinstance(given, Mapping) else [given]
        for each in pairs:
            pair("structures", each)
        for spec in (group["wide_structure"], *(spec for each in pairs for spec in each)):
            parse(spec)

    # What is stored -----------------------------------------------------------------------------

    def _structures(self, unit: Unit) -> tuple[Structure, ...]:
        given = by_name(unit.group["structures"], unit.name, ("dense", "dense"))
        limit = by_name(unit.group["max_dim"], unit.name, MAX_DIM)
        *_, d_out, d_in = unit.layer.shape(unit.module)
        sides = [(d_in, unit.layer.input_structure or given[0]), (d_out, given[1])]
        wide = unit.group["wide_structure"]
        return tuple(parse(wide if limit is not None and n > limit else s) for n, s in sides)

    def _choices(self, group: Group) -> tuple[Any, ...]:
        given = [group[name] for name in ("structures", "max_dim")]
        return (
            *(dict(g) if isinstance(g, Mapping) else g for g in given),
            *(group[k] for k in ("wide_structure", "kfac_like", "preconditioner_dtype")),
            group["alpha1"] == 0,
            rule.by_products(group),
        )

    def _fresh(self, unit: Unit, batch: tuple[int, ...], device: torch.device | str) -> Members:
        *inner, d_out, d_in = unit.shape
        members: Members = {}
        for index, (side, n) in enumerate((("K", d_in), ("C", d_out))):
            dtype = unit.group["preconditioner_dtype"][index] or unit.weight.dtype
            shape = (*batch, *inner)
            zero = unit.structures[index](n, batch_shape=shape, dtype=dtype, device=device)
            members[side] = zero.add_scaled_identity(1.0)
            if unit.group["alpha1"] and not unit.group["kfac_like"]:
                members[f"m_{side}"] = zero
        return members

    # The rule -----------------------------------------------------------------------------------

    def _statistic(self, unit: Unit, side: str, X: Tensor, part: int) -> StructuredMatrix:
        K = unit.member(side, part)
        if side not in unit.forms:
            form = self._form(unit, side)
            unit.forms[side] = "PS" if form == "S" and self._pays(unit, K, X) else form
        if unit.forms[side] == "PS" and unit.bucket is not None:
            return update.product_statistic(unit.bucket.product(unit, 2 * side, part), X)
        return rule.statistic(K, X, unit.forms[side])

    def _form(self, unit: Unit, side: str) -> Form:
        return rule.form_of(unit.members[side])

    def _pays(self, unit: Unit, K: StructuredMatrix, X: Tensor) -> bool:
        """Whether to sum ``P S`` in place of ``S``: twice the work for each row, ``n^3`` saved."""
        exact = K.dtype in (torch.float32, torch.float64) and X.dtype == K.dtype
        few = isinstance(K, Dense) and 2 * X.shape[-1] <= K.n and unit.whole
        alone = distributed.size(self._process_group) == 1
        bucket = unit.bucket
        if not (few and exact and alone and bucket and rule.by_products(unit.group)):
            return False
        bucket.products = bucket.products or self._products(unit.group, bucket.members)
        return True

    def _update(self, group: Group, jobs: Iterable[Job]) -> Iterator[Members]:
        return rule.updated(group, jobs)

    def _products(self, group: Group, members: Members) -> Products:
        if not group["keep_products"]:
            return {}
        found = {"KK": members["K"].outer(), "CC": members["C"].outer()}
        return {name: product for name, product in found.items() if product is not None}

    def _pair(self, members: Members, products: Products) -> tuple[Operator, Operator] | None:
        if len(products) < 2:
            return None
        wide = torch.promote_types(members["K"].dtype, members["C"].dtype)
        return products["KK"].to(wide), products["CC"].to(wide)

    def _precondition(self, members: Members, products: Products, G: Tensor) -> Tensor:
        K, C = members["K"], members["C"]
        wide = torch.promote_types(K.dtype, C.dtype)
        kept = {name: product.to(wide) for name, product in products.items()}
        natural = update.precondition(K.to(wide), C.to(wide), G.to(wide), **kept)
        return natural.to(G.dtype)
