"""SINGD: structured inverse-free natural gradient descent, as a torch.optim optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from singd.methods.automatic import Automatic
from singd.methods.budget import STATE, check_budget
from singd.methods.inverse_free import InverseFree
from singd.methods.options import warn_of_limits
from singd.optimizer import KroneckerOptimizer
from structured import StructureLike

Structures: TypeAlias = tuple[StructureLike, StructureLike]
Choice: TypeAlias = Structures | Mapping[str, Structures] | str | None


class SINGD(KroneckerOptimizer):
    r"""IKFAC, INGD and SINGD (Lin et al., arXiv 2312.05705), trained like any other optimizer.

    >>> optimizer = SINGD(model, lr=3e-3, weight_decay=0.1)
    >>> optimizer.zero_grad()
    >>> loss_func(model(X), y).backward()
    >>> optimizer.step()

    For every weight W of a linear, convolutional or attention layer, with inputs A and output
    gradients B (empirical Fisher), one step is::

        every T steps, and in each of the first burn_in steps:
            H_K, H_C = Pi(K^T A A^T K), Pi(C^T B B^T C)        in the structures of K and C
            m_K = alpha1 m_K + 1/2 (mean(H_C) H_K + damping mean(C^T C) Pi(K^T K) - I)
            m_C alike                                          (kfac_like: 1 for the means)
            K, C = K (I - lr_cov m_K), C (I - lr_cov m_C)      ||lr_cov m|| <= factor_clip
        D = C C^T grad K K^T
        D = 0.2 D / rms(D)                                     rms: root mean square, over
        b = momentum b + D                                     the steps that b averages
        W = (1 - lr weight_decay) W - lr b

    No matrix is inverted or decomposed. The length of a step does not depend on the gradient's, so
    ``lr`` means about what it means in AdamW, which trains every other parameter at that rate. The
    loss may be multiplied by any number: K and C start at the scale of the first statistics, and
    ``damping`` is relative to them. The paper's bare rule is ``lr=0.1, damping=0.001,
    structures=("dense", "dense"), graft=None, factor_clip=None, relative_damping=False,
    scale_init=False, burn_in=0, decoupled_weight_decay=False``.

    Args:
        model: Model to train; its supported layers are hooked.
        params: Parameters or parameter groups; all trainable parameters of ``model`` if ``None``.

        lr: *As in SGD.* Learning rate (beta_2 in the paper); a tensor is read anew by a CUDA graph.
        momentum: Momentum of the parameters (alpha_2), in [0, 1).
        weight_decay: Weight decay gamma.
        decoupled_weight_decay: Decay ``W <- (1 - lr weight_decay) W`` as AdamW does; otherwise
            ``weight_decay W`` is added to the direction.

        structures: *Curvature.* Structures of K (input side) and C (output side): specs, classes or
            callables, see :func:`structured.parse`; ``"up_to(8192, dense, diagonal)"`` is diagonal
            on wide sides. Or a mapping from patterns of parameter names, as for :mod:`fnmatch`, to
            such pairs: the first that matches counts. By default, dense on the smaller side of a
            weight and blocks of that size on the other, so that K and C have at most as many
            numbers as the weight, and the state is at most 1.5 times AdamW's; diagonal on sides
            beyond 8192. Where the smaller side is below 16, blocks are up to twice as large (and of
            16 in grouped convolutions), and the state is up to 1.75 times AdamW's.
            ``"auto"`` averages the whole curvature of the first three updates (a dense S for every
            side of up to 2048, for that time), and then takes for every weight the structures that
            lose the fewest nats within ``budget``; :meth:`plan` shows them.
        budget: State under ``structures="auto"``: a multiple of AdamW's (a float) or bytes (an
            integer), of all groups that have the same. Or a mapping of limits, ``{"state": 1.5,
            "flops": 0.2}``: ``state`` as before, and ``flops`` of a step's updates and directions,
            as a multiple of those of the forward and backward passes of the weights on a rank; and
            ``sent``, bytes that a rank sends in a step for statistics, factors and directions, on
            average over steps and ranks, as a multiple of the bytes of the weights' gradients.
        damping: Damping lambda of the curvature. What is smaller than its rounding counts as that.
        relative_damping: Damping is in units of the mean eigenvalue of the curvature,
            ``mean(S_K) mean(S_C)``; otherwise in those of the curvature.
        scale_init: K and C start as ``mean(S)^(-1/2) I``, otherwise as ``I``.
        T: Number of steps between two updates of the factors.
        burn_in: Number of first steps that all update the factors: they follow the curvature after
            tens of updates only, and wide layers train faster once they do.
        lr_cov: Step size of the factors (beta_1), or a function of the step number; by default
            0.03 T, at most 0.3.
        alpha1: Riemannian momentum of the factors (alpha_1), in [0, 1); 0 under ``kfac_like``.
        kfac_like: IKFAC (close to KFAC) instead of INGD / SINGD.
        sample: Statistics are of one row (one position of a sample) in so many, at equal distances
            from a random first one: unbiased, and so many times cheaper. Of convolutions and under
            ``"reduce"``, of one sample in so many. A CUDA graph reads the same rows in each replay.
            ``"last"``: of the last of the backward passes before a step, which stands for all;
            those under ``no_sync()``, or ``set_requires_gradient_sync(False)``, cost nothing.
        kfac_approx: ``"expand"`` or ``"reduce"`` for layers that share their weight over positions
            (Eschenhagen et al., arXiv 2311.00636).
        loss_average: What the loss is a mean over: ``"batch"`` (as many terms as samples),
            ``"batch+sequence"`` (samples times shared positions), or ``None`` for a sum. It
            changes nothing unless the scale of the curvature counts, as with ``kl_clip``.
        preconditioner_dtype: Data types of K and of C; ``None`` for that of the weight. Below
            float32, updates are rounded stochastically. ``"bfloat16+8"`` stores float32 numbers in
            24 bits, ``"int8"`` in 8 with a scale for each 64, except tensors of at most n numbers.
        keep_products: Cache ``K K^T`` and ``C C^T`` between updates of the factors where their
            structure allows: half the work of a step, for the memory of K and C once more. Never of
            factors stored as ``"bfloat16+8"`` or ``"int8"``.

        kl_clip: *Safety.* Bound ``kappa`` of every step: scaled down so that ``lr^2 <D, grad>``
            does not exceed it at the highest ``lr`` of a step so far. Below that, steps are shorter
            in proportion: schedules act.
        factor_clip: Bound, in (0, 1], of ``||lr_cov m_K||_2`` at every update of K, and so of C:
            they stay invertible, and in range whatever the scale of inputs and gradients. ``None``
            for the paper's bare rule.
        normalize_lr_cov: Divide ``lr_cov`` by the largest entry of the factor's momentum where that
            exceeds 1.
        graft: Length of every weight's direction: a root mean square of 0.2 over the steps that
            ``momentum`` averages (``"running"``), or in every step (``"rms"``); the norm of the
            gradient (``"sgd"``) or of AdamW's step (``"adamw"``, with the options ``adamw``; its
            averages are stored as well); or as the curvature makes it (``None``). ``"auto"`` is
            ``"running"``, or ``None`` where ``kl_clip`` is given.
        max_skipped: Steps in a row that may be skipped since a gradient or statistic was not
            finite, before that is an error. On a GPU a step does not wait for the device: that it
            was skipped is known at the next one, or as soon as ``skipped`` is asked for. ``None``
            looks for nothing, and 0 sets no bound.
        seed: Seed of the stochastic rounding.
        telemetry: Function called after every step with :func:`singd.diagnostics.describe`.

        adamw: *Other parameters.* Options of :class:`torch.optim.AdamW`, which trains them. Its
            rate follows the group's: ``adamw["lr"] / lr`` of it, the same unless given; its weight
            decay is the group's, decoupled, unless given.
        layers: Further types to precondition, by diagonal factors: embeddings and normalizations,
            as listed in :data:`singd.layers.OPTIONAL`; or ``"all"`` of them.
        process_group: Process group of the ranks that share the data, if not all do. Statistics are
            summed over it, and gradients averaged unless ``model`` is wrapped in
            DistributedDataParallel.
        data: Mesh, or names of dimensions of the parameters' mesh, over which samples differ, of a
            model with tensor parallelism; ``()`` if they do not. FSDP2 and HSDP need no such name.
        places: Where factors of a sharded model are worked on: ``"everywhere"``, ``"rows"``,
            ``"columns"`` or ``"owned"``, or a mapping from patterns of parameter names to these;
            the cheapest if ``None``, or where there can be no such one; ``"shards"``, of what
            tensor parallelism splits, is an error where blocks do not fit. With ``"rows"``, for a C
            that is diagonal or of blocks within the rows of ranks, no gradient is communicated.

        max_dim: *Compatibility.* Width beyond which a factor takes ``wide_structure``, or a mapping
            from patterns of parameter names to widths; write ``up_to(8192, dense, diagonal)`` in
            ``structures``.
        wide_structure: Structure of wide factors, likewise; diagonal unless given.
        warn_unsupported: Accepted for scripts written for PyPI ``singd``; nothing is left
            untrained, so there is nothing to warn of.
        init_grad_scale: Accepted likewise; statistics are summed in float32 at least, so no guess
            of a GradScaler's first scale is needed.

    Raises:
        TypeError: If ``model`` or ``params`` is of the wrong kind.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 3e-3,
        momentum: float = 0.9,
        damping: float = 0.01,
        alpha1: float = 0.0,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] | None = None,
        structures: Choice = None,
        kfac_approx: str = "expand",
        *,
        burn_in: int = 100,
        sample: int | str = 1,
        budget: float | Mapping[str, float] = STATE,
        kfac_like: bool = False,
        relative_damping: bool = True,
        scale_init: bool = True,
        decoupled_weight_decay: bool = True,
        preconditioner_dtype: tuple[torch.dtype | str | None, torch.dtype | str | None] = (
            None,
            None,
        ),
        keep_products: bool = True,
        kl_clip: float | None = None,
        factor_clip: float | None = 0.5,
        normalize_lr_cov: bool = False,
        graft: str | None = "auto",
        max_skipped: int | None = 10,
        seed: int = 0,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        adamw: Mapping[str, Any] | None = None,
        layers: Collection[type[nn.Module]] | str = (),
        process_group: Any = None,
        data: Any = None,
        places: Any = None,
        max_dim: int | Mapping[str, int | None] | None = None,
        wide_structure: StructureLike | None = None,
        warn_unsupported: bool | None = None,
        init_grad_scale: float | None = None,
    ) -> None:
        for name, value in (
            ("warn_unsupported", warn_unsupported),
            ("init_grad_scale", init_grad_scale),
        ):
            if value is not None:
                message = f"{name} has no effect: leave it out"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
        warn_of_limits(max_dim, wide_structure)
        check_budget(budget)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "relative_damping": relative_damping,
            "scale_init": scale_init,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "T": T,
            "loss_average": loss_average,
            "lr_cov": lr_cov,
            "structures": structures,
            "sample": sample,
            "budget": budget,
            "burn_in": burn_in,
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
            model,
            Automatic() if isinstance(structures, str) else InverseFree(),
            params,
            defaults,
            adamw=adamw,
            layers=layers,
            max_skipped=max_skipped,
            telemetry=telemetry,
            process_group=process_group,
            data=data,
            places=places,
        )
